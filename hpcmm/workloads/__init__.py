"""What is trained: one folder a workload. No other room imports one."""
