"""What process groups are for, as their program tells it: the tensor group of ranks 0 and 1, a stage's data group.

The names reach the report as marks, so that the analysis need not infer them. A group that a library has described
itself (a dimension of a ``DeviceMesh``, Megatron's groups) is named by its description as soon as it communicates.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hpcmm.annotate import ranges, schema

_named: dict[str, schema.GroupMark] = {}
"""By the name that ``torch.distributed`` gives the group."""


def name_group(group: Any, name: str) -> None:
    """Tell what a process group of this rank is for: ``"tensor"``, ``"data"``, ``"data x sequence"``, or any words.

    >>> pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    >>> for pair in pairs:
    ...     annotate.name_group(pair, "tensor")

    ``group``: as ``torch.distributed`` made it; None stands for that of all ranks. Of a group that this rank is no
    member of, nothing is noted. The last name of a group holds. See :data:`hpcmm.annotate.schema.AXES` for names that
    the analysis knows.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    group = distributed.group.WORLD if group is None else group
    if not isinstance(group, distributed.ProcessGroup):  # what new_group returns to a rank that is no member
        return
    mark = schema.GroupMark(group.group_name, name.strip(), tuple(distributed.get_process_group_ranks(group)))
    if mark.name and _named.get(mark.group) != mark:
        _named[mark.group] = mark
        _tell(mark)


def seen(group: Any) -> None:
    """A group communicates for the first time: if it has no name yet, what its library called it is one."""
    if group.group_name not in _named:
        axis = schema.axis_of(str(getattr(group, "group_desc", "")))
        if axis:
            name_group(group, axis)


def named_groups() -> Mapping[str, schema.GroupMark]:
    """The groups of this process that have a name, by the name that ``torch.distributed`` gives them."""
    return dict(_named)


def tell_groups() -> None:
    """Mark all of them once more: a capture begins, which holds no mark of before."""
    for mark in _named.values():
        _tell(mark)


def expert_tokens(tokens: Any, layer: str = "") -> None:
    """Tell how many tokens this rank's experts of one layer got: a number, or one for each expert.

    Call it within the step, once for each layer and forward pass, when the numbers are on the host anyway: of a tensor
    on a GPU it would wait for the device, so that nothing is noted. Without a profiler it does nothing.
    """
    if not ranges.profiler_attached() or getattr(getattr(tokens, "device", None), "type", "cpu") != "cpu":
        return
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    total = sum(map(int, listed)) if isinstance(listed, (list, tuple)) else int(listed)
    ranges.nvtx.mark(schema.format_expert_tokens(total, layer), domain=schema.DOMAIN)


def _tell(mark: schema.GroupMark) -> None:
    if ranges.profiler_attached():
        ranges.nvtx.mark(mark.format(), domain=schema.DOMAIN)


ranges.at_capture(tell_groups)
