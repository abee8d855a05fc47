"""Is this cluster fit to train on: checks of the login node and of every node, and which node is bad, and why."""
