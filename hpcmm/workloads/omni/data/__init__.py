"""Conversations of the omni-modal workload: read, rendered, packed, and a data set of its own that is made."""
