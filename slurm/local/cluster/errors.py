"""What the local cluster says when the machine or the user is at fault."""

from __future__ import annotations


class ClusterError(Exception):
    """One clear sentence: what is wrong, where, and what to do. The commands print it and exit with its status."""

    exit_status = 1


class MissingPrerequisiteError(ClusterError):
    """This machine, or this user, cannot run a cluster at all."""

    exit_status = 3
