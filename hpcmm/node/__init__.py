"""What login and compute nodes need of a node: its cache, its ports, and what a failure leaves there."""
