"""Nsight Systems reports of any version, read into events on one clock."""
