"""Steps and phases of a program that names none, and how they give way to those that it names."""

from threading import Thread
from types import SimpleNamespace

import pytest

from hpcmm import annotate
from hpcmm.annotate import auto_steps, ranges
from hpcmm.annotate.auto_steps import AutomaticRanges


class Module:
    def __init__(self):
        self.training = True


class Program:
    """Does what a training loop does, and keeps what NVTX was told: ``(`` and ``)`` around what lies in a range."""

    def __init__(self, monkeypatch, optimizers=1):
        self.said, self.open, self.looked = [], [], []
        for module in (ranges, auto_steps):
            monkeypatch.setattr(module, "push", self._push)
            monkeypatch.setattr(module, "pop", self._pop)
        monkeypatch.setattr(auto_steps, "tell_rank", lambda: None)
        monkeypatch.setattr(ranges, "tell_rank", lambda: None)
        monkeypatch.setattr(ranges, "_ATTACHED", True)
        self.weights, self.sizes = 0, {}
        watched = SimpleNamespace(
            find=lambda: self._look("find"),
            descend=lambda: self._look("descend"),
            weights=lambda: self.weights,
            size_of=self.sizes.get,
        )
        self.ranges = AutomaticRanges(lambda: optimizers, watched)
        monkeypatch.setattr(ranges, "_automatic", self.ranges)
        self.model = Module()

    def _push(self, opened):
        name = {"step (automatic)": f"auto{opened.payload}", "step": f"step{opened.payload}"}.get(opened.name)
        self.open.append(opened)
        self.said.append(f"({name or opened.name}")

    def _pop(self):
        self.open.pop()
        self.said.append(")")

    def _look(self, how):
        self.looked.append(how)
        return [self.model]

    @property
    def text(self):
        return " ".join(self.said).replace(" )", ")")

    def fetch(self, loader=1, *, exhausted=False, grad=True):
        is_phase = self.ranges.fetch_begins(loader, grad=grad)
        self.ranges.fetch_ends(loader, is_phase=is_phase, exhausted=exhausted)

    def forward(self, *, grad=True):
        self.ranges.forward_begins(self.model, grad=grad)
        self.ranges.forward_ends(self.model)

    def backward(self):
        if self.ranges.backward_begins():
            self.ranges.backward_ends()

    def update(self, optimizer=1):
        self.ranges.update_begins(optimizer)
        self.ranges.update_ends(optimizer)

    def train(self, optimizer=1):
        self.forward()
        self.backward()
        self.update(optimizer)


@pytest.fixture
def program(monkeypatch):
    return Program(monkeypatch)


WHOLE = "(forward) (backward) (optimizer)"


def test_a_step_is_the_loop_s_body_and_the_fetching_of_the_next_batch(program):
    program.fetch()
    for exhausted in (False, False, True):
        program.train()
        program.fetch(exhausted=exhausted)
    first = "(auto0 (backward) (optimizer) (data))"
    assert program.text.removeprefix("(forward) ") == (f"{first} (auto1 {WHOLE} (data)) (auto2 {WHOLE} (data))")


def test_without_a_loader_a_step_ends_when_the_next_forward_pass_begins(program):
    for _ in range(3):
        program.train()
    assert f"(auto1 {WHOLE}) (auto2 {WHOLE}" in program.text


def test_micro_batches_of_one_update_are_one_step(program):
    for number in range(6):
        program.forward()
        program.backward()
        if number % 2:
            program.update()
    assert "(auto1 (forward) (backward) (forward) (backward) (optimizer)) (auto2" in program.text


def test_an_optimizer_that_is_called_for_each_group_of_parameters_steps_once(program):
    for _ in range(3):
        program.forward()
        program.backward()
        program.update()
        program.update()
    assert "(auto1 (forward) (backward) (optimizer) (optimizer)) (auto2" in program.text


def test_two_optimizers_in_turn_make_one_step(monkeypatch):
    program = Program(monkeypatch, optimizers=2)
    for _ in range(4):
        program.train(1)
        program.train(2)
    assert f"(auto1 {WHOLE} {WHOLE}) (auto2 {WHOLE} {WHOLE}) (auto3" in program.text


def test_an_optimizer_that_steps_more_often_than_another_one_does_not_end_the_step(monkeypatch):
    program = Program(monkeypatch, optimizers=2)
    for number in range(24):
        program.train(1)
        if number % 3 == 2:
            program.train(2)
    assert f"(auto5 {WHOLE} {WHOLE} {WHOLE} {WHOLE}) (auto6" in program.text


