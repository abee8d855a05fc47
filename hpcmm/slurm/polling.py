"""How often Slurm is asked while something is followed: soon at first, then ever less."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from hpcmm.errors import HpcmmError
from hpcmm.slurm.jobs import UnknownJobError

FIRST_S, LONGEST_S, GROWTH = 2.0, 30.0, 1.3
_MOST_DENIALS = 5
_READ_S = 0.5

Answer = TypeVar("Answer")


class Poller(Generic[Answer]):
    """An answer of Slurm's that is asked for again, and not before its pause is over.

    The pause grows from ``first_s`` to ``longest_s``, and starts anew after a change of what ``essence`` returns of the
    answer. A controller that does not answer is asked again, ever less often; the last answer is kept meanwhile.
    ``known`` is an answer that is there already: then even the first question may fail, and waits for its pause.
    """

    def __init__(
        self,
        ask: Callable[[], Answer],
        essence: Callable[[Answer], object],
        *,
        known: Answer | None = None,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._essence = essence
        self._answer = known
        self._first_s, self._longest_s = first_s, longest_s
        self._clock = clock
        self._pause_s = first_s
        self._next = clock() + (0.0 if known is None else first_s)
        self._denials = 0
        self.complaint: str | None = None
        """Why the last question was not answered; None when it was."""

    def poll(self) -> Answer:
        """The newest answer; asks only when it is time to.

        Raises HpcmmError if even the first question fails, and UnknownJobError if Slurm has answered several times in
        a row that it knows no such job: its accounting may hear of a job some seconds after the queue has lost it.
        """
        if self._clock() < self._next and self._answer is not None:
            return self._answer
        before = None if self._answer is None else self._essence(self._answer)
        answer = self._asked()
        self._pause_s = (
            self._first_s
            if self.complaint is None and self._essence(answer) != before
            else min(self._longest_s, self._pause_s * GROWTH)
        )
        self._next = self._clock() + self._pause_s
        return answer

    def wait(self, done: Callable[[Answer], bool], timeout_s: float = math.inf) -> Answer:
        """Poll until ``done`` says so of the answer, or ``timeout_s`` seconds are over. Returns the newest answer."""
        until = self._clock() + timeout_s
        while not done(answer := self.poll()) and (left_s := until - self._clock()) > 0:
            time.sleep(min(_READ_S, left_s))
        return answer

    def _asked(self) -> Answer:
        try:
            self._answer, self.complaint, self._denials = self._ask(), None, 0
        except HpcmmError as error:
            self._denials = self._denials + 1 if isinstance(error, UnknownJobError) else 0
            if self._answer is None or self._denials >= _MOST_DENIALS:
                raise
            self.complaint = str(error)
        return self._answer
