"""Copies by direction and memory, in numbers of nsys, and what is said of them."""

import pandas as pd
import pytest

from hpcmm.analysis.copies import OFFLOAD, in_words, of_device, told, what_moves
from hpcmm.analysis.findings import Finding
from hpcmm.analysis.intervals import IntervalSet
from hpcmm.analysis.suggestions import suggest

MIB = 1 << 20


@pytest.mark.parametrize(
    ("numbers", "direction", "memory"),
    [
        ((1, 0, 2), "host to device", "pageable"),
        ((1, 1, 2), "host to device", "pinned"),
        ((2, 2, 0), "device to host", "pageable"),
        ((2, 2, 1), "device to host", "pinned"),
        ((8, 2, 2), "device to device", "device"),
        ((10, 2, 2), "peer to peer", "device"),
        ((11, -1, -1), "host to device", "managed"),
        ((12, -1, -1), "device to host", "managed"),
        ((1, -1, -1), "host to device", ""),
        ((0, 1, 2), "host to device", "pinned"),
        ((-1, 2, 0), "device to host", "pageable"),
        ((-1, -1, -1), "unknown", ""),
        ((99, 7, 7), "unknown", ""),
    ],
)
def test_numbers_of_nsys_are_told_as_words(numbers: tuple[int, int, int], direction: str, memory: str) -> None:
    assert told(*numbers) == (direction, memory)


def copies(*rows: tuple[int, int, int, int, int, int]) -> pd.DataFrame:
    """``rows``: start, end, bytes, copyKind, srcKind, dstKind; as the table has them, of one device."""
    frame = pd.DataFrame(rows, columns=["start_ns", "end_ns", "bytes", "copy_kind", "source", "target"])
    found = of_device(
        frame.assign(kind=pd.Categorical(["copy"] * len(rows)), device=0),
        IntervalSet.union_of([0], [50]),
        IntervalSet.union_of([40], [60]),
    )
    table = found.assign(copy_s=found["copy_ns"] / 1e9, exposed_s=found["exposed_ns"] / 1e9)
    return table.assign(bytes_per_s=table["bytes"] / table["copy_s"])


def test_what_neither_kernels_nor_communication_hide_is_exposed() -> None:
    table = copies((10, 30, 8, 1, 1, 2), (20, 100, 8, 1, 1, 2), (70, 80, 8, 2, 2, 0))
    assert table[["direction", "memory", "copies", "bytes", "copy_ns", "exposed_ns"]].to_numpy().tolist() == [
        ["host to device", "pinned", 2, 16, 90, 40],
        ["device to host", "pageable", 1, 8, 10, 10],
    ]


def advice(table: pd.DataFrame, config: dict | None = None) -> str:
    moves = what_moves(table)
    finding = Finding("gpu_copy", "copies without computation", 1.0, None, "", "", "", "medium", moves=moves)
    return suggest(finding, config or {})


def test_copies_between_gpus_are_told() -> None:
    table = copies((100, 200, 8, 10, 2, 2), (300, 350, 8, 8, 2, 2))
    told = in_words(table)
    assert "1 copies between GPUs (peer to peer)" in told
    assert "1 copies device to device" in told
    assert "collectives of NCCL" in advice(table)


def test_pageable_copies_are_to_be_pinned_and_pinned_ones_are_not() -> None:
    assert "pin_memory=True" in advice(copies((100, 200, 8, 1, 0, 2)))
    for rows in (
        [(100, 200, 8, 1, 1, 2)],
        [(100, 200, 8, 2, 2, 1)],
        [(100, 200, 8, 1, -1, -1)],
        [(100, 200, 8, 8, 2, 2)],
    ):
        assert "pin_memory" not in advice(copies(*rows))


def test_large_pinned_copies_are_an_offload_in_either_direction() -> None:
    to_device = [(100 * n, 100 * n + 50, 64 * MIB, 1, 1, 2) for n in range(1, 5)]
    to_host = [(100 * n + 50, 100 * n + 99, 64 * MIB, 2, 2, 1) for n in range(1, 5)]
    for rows in (to_device, to_host, to_device + to_host):
        table = copies(*rows)
        assert what_moves(table) == OFFLOAD
        assert "offload" in in_words(table)
        assert "keep more on the GPU" in advice(table)
    config = {"parallel": {"offload_optimizer": "cpu", "offload_parameters": "none"}, "train": {"micro_batch_size": 1}}
    assert advice(copies(*to_device), config) == "parallel.offload_optimizer=none"


def test_small_or_few_pinned_copies_are_none() -> None:
    assert (
        what_moves(copies(*((100 * n, 100 * n + 50, 4096, 1, 1, 2) for n in range(1, 9)))) == "host to device, pinned"
    )
    assert what_moves(copies((100, 200, 64 * MIB, 1, 1, 2))) == "host to device, pinned"
    assert what_moves(copies((10, 20, 8, 1, 1, 2))) == ""  # hidden behind a kernel
