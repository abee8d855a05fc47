"""What runs, where, since when, what it says, and why it failed: ``python -m hpcmm.jobs``. No torch."""
