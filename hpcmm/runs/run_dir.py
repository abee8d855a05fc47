"""Where every file of a run lies, the run that a name means, and what its checkpoints are called.

No other module builds such a path.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hpcmm.annotate.stopping import STOP, STOPPED
from hpcmm.files import is_regular, names_in, read_text, write_whole
from hpcmm.runs.ownership import is_mine

JOB_ID = re.compile(r"[0-9]{1,12}(?:_[0-9]{1,9})?")
"""A job's number, or that of an array's task, as a run's files name it."""
_SCRIPT = re.compile(r"submission(?:_([1-9][0-9]{0,8}))?\.sh")
_MOST_ARRAYS = 1000
"""Of a sweep; hpcmm makes 100 at most."""
_MOST_OF_OTHERS = 10_000
"""Runs of other users in a folder."""
_POINT = re.compile(r"[0-9]{1,9}")
_CHECKPOINT = re.compile(r"step_([0-9]{1,15})")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, shared by the login node and all ranks."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved, frozen configuration."""
        return self.root / "config.yaml"

    @property
    def rank_settings(self) -> Path:
        """Of the configuration what the ranks need, as JSON, which Python reads by itself."""
        return self.root / "rank.json"

    @property
    def submission_script(self) -> Path:
        """The sbatch script, readable and submittable by hand."""
        return self.root / "submission.sh"

    @property
    def analysis_script(self) -> Path:
        """The sbatch script of the analysis that is queued behind the run."""
        return self.root / "analysis.sh"

    @property
    def submission(self) -> Path:
        """What the scheduler accepted, as JSON: the job's id, and that of the analysis behind it."""
        return self.root / "submission.json"

    @property
    def provenance(self) -> Path:
        """What the job was made from, as JSON: commits, packages, modules, hashes."""
        return self.root / "provenance.json"

    @property
    def code(self) -> Path:
        """The code as it was when the job was submitted, and which the job runs."""
        return self.root / "code"

    @property
    def exit_status(self) -> Path:
        """A line for each time that the batch script ended: the job's id, and its exit status, or ``stopped``,
        ``hung`` or ``terminated``; and one, ``restarted``, for each time that Slurm started it again."""
        return self.root / "exit_status"

    @property
    def cancelled(self) -> Path:
        """A line for each job that ``hpcmm.jobs cancel`` cancelled: its id, and how often Slurm had restarted it. Those
        of a sweep's points lie in the sweep's folder."""
        return self.root / "cancelled"

    @property
    def job_record(self) -> Path:
        """What the scheduler's accounting says of the job, as JSON."""
        return self.root / "job.json"

    @property
    def preflight(self) -> Path:
        """What the check of the nodes before the run found, as JSON."""
        return self.root / "preflight.json"

    @property
    def links(self) -> Path:
        """What the network links of each node carried while the ranks ran, a JSON file a node."""
        return self.root / "links"

    @property
    def staged(self) -> Path:
        """Where the copies of ``launch.stage`` lie on each node, and how long they took, as JSON."""
        return self.root / "staged.json"

    @property
    def submitit(self) -> Path:
        """submitit's own folder: the pickled task and each rank's result."""
        return self.root / "submitit"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def nsys(self) -> Path:
        return self.root / "nsys"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def newest_checkpoint(self) -> Path:
        """A file with the name of the newest checkpoint that is whole."""
        return self.checkpoints / "latest"

    @property
    def failures(self) -> Path:
        """What ranks that ended badly left, a folder for each time that the job ran; absent if none did."""
        return self.root / "failures"

    @property
    def stacks(self) -> Path:
        """Where the ranks stood when that was last asked, a folder for each time that the job ran."""
        return self.root / "stacks"

    @property
    def ended(self) -> Path:
        """Marks of ranks that ended well, a folder for each time that the job ran; removed if all of them did."""
        return self.root / "ended"

    @property
    def analysis(self) -> Path:
        return self.root / "analysis"

    @property
    def batch_log(self) -> Path:
        """Output of the batch script itself: preparation, srun's complaints."""
        return self.logs / "batch.log"

    @property
    def analysis_log(self) -> Path:
        """Output of the analysis that is queued behind the run."""
        return self.logs / "analysis.log"

    @property
    def evaluation(self) -> Path:
        """Scores on held-out data before and after training, as JSON."""
        return self.metrics / "evaluation.json"

    @property
    def stop_request(self) -> Path:
        """An empty file that asks the ranks to save a checkpoint and stop, made when Slurm gives warning of an end."""
        return self.root / STOP

    @property
    def settled(self) -> Path:
        """After how many steps, and why, the run ended before its last step: its metric had settled."""
        return self.root / "settled.json"

    @property
    def stopped(self) -> Path:
        """An empty file: the ranks stopped as asked, with a checkpoint, before the last step."""
        return self.root / STOPPED

    @property
    def attempts(self) -> Path:
        """JSON lines: one for each start of the job's script."""
        return self.root / "attempts.jsonl"

    @property
    def serving(self) -> Path:
        """What serving the run's model leaves: the log of requests, the threshold."""
        return self.root / "serving"

    @property
    def requests_log(self) -> Path:
        """JSON lines: one for each request to the served model."""
        return self.serving / "requests.jsonl"

    @property
    def threshold(self) -> Path:
        """The threshold that was chosen on held-out data, as JSON."""
        return self.serving / "threshold.json"

    @property
    def address(self) -> Path:
        """Where a job that serves a model listens, and its token, as JSON; there as long as it listens."""
        return self.root / "address.json"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank:04d}.log"

    def rank_metrics(self, rank: int) -> Path:
        """JSON lines: a ``start`` record (rank, node, job), then one record a step."""
        return self.metrics / f"rank_{rank:04d}.jsonl"

    def rank_report(self, rank: int) -> Path:
        """The rank's finished nsys report."""
        return self.nsys / f"rank_{rank:04d}.nsys-rep"

    def reports_before(self, attempt: int) -> Path:
        """Where reports of earlier attempts lie that ``attempt`` made anew."""
        return self.nsys / f"before_attempt_{attempt}"

    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is finished; False also where that cannot be seen."""
        return is_regular(self.newest_checkpoint)

    def create(self) -> None:
        """Make the folders, closed to other users since submitit's pickles lie within.

        Raises FileExistsError when the run directory is there already.
        """
        make_private(self.root)
        self.make_folders()

    def make_folders(self) -> None:
        """Make the folders in the run directory, which is there already."""
        for folder in (self.submitit, self.logs, self.nsys, self.metrics, self.checkpoints):
            folder.mkdir()


@dataclass(frozen=True)
class SweepDir:
    """The folder of a sweep, whose points are run directories and share a script and the code."""

    root: Path

    @property
    def ledger(self) -> Path:
        """Every point with its overrides, run directory and jobs, as JSON."""
        return self.root / "ledger.json"

    @property
    def lock(self) -> Path:
        """Held by a launcher that submits points once more."""
        return self.root / ".resubmit.lock"

    @property
    def may_lack_a_job(self) -> bool:
        """Whether a launcher was killed, or lost sbatch's answer, before it noted the job."""
        try:
            return self.lock.lstat().st_size > 0
        except OSError:
            return False

    def point(self, index: int) -> RunDir:
        """The run directory of point ``index``; the job's script builds the same name."""
        return RunDir(self.root / f"{index:04d}")

    @classmethod
    def of_point(cls, run: RunDir) -> tuple[SweepDir, int] | None:
        """The sweep that this run directory is a point of, and its index; None if it is a run of its own."""
        sweep, name = cls(run.root.parent), run.root.name
        if not _POINT.fullmatch(name) or sweep.point(int(name)).root != run.root:
            return None
        return (sweep, int(name)) if sweep.is_there() else None

    def is_there(self) -> bool:
        """Whether this folder is a sweep's; False also if that cannot be seen."""
        return is_regular(self.ledger)

    def submission_script(self, first: int) -> Path:
        """The script of the array whose task 0 is point ``first``: a large sweep has several arrays."""
        return self.root / (f"submission_{first}.sh" if first else "submission.sh")

    def analysis_script(self, first: int) -> Path:
        """The script of the array that analyses these points."""
        return self.root / (f"analysis_{first}.sh" if first else "analysis.sh")

    def first_points(self) -> list[int]:
        """The first point of each array that the sweep was split into, ascending; ``[0]`` for a single array."""
        numbers = (first_point_of(Path(name)) for name in names_in(self.root, within=self.root))
        return sorted({0, *(number for number in numbers if number is not None)})[:_MOST_ARRAYS]

    @property
    def shared(self) -> RunDir:
        """Where the script, the code and the provenance of all points lie."""
        return RunDir(self.root)


