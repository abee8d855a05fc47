"""The ``step`` range and the phase ranges within it, on the calling thread."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import nvtx

from hpcmm.annotate import names

_INJECTION = "NVTX_INJECTION64_PATH"
"""Set by every profiler that listens to NVTX, before the program starts."""

_NOTHING: AbstractContextManager[None] = nullcontext()


def profiler_attached() -> bool:
    """Whether this process was started under a profiler that records NVTX ranges."""
    return _INJECTION in os.environ


_ATTACHED = profiler_attached()


class _Range:
    """A pushed and popped range. Ends also when its block raises."""

    __slots__ = ("_name", "_payload")

    def __init__(self, name: str, payload: int | None) -> None:
        self._name = name
        self._payload = payload

    def __enter__(self) -> None:
        nvtx.push_range(self._name, domain=names.DOMAIN, payload=self._payload)

    def __exit__(self, *_exception: object) -> None:
        nvtx.pop_range(domain=names.DOMAIN)


def step(number: int) -> AbstractContextManager[None]:
    """One training step. ``number`` counts from 0 over the whole training, resumed runs included."""
    return _Range(names.STEP, number) if _ATTACHED else _NOTHING


def phase(name: str) -> AbstractContextManager[None]:
    """A part of a step; the usual ones are ``names.PHASES``, any other name is a phase of its own."""
    return _Range(name, None) if _ATTACHED else _NOTHING
