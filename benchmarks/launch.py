"""How long launching takes on the login node, beside its rivals: medians over fresh processes, taken in turns.

    python benchmarks/launch.py [--runs 5] [--points 1000] [--rivals FOLDER] [--json FILE]

FOLDER is a virtual environment with the rivals: python -m venv FOLDER; FOLDER/bin/pip install nemo-run
hydra-submitit-launcher 'hydra-core<1.4'. Without it only hpcmm and the import of hydra and submitit alone, which no
launcher of this kind can do without, are measured. The rival of the dry run is a Hydra app with
hydra-submitit-launcher that composes and prints the same configuration.

A stand-in sbatch on the PATH notes when it is called; no job is submitted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measuring
from measuring import Row, ratio, summary

PROJECT = Path(__file__).resolve().parents[1]
SBATCH = """#!/bin/sh
date +%s.%N > "$HPCMM_BENCHMARK_CALLED"
echo "Submitted batch job 1"
"""
RIVAL_APP = """\
import hydra
from hydra.core.config_store import ConfigStore
from hpcmm.config.schema import RunConfig
ConfigStore.instance().store(name="schema", node=RunConfig)
hydra.main(config_path={conf!r}, config_name="config", version_base="1.3")(lambda config: None)()
"""
IMPORT = "import hydra, submitit"
LAUNCH = [sys.executable, "-m", "hpcmm.launch", "experiment=anomaly_demo"]


class Bench:
    """Commands in a folder of their own, with stand-ins for Slurm's on the PATH."""

    def __init__(self, folder: Path, rivals: Path | None) -> None:
        self._folder = folder
        self._rivals = rivals
        self._called = folder / "called"
        binaries = folder / "bin"
        binaries.mkdir()
        for name in ("sbatch", "srun", "squeue", "scontrol"):
            (binaries / name).write_text(SBATCH if name == "sbatch" else "#!/bin/sh\n", encoding="ascii")
            (binaries / name).chmod(0o755)
        (folder / "app.py").write_text(RIVAL_APP.format(conf=str(PROJECT / "conf")), encoding="utf-8")
        self._environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            "HPCMM_BENCHMARK_CALLED": str(self._called),
        }

    def seconds(self, *command: str) -> float:
        """Of the whole process."""
        began = time.time()
        subprocess.run(command, env=self._environment, cwd=self._folder, check=True, capture_output=True)
        return time.time() - began

    def seconds_to_sbatch(self, *overrides: str) -> float:
        """From the start of the process to the start of sbatch."""
        began = time.time()
        self.seconds(*LAUNCH, "cluster=slurm", f"runs_root={self._folder / 'runs'}", *overrides)
        return float(self._called.read_text(encoding="ascii")) - began

    def measures(self) -> dict[str, Callable[[], float]]:
        """What is measured, by its name."""
        own = {
            IMPORT: lambda: self.seconds(sys.executable, "-c", IMPORT),
            "dry_run=true": lambda: self.seconds(*LAUNCH, "dry_run=true"),
            "until sbatch is called": self.seconds_to_sbatch,
        }
        if self._rivals is None:
            return own
        binaries = self._rivals / "bin"
        rival = (str(binaries / "python"), "app.py", "--cfg", "job", "hydra/launcher=submitit_slurm", LAUNCH[-1])
        return own | {
            "nemo --help": lambda: self.seconds(str(binaries / "nemo"), "--help"),
            "hydra-submitit-launcher, --cfg job": lambda: self.seconds(*rival),
        }


def runs_here(name: str, measure: Callable[[], float]) -> bool:
    """Try it once, which fills the caches too; a rival that does not run is named with its last words."""
    try:
        measure()
    except subprocess.CalledProcessError as error:
        print(f"{name:<36} does not run: {error.stderr.decode(errors='replace').strip().splitlines()[-1]}")
        return False
    return True


def rows(seconds: dict[str, list[float]]) -> Iterator[Row]:
    """Of each command, beside the import that all of them need."""
    base_s = statistics.median(seconds[IMPORT])
    for name, found in seconds.items():
        times = ratio(statistics.median(found), base_s)
        yield {"name": name, "runs": len(found), **summary(found, "s"), "times_the_import": times}


def sweep_row(points: int, seconds: list[float]) -> Row:
    return {"name": "a sweep, until sbatch is called", "points": points, "runs": len(seconds), **summary(seconds, "s")}


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--runs", type=measuring.positive, default=5)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--rivals", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.rivals)
        measures = {name: measure for name, measure in bench.measures().items() if runs_here(name, measure)}
        rounds = [{name: measure() for name, measure in measures.items()} for _ in range(arguments.runs)]
        seconds = {name: [each[name] for each in rounds] for name in measures}
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        for name, median in medians.items():
            print(f"{name:<36} {median:6.3f} s (median of {arguments.runs})")
        print(f"dry_run=true / import: {medians['dry_run=true'] / medians[IMPORT]:.2f}")
        sweep_s = [bench.seconds_to_sbatch(f"train.seed=range(0,{arguments.points})") for _ in range(arguments.runs)]
        said = f"{statistics.median(sweep_s):.2f} s (median of {arguments.runs})"
        print(f"a sweep of {arguments.points} points, until its one sbatch is called: {said}")
    measuring.write(arguments.json, "launch", [*rows(seconds), sweep_row(arguments.points, sweep_s)])


if __name__ == "__main__":
    main()
