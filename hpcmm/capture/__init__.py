"""What wraps a rank's command: the choice of profiled ranks, the profiler, and the finishing of its report."""
