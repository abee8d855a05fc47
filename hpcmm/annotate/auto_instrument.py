"""Annotation of collectives in programs that know nothing of hpcmm: at their first ``init_process_group``."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from hpcmm.annotate.import_hooks import after_import
from hpcmm.annotate.ranges import profiler_attached

_MODULE = "torch.distributed.distributed_c10d"


def annotate_collectives_at_init() -> None:
    """Have collectives annotated from the end of the first ``init_process_group`` on, whoever calls it.

    PyTorch is not imported for it. Does nothing when no profiler is attached.
    """
    if profiler_attached():
        after_import(_MODULE, _wrap_init)


def _wrap_init(module: ModuleType) -> None:
    init: Any = module.init_process_group  # a name that PyTorch documents

    @functools.wraps(init)
    def init_and_annotate(*arguments: Any, **keywords: Any) -> None:
        init(*arguments, **keywords)
        from hpcmm.annotate import collectives  # noqa: PLC0415 -- imports torch, which is there by now

        collectives.install()

    module.init_process_group = init_and_annotate  # type: ignore[attr-defined]
