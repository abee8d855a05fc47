"""Reports that were recorded, not made."""

from pathlib import Path

H100 = Path(__file__).parents[2] / "profiles" / "samples" / "h100_2gpu_nccl.sqlite"
"""Two H100s; see ``profiles/samples/README.md``."""
