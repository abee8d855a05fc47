"""The models of all workloads are plain modules: none of them names a rank, a group or a collective."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcmm.workloads

MODELS = sorted(Path(hpcmm.workloads.__path__[0]).glob("*/models/**/*.py"))
PARALLEL = {"torch.distributed", "deepspeed"}
NAMES = {
    "get_rank", "get_world_size", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier",
    "new_group", "ProcessGroup", "is_initialized",
}  # fmt: skip


def parallel_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if is_parallel(each.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
            yield from (name for name in imported if is_parallel(name))
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.attr
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node.id


def is_parallel(module: str) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in PARALLEL)


@pytest.mark.parametrize("module", MODELS, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_model_names_no_rank_group_or_collective(module: Path):
    assert list(parallel_names(ast.parse(module.read_text(encoding="utf-8")))) == []


def test_what_would_be_parallel_is_seen():
    source = "import torch.distributed as dist\nfrom torch import distributed\ndist.all_reduce(x)\nimport deepspeed"
    assert set(parallel_names(ast.parse(source))) == {"torch.distributed", "all_reduce", "deepspeed"}
