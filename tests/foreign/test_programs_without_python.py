"""Reports of programs in C++, Fortran or Julia: their advice is in words that they can follow."""

import re
from pathlib import Path

import pytest
from changed_inputs import INPUTS, changed

from hpcmm.analysis.advice import WITHOUT_PYTHON
from hpcmm.analysis.findings import CAUSES, Finding
from hpcmm.analysis.suggestions import suggest
from hpcmm.analysis.waitpid import has_no_python
from hpcmm.analyze import analyze

OF_PYTHON = re.compile(
    r"torch|DataLoader|\.item\(\)|\.cpu\(\)|non_blocking|py-spy|hpcmm\.annotate|zero_grad|no_sync|python"
)
PROGRAM = (
    "CREATE TABLE IF NOT EXISTS PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT)",
    "UPDATE PROCESSES SET name = 'lattice_qcd'",
    "INSERT INTO PROCESSES SELECT DISTINCT globalTid >> 24 << 24, globalTid >> 24 & 0xFFFFFF, 'lattice_qcd' "
    "FROM CUPTI_ACTIVITY_KIND_RUNTIME",
    "INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:COMMAND', '/opt/apps/lattice_qcd')",
)


@pytest.mark.parametrize(
    ("workers", "program", "kernels", "expected"),
    [
        (["cuda-cloverleaf"], "cuda-cloverleaf", [], True),
        (["./saxpy-mpi-cuda"], "", [], True),
        (["fire_animation_"], "fire_animation_data", ["spread(int)"], True),
        (["lattice"] * 4, "mpirun", [], True),
        (["julia"], "julia", [], True),
        (["python3"], "python3", [], False),
        (["pt_main_thread"], "torchrun", [], False),
        (["MainThread"], "", [], False),
        (["lm_eval"], "lm_eval", ["void at::native::vectorized_elementwise_kernel<4>"], False),
        (["worker"], "mpirun", ["triton_poi_fused_add_0"], False),
        (["worker"], "python", [], False),
        (["worker"], "some_wrapper", [], False),
        (["lattice", "python"], "srun", [], False),
        (["lattice", ""], "srun", [], False),
        (["sh"], "", [], False),
        ([], "lattice", [], False),
    ],
)
def test_what_is_no_python_program_is_known_by_its_names(
    workers: list[str], program: str, kernels: list[str], expected: bool
) -> None:
    assert has_no_python(workers, program, kernels) is expected


MOVES = (
    "", "offload", "host to device, pageable", "host to device, pinned", "device to host, pageable",
    "device to host, pinned", "device to device, device", "peer to peer, device", "host to device, managed",
)  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in CAUSES if kind.startswith(("gpu_", "host_"))] + ["data", "unseen"])
def test_no_advice_is_for_pytorch(kind: str) -> None:
    for moves in MOVES if kind == "gpu_copy" else [""]:
        for function in ("", "poll", "write", "nanosleep"):
            finding = Finding(kind, "", 1.0, None, "", "", "", "medium", moves=moves, function=function)
            told = suggest(finding, {}, framework=WITHOUT_PYTHON)
            assert told
            assert not OF_PYTHON.search(told), told


def test_a_report_of_such_a_program_has_such_advice(tmp_path: Path) -> None:
    for source in ("sync_then_loading", "offload_pinned", "many_iterations"):
        analysis = analyze(changed(tmp_path, source, *PROGRAM))
        assert len(analysis.bottlenecks()) or source == "many_iterations"
        assert not analysis.bottlenecks()["suggestion"].str.contains(OF_PYTHON).any()
        assert not analysis.coverage()["reason"].str.contains("hpcmm.annotate|Python package").any()


def test_without_ranges_the_line_to_add_is_its_own(tmp_path: Path) -> None:
    study = analyze(changed(tmp_path, "sync_then_loading", *PROGRAM, "DELETE FROM NVTX_EVENTS")).study
    assert study.line_to_add.startswith('nvtxRangePushA("step");')
    assert "hpcmm.annotate" in analyze(INPUTS / "graph_trace").study.line_to_add
