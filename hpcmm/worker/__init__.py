"""On the node: from the scheduler's environment to one rank that trains, under the profiler where asked."""
