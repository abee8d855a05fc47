"""What the toolkit asks of a workload without torch: its keys, its preparation, and the way to its half with torch."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpcmm.config.mesh import DATA
from hpcmm.config.parts import TARGET, import_class, options_of, own_error, own_folders, read_config_yaml
from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError

if TYPE_CHECKING:
    import torch

    from hpcmm.config.model_shape import ModelShape
    from hpcmm.evaluate.evaluation import Evaluation
    from hpcmm.serve.served import ServedModel
    from hpcmm.train.workload import Training


class Workload(ABC):
    """A kind of training that the toolkit can launch. A new workload subclasses it, in a module that imports neither
    torch nor other heavy packages at its top: login-node commands import it, and so does the start of every rank.

    ``config`` is an object of :attr:`schema` everywhere. Each method imports what is heavy itself.
    """

    schema: type[RunConfig] = RunConfig
    """The keys of a run: the toolkit's own, and in a subclass of ``RunConfig`` the workload's."""

    def problems(self, config: Any) -> Iterator[str]:  # noqa: ARG002 -- for those who override it
        """A sentence for each thing that is wrong with the workload's keys, before anything is submitted: what is
        wrong, and what to do. Runs on the login node, which may not see the files of the compute nodes."""
        return iter(())

    def given_paths(self, config: Any) -> Mapping[str, str | None]:  # noqa: ARG002
        """Files and folders that the user named, by their key (``data.root``); None for what was not given.

        The job's preparation ends the job with one sentence if one cannot be read. ``~`` is the user's home.
        """
        return {}

    def prepare(self, config: Any) -> None:  # noqa: B027 -- a hook, not a duty
        """Make what all ranks need and is not there yet (a converted model, generated data), and print a line on it.

        Called once a job, on one node, before the ranks start, while no other job of the same cache folder prepares.
        Raises HpcmmError, of data that cannot be used :class:`hpcmm.errors.InputError`; the job then ends.
        """

    def notes_on_start(self, config: Any, before: Mapping[str, Any]) -> Iterator[str]:  # noqa: ARG002
        """Said at launch of a run that takes another run's trained weights, ``before`` being that run's configuration.

        Each is the rest of a sentence that begins with that run's folder. Its values are untrusted: of any type.
        """
        return iter(())

    def problems_on_start(self, config: Any, before: Mapping[str, Any]) -> Iterator[str]:  # noqa: ARG002
        """As :meth:`notes_on_start`, of what refuses the launch: weights that do not fit this run's model.

        What it cannot know, a rank finds.
        """
        return iter(())

    def axes(self, config: Any) -> frozenset[str]:  # noqa: ARG002
        """The axes of ``parallel.mesh`` that its model can be cut along: see :meth:`Training.structure`.

        Default: ``data`` alone, which any model can.
        """
        return frozenset({DATA})

    def model_shape(self, config: Any) -> ModelShape | None:  # noqa: ARG002
        """The sizes of its transformer, as far as this machine can know them without torch; None if it cannot."""
        return None

    def is_finished(self, config: Any, steps_done: int) -> bool:
        """Whether a run with a checkpoint after ``steps_done`` steps has nothing left to do.

        A profiler would record nothing if it was started again. Default: ``train.steps`` steps are done.
        """
        return steps_done >= int(config.train.steps)

    @abstractmethod
    def training_class(self) -> type[Training]:
        """Import the half with torch, and return its class. Called on a rank, once DeepSpeed may be imported."""

    def training(self, config: Any, device: torch.device) -> Training:
        """Model, data and loss of this rank, for :func:`hpcmm.train.loop.train`.

        All ranks call it together, in the process group. ``device`` is the rank's own. Raises HpcmmError for values
        and files that cannot be used.
        """
        return self.training_class()(config, device)

    def evaluation(self) -> Evaluation | None:
        """How ``hpcmm.evaluate`` scores its runs; None if it cannot."""
        return None

    def served(self) -> ServedModel | None:
        """The page that ``hpcmm.serve`` shows of its runs; None if there is none."""
        return None


def workload_of(config: RunConfig) -> Workload | None:
    """The workload that the run trains; None for a script or a function of the user's."""
    return None if config.task._target_ is None else load_workload(config.task._target_)


def shipped_workloads() -> list[Workload]:
    """Every workload that a task of hpcmm's own ``conf/task`` names."""
    (folder,) = own_folders()
    tasks = [read_config_yaml(folder / "task" / f"{name}.yaml") for name in options_of("task", [folder])]
    targets = [task["task"][TARGET] for task in tasks if isinstance(task.get("task"), dict)]
    return [load_workload(target) for target in targets]


def load_workload(target: str) -> Workload:
    """The workload whose class is ``package.module.Class``.

    Raises HpcmmError if there is no such class, or it is not a subclass of :class:`Workload`.
    """
    had_torch = "torch" in sys.modules
    found = import_class(target)
    if "torch" in sys.modules and not had_torch:
        print(
            f"hpcmm: {found.__module__} imports torch at its top, so every command waits for that: import it in the "
            "methods that need it.",
            file=sys.stderr,
        )
    if not issubclass(found, Workload):
        raise HpcmmError(f"{target} is not a workload: it must be a subclass of hpcmm.config.workload.Workload.")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise HpcmmError(f"{target} lacks {', '.join(missing)}, which each workload must have: see docs/workloads.md.")
    try:
        workload = found()
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise HpcmmError(f"{target} cannot be made: {own_error(error)}.") from error
    schema = workload.schema
    if not (isinstance(schema, type) and issubclass(schema, RunConfig) and "__dataclass_fields__" in vars(schema)):
        raise HpcmmError(f"{target}.schema must be a subclass of hpcmm.config.schema.RunConfig, and a @dataclass.")
    return workload
