"""The scale of pixels between data sets and models, which know nothing of each other: both take it from here."""

from __future__ import annotations

CHANNEL_MEAN = 127 / 255
CHANNEL_STD = 128 / 255
"""Data sets give (value - mean) / std of values from 0 to 1, the same for each channel: about -1 to 1. It is what
EfficientNet-Lite was trained with; each other image encoder goes on from it to its own scale."""
