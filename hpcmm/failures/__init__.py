"""What a failing rank leaves behind, and what kind of failure it is. No torch, no Slurm."""
