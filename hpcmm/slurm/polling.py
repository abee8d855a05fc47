"""How often Slurm is asked while something is followed: soon at first, then ever less."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from hpcmm.errors import HpcmmError
from hpcmm.slurm.commands import SilentError
from hpcmm.slurm.jobs import UnknownJobError

FIRST_S, LONGEST_S, GROWTH = 2.0, 30.0, 1.3
_MOST_DENIALS = 5
"""Answers in a row that say that there is no such job."""
_READ_S = 0.5

Answer = TypeVar("Answer")


class Poller(Generic[Answer]):
    """An answer of Slurm's that is asked for again, and not before its pause is over.

    The pause grows from ``first_s`` to ``longest_s``, and starts anew after a change of what ``essence`` returns of the
    answer. A controller that does not answer is asked again, ever less often; the last answer is kept meanwhile.
    ``known`` is an answer that is there already: then even the first question may fail, and waits for its pause.
    ``tell`` gets each new complaint, a sentence, once.
    """

    def __init__(
        self,
        ask: Callable[[], Answer],
        essence: Callable[[Answer], object],
        *,
        known: Answer | None = None,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        tell: Callable[[str], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._tell = tell
        self._essence = essence
        self._answer = known
        self._first_s, self._longest_s = first_s, longest_s
        self._clock = clock
        self._pause_s = first_s
        self._next = clock() + (0.0 if known is None else first_s)
        self._denials = 0
        self._no_answer_yet: HpcmmError | None = None
        self.complaint: str | None = None
        """Why the last question was not answered; None when it was."""

    def poll(self) -> Answer:
        """The newest answer; asks only when it is time to.

        Raises HpcmmError if even the first question fails, and UnknownJobError if Slurm has answered several times in
        a row that it knows no such job: its accounting may hear of a job some seconds after the queue has lost it.
        """
        if self._clock() < self._next:
            if self._answer is not None:
                return self._answer
            if self._no_answer_yet is not None:
                raise self._no_answer_yet
        before = None if self._answer is None else self._essence(self._answer)
        try:
            answer = self._asked()
        except HpcmmError as error:
            self._no_answer_yet = error
            self._grow_pause()
            raise
        if self.complaint is None and self._essence(answer) != before:
            self._pause_s = self._first_s
            self._next = self._clock() + self._pause_s
        else:
            self._grow_pause()
        return answer

    def is_done(self, done: Callable[[Answer], bool]) -> bool:
        """What ``done`` says of the newest answer; False as long as Slurm has given none, but may.

        Raises HpcmmError as :meth:`poll` does, but for the first question only if it does not help to ask it again.
        """
        try:
            answer = self.poll()
        except HpcmmError as error:
            if self._answer is not None or not self._may_answer(error):
                raise
            return False
        return done(answer)

    def wait(self, done: Callable[[Answer], bool], timeout_s: float = math.inf) -> Answer:
        """Poll until ``done`` says so of the answer, or ``timeout_s`` seconds are over. Returns the newest answer.

        Raises HpcmmError as :meth:`is_done` does, and if there was no answer in all the time.
        """
        until = self._clock() + timeout_s
        while not self.is_done(done) and (left_s := until - self._clock()) > 0:
            time.sleep(min(_READ_S, left_s))
        return self._answer if self._answer is not None else self.poll()

    def _asked(self) -> Answer:
        try:
            self._answer, self.complaint, self._denials = self._ask(), None, 0
        except HpcmmError as error:
            self._denials = self._denials + 1 if isinstance(error, UnknownJobError) else 0
            if str(error) != self.complaint and self._may_answer(error):
                self._tell(str(error))
            self.complaint = str(error)
            if self._answer is None or self._denials >= _MOST_DENIALS:
                raise
        return self._answer

    def _may_answer(self, error: HpcmmError) -> bool:
        """Whether it makes sense to ask again. A question that was answered once is none to refuse."""
        if isinstance(error, UnknownJobError):
            return self._denials < _MOST_DENIALS
        return self._answer is not None or (isinstance(error, SilentError) and not error.lasting)

    def _grow_pause(self) -> None:
        self._pause_s = min(self._longest_s, self._pause_s * GROWTH)
        self._next = self._clock() + self._pause_s
