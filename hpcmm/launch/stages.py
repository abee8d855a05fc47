"""A launch of stages: all are checked first, then each is written and queued behind the one before.

A stage starts from the weights of the stage before, and only if that has completed.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hpcmm.config.schema import Executor
from hpcmm.config.stages import compose_stages
from hpcmm.errors import HpcmmError
from hpcmm.launch.interpreter import require_packages
from hpcmm.launch.plan import Plan, dry_run_text, plan

if TYPE_CHECKING:
    from hpcmm.launch.submit import Submission


@dataclass(frozen=True)
class PlannedStage:
    """A launch that is checked, with the name of its stage; empty for one without stages."""

    name: str
    planned: Plan


def plan_stages(words: Sequence[str]) -> list[PlannedStage]:
    """Compose and check all that ``words`` ask for: a run or a sweep, or the stages, of which nothing is on disk yet.

    Raises HpcmmError for the first that is wrong.
    """
    found: list[PlannedStage] = []
    for stage in compose_stages(words):
        before = found[-1].planned if found else None
        try:
            planned = plan(stage.points, stage.words, before)
        except HpcmmError as error:
            if not stage.name:
                raise
            raise HpcmmError(f"At the stage {stage.name}: {error}") from error
        found.append(PlannedStage(stage.name, _after(planned, before)))
    return found


def _after(planned: Plan, before: Plan | None) -> Plan:
    """With the name of the run that it waits for, where there is a queue."""
    if before is None or planned.config.cluster.executor is Executor.local:
        return planned
    points = tuple(replace(point, config=replace(point.config, after=before.run.root.name)) for point in planned.points)
    return replace(planned, points=points)


def dry_run_of(stages: Sequence[PlannedStage]) -> str:
    """What a dry run prints: of each stage its script, and what its ranks run."""
    texts = []
    for stage in stages:
        own = f"# stage {stage.name}: {shlex.join(stage.planned.overrides)}\n" if stage.name else ""
        texts.append(own + dry_run_text(stage.planned))
    return "\n".join(texts)


def launch_stages(stages: Sequence[PlannedStage], show: Callable[[str, Submission], int]) -> int:
    """Write and queue all stages, and ``show`` each, by its name. Returns the first exit status that is not 0.

    Raises HpcmmError if one is not accepted; those before it stay.
    """
    for stage in stages:
        require_packages(stage.planned.config, stage.planned.interpreter)
    if stages[0].planned.config.cluster.executor is Executor.local:
        return _one_by_one(stages, show)
    queued: list[tuple[str, Submission]] = []
    for stage in stages:
        planned = stage.planned
        if queued:
            job = replace(planned.job, after=queued[-1][1].job_id)
            planned = replace(planned, job=job, arrays=(job,))
        try:
            queued.append((stage.name, _submitted(planned)))
        except HpcmmError as error:
            if not queued:
                raise
            said = ", ".join(f"{name} (job {submission.job_id})" for name, submission in queued)
            last = shlex.quote(queued[-1][1].run.root.name)
            raise HpcmmError(
                f"At the stage {stage.name}: {error} The stages before it are queued and stay: {said}. To queue the "
                f"rest behind them, launch it with after={last} train.init_from={last}."
            ) from error
    for place, (name, submission) in enumerate(queued):
        if status := show(name, submission):
            _say_what_does_not_start(name, [later for later, _ in queued[place + 1 :]])
            return status
    return 0


def _submitted(planned: Plan) -> Submission:
    from hpcmm.launch.submit import submit  # noqa: PLC0415 -- submitit, which a dry run does not need
    from hpcmm.launch.write import write  # noqa: PLC0415

    write(planned)
    return submit(planned)


def _one_by_one(stages: Sequence[PlannedStage], show: Callable[[str, Submission], int]) -> int:
    """Without a queue: each starts when the one before has completed, which ``show`` waits for.

    All are written at once, so that the last runs the code of now though it may begin in hours. What does not start is
    removed again.
    """
    from hpcmm.launch.submit import submit  # noqa: PLC0415 -- as above
    from hpcmm.launch.write import write  # noqa: PLC0415

    left = [stage.planned.run.root for stage in stages]
    try:
        for stage in stages:
            write(stage.planned)
        for place, stage in enumerate(stages):
            submission = submit(stage.planned)
            left.remove(stage.planned.run.root)
            if status := show(stage.name, submission):
                _say_what_does_not_start(stage.name, [later.name for later in stages[place + 1 :]])
                return status
    finally:
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _say_what_does_not_start(name: str, later: Sequence[str]) -> None:
    if later:
        print(f"hpcmm: stage {name} did not complete, so {' and '.join(later)} will not start.", file=sys.stderr)
