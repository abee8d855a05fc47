"""How often Slurm is asked while something is followed: soon at first, then ever less."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import Target
from hpcmm.jobs.state import State, states_of

FIRST_S, LONGEST_S, GROWTH = 2.0, 30.0, 1.3


class Poller:
    """The targets' state, asked for in one call, and not again before its pause is over.

    A controller that does not answer is asked again, ever less often; the last state is kept meanwhile.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        ask: Callable[[Sequence[Target]], list[State]] = states_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._targets = targets
        self._ask = ask
        self._clock = clock
        self._pause_s = FIRST_S
        self._next = clock()
        self.states: list[State] = []
        self.complaint: str | None = None
        """Why the last question was not answered; None when it was."""

    def poll(self) -> list[State]:
        """The newest state; asks only when it is time to. Raises HpcmmError where even the first question fails."""
        if self._clock() < self._next:
            return self.states
        before = [[(job.job_id, job.state) for job in state.jobs] for state in self.states]
        try:
            self.states, self.complaint = self._ask(self._targets), None
        except HpcmmError as error:
            if not self.states:
                raise
            self.complaint = str(error)
        now = [[(job.job_id, job.state) for job in state.jobs] for state in self.states]
        self._pause_s = FIRST_S if now != before else min(LONGEST_S, self._pause_s * GROWTH)
        self._next = self._clock() + self._pause_s
        return self.states

    @property
    def over(self) -> bool:
        return not any(state.active for state in self.poll())