def first_point_of(script: Path) -> int | None:
    """The point that is task 0 of this script's array; 0 for a single run's script, None for another file."""
    match = _SCRIPT.fullmatch(script.name)
    return None if match is None else int(match[1] or 0)


RUNS = Path("runs")
"""Where runs lie unless a command is told otherwise."""


def is_run(folder: Path) -> bool:
    """Whether this is the directory of a run or the folder of a sweep."""
    return is_regular(folder / "config.yaml") or is_regular(folder / "submission.sh")


def runs_in(runs_root: Path, *, of_others: bool = False) -> list[RunDir]:
    """This user's runs in a folder, newest first; with ``of_others`` those of other users instead.

    Theirs are apart, for they name and date them as they like; of very many, only so many are looked into.
    """
    mine: list[str] = []
    theirs: list[str] = []
    try:
        with os.scandir(runs_root) as entries:
            for each in entries:
                if each.is_dir(follow_symlinks=False):
                    # Of who owns it first: the folders of others, however many, cost one question each.
                    is_own = _owner_of(each) == os.geteuid() and is_mine(runs_root / each.name)
                    (mine if is_own else theirs).append(each.name)
    except OSError:
        return []
    named = theirs[:_MOST_OF_OTHERS] if of_others else mine
    folders = [folder for name in named if is_run(folder := runs_root / name)]
    return [RunDir(folder.absolute()) for folder in sorted(folders, key=_made_at, reverse=True)]


