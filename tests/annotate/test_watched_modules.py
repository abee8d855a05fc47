"""Modules of programs that know nothing of hpcmm, however they are made: watched, and left as they were."""

import gc
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest

from hpcmm.annotate import auto_steps, watched_modules
from hpcmm.annotate.watched_modules import WatchedModules

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(autouse=True)
def leave_other_tests_models():
    """Whatever model lives in this process is found, those of other tests, too."""
    yield
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module):
            watched_modules._remove_other_hooks(each)


def test_copies_of_a_watched_module_tell_nothing(tmp_path):
    told = SimpleNamespace(forward_begins=lambda *_, **__: calls.append("begin"), forward_ends=lambda _: None)
    calls = []
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    gc.collect()
    assert model in WatchedModules(lambda: told).find()
    model(torch.ones(1, 2))
    assert calls == ["begin"]
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)(torch.ones(1, 2))
    assert calls == ["begin"]


def test_what_others_hooked_before_a_forward_pass_is_within_the_phase():
    said = []
    told = SimpleNamespace(
        forward_begins=lambda *_, **__: said.append("begins"), forward_ends=lambda _: said.append("ends")
    )
    model = nn.Linear(1, 1)
    model.register_forward_pre_hook(lambda *_: said.append("gathers"), prepend=True)
    model.register_forward_hook(lambda *_: said.append("frees"))
    watched_modules._hooks_on(model, lambda: told)
    model(model.weight)
    assert said == ["begins", "gathers", "frees", "ends"]


def test_a_module_that_answers_otherwise_than_pytorch_s_is_left_alone():
    class Groups(nn.Linear):
        def parameters(self, rate):
            return [{"params": [self.weight], "lr": rate}]

    class Wrapping(nn.Linear):
        @property
        def module(self):
            raise RuntimeError("not yet")

    class Unmade(nn.Module):
        def __init__(self):
            """As a class that is made without its base class, or not ready yet."""

    groups, wrapping, unmade, compiled = Groups(1, 1), Wrapping(1, 1), Unmade(), torch.compile(nn.Linear(1, 1))
    found = WatchedModules(SimpleNamespace).find()
    assert groups in found
    assert wrapping in found
    assert compiled in found
    assert unmade not in found
    assert auto_steps._mode(wrapping) is True


def test_a_script_of_torchscript_trains_without_being_watched():
    scripted = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2))
    assert not [each for each in WatchedModules(SimpleNamespace).find() if isinstance(each, torch.jit.ScriptModule)]
    scripted(torch.ones(1, 2))


def test_a_watched_model_is_scripted_and_watched_again():
    calls = []
    told = SimpleNamespace(forward_begins=lambda *_, **__: calls.append("begin"), forward_ends=lambda _: None)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    watched = WatchedModules(lambda: told)
    watched.find()
    with watched.unwatched(model):
        scripted = torch.jit.script(model)
    scripted(torch.ones(1, 2))
    assert calls == []
    model(torch.ones(1, 2))
    assert calls == ["begin"]


class Once(list):
    def __iter__(self):
        raise AssertionError("it may be gone through once")


class Drawing(dict):
    def values(self):
        raise AssertionError("its values are drawn at random")


def test_the_size_of_a_batch_calls_nothing_of_the_program_s_own():
    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_, **__):
            raise AssertionError("it sees what is done with it")

    size_of = WatchedModules(SimpleNamespace).size_of
    pair = namedtuple("pair", "image text")
    held = pair(torch.ones(2, 3), "four")
    assert size_of(((held, Once([torch.ones(5)])), {"mask": Drawing(a=torch.ones(1)), "o": OrderedDict(b="x")})) == 17
    assert size_of(torch.ones(2).as_subclass(Told)) == 2
    odd = SimpleNamespace(numel=lambda: "many"), iter([torch.ones(2)])
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.ones(2)
    itself = []
    itself.append(itself)
    for batch in (fake, odd, itself, [], None, list(range(100_000)), 3):
        assert size_of(batch) is None


def test_modules_with_methods_of_their_own_by_pytorch_s_names_are_watched():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def named_parameters(self):
            return self.inner.named_parameters()

        def named_modules(self):
            return iter([])

        def register_forward_pre_hook(self, hook):
            return super().register_forward_pre_hook(hook)

        def register_forward_hook(self, hook):
            return super().register_forward_hook(hook)

        def forward(self, given):
            return self.inner(given)

    began = []
    told = SimpleNamespace(forward_begins=lambda module, **_: began.append(module), forward_ends=lambda _: None)
    model = Narrow()
    gc.collect()
    assert model in WatchedModules(lambda: told).find()
    model(torch.ones(1, 1))
    assert began == [model]


def test_containers_that_reach_each_other_and_inference_tensors_are_no_trouble():
    agent, buffer = nn.Module(), nn.Module()
    agent.net = nn.Linear(1, 1)
    system = nn.ModuleList([agent])
    agent.buffer, buffer.agent = buffer, agent
    with torch.inference_mode():
        teacher = nn.Linear(1, 1)
    gc.collect()
    watched = WatchedModules(lambda: None)
    found = watched.find()
    assert teacher in found
    assert system not in found
    assert isinstance(watched.weights(), int)


def test_a_graph_that_is_traced_through_a_watched_model_is_as_without():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, given):
            return self.inner(given)

    told = SimpleNamespace(
        forward_begins=lambda _, **given: watched.size_of(given["batch"]), forward_ends=lambda _: None
    )
    watched = WatchedModules(lambda: told)
    inner = nn.Linear(2, 2)
    plain = [node.op for node in torch.fx.symbolic_trace(Wrapper(nn.Sequential(inner))).graph.nodes]
    gc.collect()
    assert inner in watched.find()
    assert [node.op for node in torch.fx.symbolic_trace(Wrapper(nn.Sequential(inner))).graph.nodes] == plain


def test_a_module_that_took_over_the_hooks_of_a_watched_one_is_scripted():
    told = SimpleNamespace(forward_begins=lambda *_, **__: None, forward_ends=lambda _: None)
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    gc.collect()
    watched = WatchedModules(lambda: told)
    watched.find()
    other._forward_hooks, other._forward_pre_hooks = (
        OrderedDict(model._forward_hooks),
        OrderedDict(model._forward_pre_hooks),
    )
    with watched.unwatched(other):
        torch.jit.script(other)


def test_a_watched_model_is_converted_in_its_place():
    model = nn.Linear(2, 2)
    gc.collect()
    watched = WatchedModules(lambda: SimpleNamespace(forward_begins=lambda *_, **__: None, forward_ends=lambda _: None))
    watched.find()
    before = watched.weights()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        model.weight.add_(1)
    assert watched.weights() != before


def test_parameters_that_stand_in_for_a_call_are_no_change_of_the_weights():
    model = nn.Linear(2, 2)
    gc.collect()
    told = SimpleNamespace(forward_begins=lambda *_, **__: seen.append(watched.weights()), forward_ends=lambda _: None)
    watched, seen = WatchedModules(lambda: told), []
    watched.find()
    before = watched.weights()
    torch.func.functional_call(model, {"weight": torch.ones(2, 2).add_(1)}, torch.ones(1, 2))
    assert seen == [before]


KEPT = nn.Linear(1, 1)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_model_of_another_test_has_no_hook_of_these(nth):
    assert not KEPT._forward_pre_hooks
    assert KEPT in WatchedModules(SimpleNamespace).find()
    assert KEPT._forward_pre_hooks
