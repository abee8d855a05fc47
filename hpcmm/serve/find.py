"""From a run's name to what is served, or to the server that a job has become."""

from __future__ import annotations

from pathlib import Path

from hpcmm.errors import HpcmmError
from hpcmm.jobs.find_run import find_targets
from hpcmm.runs.run_dir import RunDir, SweepDir
from hpcmm.serve.address import Address, read_address


def find_served_run(asked: str, runs_root: Path) -> RunDir:
    """The newest run of that name that has a checkpoint. Raises HpcmmError where there is none."""
    within = runs_root / asked  # a sweep's point: SWEEP/0003
    if "/" in asked and not Path(asked).expanduser().is_dir() and within.is_dir():
        asked = str(within)
    runs = [target.run for target in find_targets(asked, runs_root) if target.run is not None]
    if not runs:
        raise HpcmmError(f"The run directory of job {asked} is not known: name the directory.")
    trained = [run for run in runs if run.has_checkpoint()]
    if trained:
        return trained[0]
    first = runs[0]
    if SweepDir(first.root).ledger.is_file():
        raise HpcmmError(f"{first.root} is a sweep: name one of its points, such as {first.root.name}/0000.")
    raise HpcmmError(f"{first.checkpoints} holds no finished checkpoint: has the run trained to its end?")


def find_address(asked: str, runs_root: Path) -> Address:
    """Where the server of a job listens. Raises HpcmmError where none does (yet)."""
    for target in find_targets(asked, runs_root):
        address = None if target.run is None else read_address(target.run.address)
        if address is not None:
            return address
    raise HpcmmError(f"No server of {asked} answers: does it wait, or is it over? python -m hpcmm.jobs status {asked}")