def _owner_of(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except OSError:  # deleted by now
        return None


def make_private(folder: Path) -> None:
    """Make a folder that other users cannot enter, and those above it that are missing, which they cannot write.

    Raises FileExistsError if the folder is there already, and OSError.
    """
    missing = [] if folder.parent.is_dir() else [above for above in folder.parents if not above.is_dir()]
    for above in reversed(missing):
        above.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o700)


def _made_at(folder: Path) -> int:
    try:
        return RunDir(folder).submission_script.lstat().st_mtime_ns
    except OSError:
        return 0


# Checkpoints. Each is a folder, and `checkpoints/latest` names the newest that is whole.


def checkpoint_name(steps_done: int) -> str:
    """The folder, in ``checkpoints/``, of the checkpoint after so many steps."""
    return f"step_{steps_done:06d}"


def steps_of_checkpoint(name: str) -> int | None:
    """How many steps were done at a checkpoint of this name; None if it is another's."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def note_newest_checkpoint(run: RunDir, name: str) -> None:
    """Write down that checkpoint ``name`` is whole, and the newest. Raises OSError."""
    write_whole(run.newest_checkpoint, name)


def newest_checkpoint(run: RunDir) -> str:
    """The name of the newest checkpoint that is whole; empty if it cannot be read. Raises OSError if there is none."""
    try:
        return read_text(run.newest_checkpoint, within=run.root).strip()
    except ValueError:
        return ""


def steps_in_newest_checkpoint(run: RunDir) -> int | None:
    """How many steps were done at the newest checkpoint; None if there is none."""
    try:
        return steps_of_checkpoint(newest_checkpoint(run))
    except OSError:
        return None
