"""On the node: from the scheduler's environment to one process group over all ranks."""
