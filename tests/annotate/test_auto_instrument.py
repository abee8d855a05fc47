"""Programs that know nothing of hpcmm are annotated as soon as they import PyTorch, and import what they always did."""

import os
import subprocess
import sys
import textwrap

import pytest

from hpcmm import annotate
from hpcmm.annotate import auto_instrument
from hpcmm.annotate import ranges as loops
from hpcmm.annotate.auto_instrument import after_import


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=environment or None,
    ).stdout


def test_what_follows_an_import_runs_once_and_sees_the_whole_module(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    after_import("late", lambda module: seen.append(module.VALUE))
    assert seen == []
    import late

    assert seen == [1]
    assert late.__spec__.loader is late.__loader__
    after_import("late", lambda module: seen.append(module.VALUE + 1))
    assert seen == [1, 2]
    del sys.modules["late"]


def test_an_error_of_the_module_stays_its_own(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise ValueError('mine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    after_import("broken", lambda _: pytest.fail("ran"))
    with pytest.raises(ValueError, match="mine"):
        import broken  # noqa: F401


def test_collectives_are_annotated_at_init_with_a_profiler_and_torch_is_not_imported_for_it():
    code = """
        import sys
        from hpcmm.annotate.auto_instrument import annotate_collectives_at_init
        annotate_collectives_at_init()
        assert "torch" not in sys.modules
        import torch.distributed as dist
        from torch.distributed import init_process_group
        init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from hpcmm.annotate import collectives
        print(collectives.install())
        dist.destroy_process_group()
    """
    assert "CollectiveRecorder" in run_python(code, **os.environ, NVTX_INJECTION64_PATH="/none")


def test_without_a_profiler_nothing_waits_for_torch(monkeypatch):
    monkeypatch.setattr(auto_instrument, "profiler_attached", lambda: False)
    before = list(sys.meta_path)
    auto_instrument.annotate_collectives_at_init()
    assert sys.meta_path == before


@pytest.fixture
def ranges(monkeypatch):
    """What is begun and ended, in order."""
    log = []

    class Noted:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            log.append(("begin", *self.what))

        def __exit__(self, *_):
            log.append(("end", *self.what))

    monkeypatch.setattr(loops, "step", lambda number: Noted("step", number))
    monkeypatch.setattr(loops, "phase", Noted)
    return log


def test_a_step_is_the_loop_s_body_and_the_fetching_of_the_next_batch(ranges):
    for batch in annotate.steps(["a", "b"]):
        ranges.append(batch)
    assert ranges == [
        ("begin", "step", 0), "a", ("begin", "data"), ("end", "data"), ("end", "step", 0),
        ("begin", "step", 1), "b", ("begin", "data"), ("end", "data"), ("end", "step", 1),
    ]  # fmt: skip


def test_a_step_ends_when_its_body_leaves_the_loop(ranges):
    for batch in annotate.steps(["a", "b", "c"], first=7):
        ranges.append(batch)
        break
    assert ranges == [("begin", "step", 7), "a", ("end", "step", 7)]


def test_without_a_profiler_the_loop_is_as_it_was():
    assert list(annotate.steps(iter(range(3)))) == [0, 1, 2]
