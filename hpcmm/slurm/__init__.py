"""Slurm through its commands: what runs, what it says, and what its refusals mean."""
