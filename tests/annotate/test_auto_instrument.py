"""Programs that know nothing of hpcmm are annotated as soon as they import PyTorch, and import what they always did."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import hpcmm
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


def test_a_python_without_nvtx_under_a_profiler_says_so_in_one_line_and_goes_on():
    code = """
        import sys
        sys.modules["nvtx"] = None
        from hpcmm import annotate
        from hpcmm.annotate import collectives
        collectives.install()
        for number in annotate.steps(range(2)):
            with annotate.phase("forward"):
                print(number)
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NVTX")}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        words, env=environ | {"NVTX_INJECTION64_PATH": "/none"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n1\n"
    assert done.stderr.startswith("hpcmm: no range is recorded, for ")
    assert done.stderr.count("\n") == 1


IN_CHILDREN = Path(auto_instrument.__file__).with_name("in_children")


def python_as_a_child(folder, code, **environment):
    path = os.pathsep.join([str(IN_CHILDREN), str(folder), str(Path(hpcmm.__file__).parents[1])])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NVTX", "PYTHON"))}
    return run_python(code, **clean, PYTHONPATH=path, **environment)


@pytest.fixture
def folder_of_torch(tmp_path):
    """Has a ``torch`` and a ``sitecustomize`` of the site's own."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text("print('site', __file__)\n")
    return tmp_path


LOOK = """
    import sys
    before = "hpcmm" in sys.modules
    import torch
    print(before, "hpcmm.annotate.auto_instrument" in sys.modules)
"""


def test_a_child_is_annotated_when_it_imports_torch_and_runs_the_site_s_own_file(folder_of_torch):
    said = python_as_a_child(folder_of_torch, LOOK, NVTX_INJECTION64_PATH="/none").splitlines()
    assert said == [f"site {folder_of_torch / 'sitecustomize.py'}", "False True"]


def test_a_child_without_a_profiler_imports_nothing(folder_of_torch):
    said = python_as_a_child(folder_of_torch, LOOK).splitlines()
    assert said == [f"site {folder_of_torch / 'sitecustomize.py'}", "False False"]


def test_children_get_the_folder_first_on_their_path_once_and_only_with_a_profiler(monkeypatch):
    environ = {"PYTHONPATH": "/mine"}
    monkeypatch.setattr(auto_instrument, "profiler_attached", lambda: False)
    auto_instrument.annotate_children(environ)
    assert environ["PYTHONPATH"] == "/mine"
    monkeypatch.setattr(auto_instrument, "profiler_attached", lambda: True)
    for _ in range(2):
        auto_instrument.annotate_children(environ)
    assert environ["PYTHONPATH"] == f"{IN_CHILDREN}{os.pathsep}/mine"


def test_a_name_that_pytorch_lacks_costs_its_phase_and_is_told(capsys):
    auto_instrument._watch_backward(SimpleNamespace())
    assert capsys.readouterr().err.startswith("hpcmm: phase backward cannot be seen")


def test_the_exchange_of_gradients_of_an_engine_is_phase_backward(monkeypatch):
    said = []
    asked = SimpleNamespace(exchange_begins=lambda: not said, backward_ends=lambda: said.append("ends"))
    monkeypatch.setattr(auto_instrument, "_ranges", lambda: asked)

    class Engine:
        def step(self):
            pass

        def allreduce_gradients(self, bucket_size):
            said.append(bucket_size)

    auto_instrument._watch_deepspeed(SimpleNamespace(DeepSpeedEngine=Engine))
    for _ in range(2):
        Engine().allreduce_gradients(bucket_size=7)
    assert said == [7, "ends", 7]


def test_a_pipeline_stage_that_calls_no_module_but_its_layers_has_forward_passes():
    code = """
        from hpcmm.annotate import auto_instrument, ranges, auto_steps
        said = []
        for module in (ranges, auto_steps):
            module.push = lambda opened: said.append(f"({opened.name.split()[0]}{opened.payload or ''}")
            module.pop = lambda: said.append(")")
        auto_instrument.annotate_program()
        import torch
        class Stage(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = torch.nn.Linear(2, 2)
                self.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(2, 2), "1": torch.nn.Linear(2, 2)})
            def forward(self, x):
                x = self.embedding(x)
                for layer in self.layers.values():
                    x = layer(x)
                return x
        stage = Stage()
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        for _ in range(4):
            stage.forward(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        print("".join(said))
    """
    said = run_python(code, **os.environ, NVTX_INJECTION64_PATH="/none").strip()
    assert said.endswith("(step3(forward2)(forward2)(forward2)(backward)(optimizer)")


def test_a_loop_of_plain_pytorch_has_steps_and_phases():
    code = """
        from hpcmm.annotate import auto_instrument, ranges, auto_steps
        said = []
        for module in (ranges, auto_steps):
            module.push = lambda opened: said.append(f"({opened.name.split()[0]}")
            module.pop = lambda: said.append(")")
        auto_instrument.annotate_program()
        import torch
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train, held_out = torch.ones(2, 2), torch.zeros(2, 2)
        for epoch in range(2):
            for batch in torch.utils.data.DataLoader(train, batch_size=1):
                model(batch).sum().backward()
                optimizer.step()
            with torch.no_grad():
                for batch in torch.utils.data.DataLoader(held_out, batch_size=1):
                    model(batch)
        print("".join(said))
    """
    first, later = "(step(backward)(optimizer)(data))", "(step(forward)(backward)(optimizer)(data))"
    said = run_python(code, **os.environ, NVTX_INJECTION64_PATH="/none").strip()
    assert said == f"{first}{later}(data){later}{later}"


UPDATES = {
    "by hand": """
        def update():
            with torch.no_grad():
                for each in model.parameters():
                    each -= 0.1 * each.grad
    """,
    "of a class of its own": """
        class Own:
            def step(self):
                torch._foreach_add_([each.detach() for each in model.parameters()], -0.1)
        update = Own().step
    """,
}


@pytest.mark.parametrize("update", UPDATES)
def test_updates_without_an_optimizer_of_pytorch_make_steps(update):
    code = """
        from hpcmm.annotate import auto_instrument, ranges, auto_steps
        numbers = []
        for module in (ranges, auto_steps):
            module.push = lambda opened: opened.name.startswith("step") and numbers.append(opened.payload)
            module.pop = lambda: None
        auto_instrument.annotate_program()
        import torch
        model = torch.nn.Linear(2, 1)
        UPDATE
        for _ in range(5):
            model.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            update()
        print([number for number in numbers if number is not None])
    """
    code = textwrap.dedent(code).replace("UPDATE\n", textwrap.dedent(UPDATES[update]))
    assert run_python(code, **os.environ, NVTX_INJECTION64_PATH="/none").strip() == "[1, 2, 3, 4]"


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