def test_after_a_phase_with_another_optimizer_the_first_one_ends_the_steps_again(program):
    for optimizer in (1, 1, 2, 2, 1, 1, 1, 1):
        program.train(optimizer)
    assert f"(auto5 {WHOLE}) (auto6" in program.text


def test_a_step_without_an_update_after_an_overflow_is_a_step(program):
    for number in range(4):
        program.forward()
        program.backward()
        program.ranges.update_begins(1)
        if number == 2:
            program.ranges.skipped(1)
        program.ranges.update_ends(None if number == 2 else 1)
    assert f"(auto2 {WHOLE}) (auto3" in program.text


def test_an_optimizer_that_calls_for_gradients_itself_has_them_before_its_phase(program):
    for _ in range(3):
        program.ranges.update_begins(1, closure=True)
        program.forward()
        program.backward()
        program.ranges.closure_ends()
        program.ranges.update_ends(1, closure=True)
    assert f"(auto1 {WHOLE}) (auto2 {WHOLE}" in program.text


def test_optimizers_that_step_within_the_backward_pass_end_a_step(program):
    for _ in range(3):
        program.forward()
        program.ranges.backward_begins()
        program.update()
        program.ranges.backward_ends()
    assert "(auto1 (forward) (backward)) (auto2 (forward) (backward)" in program.text


def test_evaluation_makes_no_step_and_no_phase(program):
    program.fetch()
    program.train()
    program.fetch()
    for mode_alone in (False, True):
        program.train()
        said = len(program.said)
        program.model.training = False
        program.fetch(loader=2, grad=mode_alone)
        program.forward(grad=mode_alone)
        program.fetch(loader=2, exhausted=True, grad=mode_alone)
        program.model.training = True
        assert program.said[said:] == []
        program.fetch()
    assert program.text.endswith("(data)) (auto3")


def test_the_program_s_own_steps_replace_the_automatic_ones_also_if_they_come_late(program):
    program.train()
    program.train()
    for number in (7, 8):
        with annotate.step(number):
            program.train()
    program.train()
    assert program.text.endswith(f"(auto1 {WHOLE}) (step7 {WHOLE}) (step8 {WHOLE}) {WHOLE}")


def test_within_the_program_s_own_phases_no_automatic_one_is_shown(program):
    program.train()
    with annotate.phase("mine"):
        program.train()
    program.train()
    assert program.text.endswith(f"(mine (auto1)) (auto2 {WHOLE}")


def test_a_phase_of_the_program_s_own_interrupts_an_automatic_one(program):
    program.train()
    program.ranges.forward_begins(program.model, grad=True)
    with annotate.phase("encoder"):
        pass
    program.ranges.forward_ends(program.model)
    assert program.text.endswith("(auto1 (forward) (encoder) (forward)")


def test_a_forward_pass_that_raised_is_over_when_the_next_batch_is_fetched(program):
    program.train()
    program.ranges.forward_begins(program.model, grad=True)
    program.fetch()
    program.train()
    assert program.text.endswith(f"(auto1 (forward) {WHOLE}")


def test_gradients_that_an_engine_exchanges_behind_the_backward_pass_belong_to_it_and_within_its_step_to_that(program):
    program.train()
    program.forward()
    program.backward()
    assert program.ranges.exchange_begins()
    program.ranges.backward_ends()
    program.ranges.update_begins(1)
    assert not program.ranges.exchange_begins()
    program.ranges.update_ends(1)
    assert program.text.endswith("(auto1 (forward) (backward) (backward) (optimizer)")


def test_a_forward_pass_carries_the_size_of_its_batch_once(program):
    program.train()
    program.sizes["batch"] = 8
    begun = []
    for given in ("batch", "nothing that tells it"):
        program.ranges.forward_begins(program.model, grad=True, batch=given)
        begun.append(program.open[-1].payload)
        with annotate.phase("loss"):
            pass
        begun.append(program.open[-1].payload)
        program.ranges.forward_ends(program.model)
    assert begun == [8, None, None, None]


def test_the_first_message_that_a_pipeline_stage_receives_begins_its_next_step(program):
    for _ in range(3):
        for _ in range(2):
            ranges.receive_begins()
            program.forward()
        for _ in range(2):
            ranges.receive_begins()
            program.backward()
        program.update()
        program.said.append("logs")
    ranges.receive_begins()
    micro = "(forward) (forward) (backward) (backward) (optimizer) logs"
    assert program.text.endswith(f"(auto1 {micro}) (auto2 {micro}) (auto3")


