"""Multimodal anomaly detection: images and texts to anomaly maps, scores and answers in words."""
