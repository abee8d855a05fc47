"""What hpcmm says when the user, the cluster or a file is at fault, as against a bug of its own."""

from __future__ import annotations


class HpcmmError(Exception):
    """One clear sentence: what is wrong, where, and what to do. Entry points print it and exit non-zero."""


class ProfilerUnusableError(HpcmmError):
    """A node's profiler is missing or records nothing; training without it is possible."""


class ScriptExitError(HpcmmError):
    """The user's script or function ended by itself with another status than 0."""

    def __init__(self, problem: str, status: int, said: str = "") -> None:
        """``status``: 1 to 255, as a shell has it. ``said``: what it gave to ``sys.exit`` in place of a number."""
        super().__init__(problem)
        self.status = status
        self.said = said


class InputError(HpcmmError):
    """A file or folder that the user named is not there, cannot be read, or does not hold what it should."""

    def __init__(self, problem: str) -> None:
        """``problem``: a whole sentence. What is printed begins alike in all cases, so that logs can be searched."""
        super().__init__(f"Input cannot be used: {problem}")