def test_what_an_optimizer_or_a_backward_pass_receives_begins_nothing(program):
    program.train()
    program.train()
    program.ranges.update_begins(2)
    ranges.receive_begins()
    program.ranges.update_ends(2)
    assert program.text.endswith("(optimizer) (optimizer)")


def test_modules_are_looked_for_at_the_first_update_and_within_them_if_none_is_called(program):
    program.backward()
    program.update()
    assert program.looked == ["find"]
    for _ in range(2):
        program.backward()
        program.update()
    program.backward()
    assert program.looked == ["find", "descend", "descend"]


def test_weights_that_change_tell_of_updates_that_no_optimizer_tells_of(monkeypatch):
    program = Program(monkeypatch, optimizers=0)
    for number in range(8):
        program.forward()
        program.backward()
        program.weights += number % 2
    assert program.text.endswith(
        "(auto1 (forward) (backward) (forward) (backward)) (auto2 (forward) (backward) (forward) (backward)) "
        "(auto3 (forward) (backward) (forward) (backward)"
    )


def test_once_an_optimizer_has_stepped_weights_tell_nothing(program):
    for number in range(8):
        program.forward()
        program.backward()
        if number % 2:
            program.update()
            program.weights += 1
        elif number:
            program.weights += 1  # as a penalty on them, or their average, may do
    assert "(auto2 (forward) (backward) (forward) (backward) (optimizer)) (auto3" in program.text
    assert program.text.count("(auto") == 4


def test_without_an_optimizer_there_are_no_steps(monkeypatch):
    program = Program(monkeypatch, optimizers=0)
    for _ in range(3):
        program.forward()
        program.backward()
    assert "auto" not in program.text


@pytest.mark.parametrize("begin", [0, 20], ids=["from the first on", "late"])
def test_an_optimizer_that_steps_now_and_then_ends_no_iteration(monkeypatch, begin):
    program = Program(monkeypatch, optimizers=2)
    for iteration in range(100):
        program.train(1)
        if iteration >= begin and iteration % 20 == 0:
            program.train(2)
    assert program.text.count("(auto") >= 95


def test_a_second_stage_with_an_optimizer_of_its_own_loses_no_step(monkeypatch):
    program = Program(monkeypatch, optimizers=2)
    for stage in (1, 2):
        for _ in range(50):
            program.train(stage)
    assert program.text.count("(auto") >= 99


def test_an_optimizer_that_moves_its_weights_between_calls_for_gradients_has_one_step(program):
    for _ in range(3):
        program.ranges.update_begins(1, closure=True)
        for _ in range(4):
            program.forward()
            program.backward()
            program.ranges.closure_ends()
            program.weights += 1
        program.ranges.update_ends(1, closure=True)
    assert program.text.count("(auto") == 3


def test_a_closure_that_raised_leaves_the_steps_that_follow_whole(program):
    program.train()
    for _ in range(2):
        program.ranges.update_begins(1, closure=True)  # its exception keeps the end of the update from us
    for _ in range(2):
        program.fetch()
        program.ranges.update_begins(1, closure=True)
        program.forward()
        program.backward()
        program.ranges.closure_ends()
        program.ranges.update_ends(1, closure=True)
    assert program.text.endswith(f"(auto1 {WHOLE} (data)) (auto2 {WHOLE}")


def test_the_gradients_of_an_attack_on_inputs_say_nothing_of_the_mode_of_training(program):
    for _ in range(3):
        program.model.training = False
        program.forward()
        if program.ranges.backward_begins(accumulates=False):
            program.ranges.backward_ends()
        program.model.training = True
        program.train()
    assert program.text.endswith("(backward) (forward) (backward) (optimizer)")


def test_after_an_error_on_another_thread_the_own_one_ends_what_is_open(program):
    program.train()
    thread = Thread(target=program.ranges.give_up, args=(RuntimeError("there"),))
    thread.start()
    thread.join()
    assert len(program.open) == 1
    program.forward()
    assert program.open == []


def test_an_error_of_the_automatic_ranges_is_told_and_ends_them_alone(program, capsys):
    program.train()
    program.ranges.fetch_begins(1, grad=True)
    del program.ranges._modules.weights, program.ranges._modules.size_of
    with annotate.phase("own"):
        program.forward()
        program.train()
    assert program.open == []
    assert "(own" in program.text
    assert "(forward" not in program.text.partition("(own")[2]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("hpcmm: automatic steps and phases end here (AttributeError")
