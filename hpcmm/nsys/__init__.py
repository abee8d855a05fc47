"""Nsight Systems itself: found, tried, run around one rank, its reports imported."""
