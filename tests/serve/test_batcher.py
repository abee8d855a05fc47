"""The batching of requests: their own answers, bounded batches and queue, and no harm from another's failure."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import CancelledError, Future

import pytest

from hpcmm.serve.service import Batcher, BusyError


class Squares:
    """A model that squares numbers, keeps the sizes of its batches, and can be held."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers):
        self.gate.wait(10)
        self.sizes.append(len(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError("below zero")
        return [number * number for number in numbers]


@pytest.fixture
def model():
    return Squares()


def batcher_of(model, most=4, wait_s=0.05, waiting=16):
    return Batcher(model, most=most, wait_s=wait_s, waiting=waiting)


def held(model, batcher):
    """A batcher whose thread is busy with one request, so that others gather behind it."""
    model.gate.clear()
    first = batcher.submit(1)
    while first.running() is False:
        time.sleep(0.001)
    time.sleep(0.1)  # beyond the time that it waits for others
    return first


def test_each_gets_the_answer_to_its_own_request_in_batches_that_are_bounded(model):
    batcher = batcher_of(model)
    held(model, batcher)
    futures = [batcher.submit(number) for number in range(10)]
    model.gate.set()
    assert [future.result(10) for future in futures] == [number * number for number in range(10)]
    assert model.sizes == [1, 4, 4, 2]
    batcher.close()


def test_who_is_alone_does_not_wait_for_others(model):
    batcher = batcher_of(model, wait_s=1000)
    assert [batcher.submit(number).result(60) for number in (3, 4)] == [9, 16]
    batcher.close()


def test_after_a_batch_the_first_waits_for_as_many_as_were_in_it_and_no_longer_than_it_may(model):
    batcher = batcher_of(model, wait_s=1)
    held(model, batcher)
    together = [batcher.submit(number) for number in range(3)]
    model.gate.set()
    assert [future.result(10) for future in together] == [0, 1, 4]
    began = time.monotonic()
    first, second = batcher.submit(1), batcher.submit(2)
    assert (first.result(60), second.result(60)) == (1, 4)
    assert time.monotonic() - began > 0.9
    assert model.sizes == [1, 3, 2]
    batcher.close()


def test_a_full_batch_does_not_wait(model):
    batcher = batcher_of(model, most=1, wait_s=1000)
    assert [batcher.submit(number).result(60) for number in range(3)] == [0, 1, 4]
    batcher.close()


def test_one_that_fails_leaves_the_others_their_answers(model):
    batcher = batcher_of(model)
    held(model, batcher)
    futures = [batcher.submit(number) for number in (2, -1, 3)]
    model.gate.set()
    assert (futures[0].result(10), futures[2].result(10)) == (4, 9)
    with pytest.raises(ValueError, match="below zero"):
        futures[1].result(10)
    assert batcher.submit(5).result(10) == 25
    batcher.close()


def test_a_model_that_answers_too_few_fails_those_alone_and_the_next_is_answered(model):
    batcher = batcher_of(lambda numbers: [] if 7 in numbers else list(numbers))
    failed = batcher.submit(7)
    with pytest.raises(ValueError, match="0 answers to 1 requests"):
        failed.result(10)
    assert batcher.submit(5).result(10) == 5
    batcher.close()


def test_beyond_the_bound_one_is_told_that_the_model_is_busy(model):
    batcher = batcher_of(model, waiting=3)
    held(model, batcher)
    waiting = [batcher.submit(number) for number in range(3)]
    with pytest.raises(BusyError, match="busy: 3 requests wait already"):
        batcher.submit(9)
    model.gate.set()
    assert [future.result(10) for future in waiting] == [0, 1, 4]
    batcher.close()


def test_who_has_gone_costs_the_model_nothing(model):
    batcher = batcher_of(model)
    held(model, batcher)
    futures: list[Future[int]] = [batcher.submit(number) for number in range(3)]
    assert futures[1].cancel()
    model.gate.set()
    assert (futures[0].result(10), futures[2].result(10)) == (0, 4)
    assert model.sizes == [1, 2]
    batcher.close()


def test_at_the_end_those_that_wait_are_let_go(model):
    batcher = batcher_of(model, most=1)
    held(model, batcher)
    waiting = [batcher.submit(number) for number in range(3)]
    threading.Timer(0.3, model.gate.set).start()
    batcher.close()
    with pytest.raises(CancelledError):
        waiting[-1].result(1)
    with pytest.raises(BusyError, match="ending"):
        batcher.submit(1)


def test_who_comes_while_it_closes_is_refused_or_let_go_and_never_left_waiting(model):
    for _ in range(20):
        batcher = batcher_of(model, waiting=10_000)
        taken: list[Future[int]] = []

        def ask_until_refused(batcher=batcher, taken=taken):
            with contextlib.suppress(BusyError):
                while True:
                    taken.append(batcher.submit(1))

        asking = [threading.Thread(target=ask_until_refused) for _ in range(4)]
        for thread in asking:
            thread.start()
        batcher.close()
        for thread in asking:
            thread.join()
        assert all(future.done() for future in taken)
