"""What hpcmm says when the user, the cluster or a file is at fault, as against a bug of its own."""

from __future__ import annotations


class HpcmmError(Exception):
    """One clear sentence: what is wrong, where, and what to do. Entry points print it and exit non-zero."""


class ProfilerUnusableError(HpcmmError):
    """A node's profiler is missing or records nothing; training without it is possible."""
