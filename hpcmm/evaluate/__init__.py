"""``python -m hpcmm.evaluate``: trained runs to scores by category, side by side."""
