"""Record the faults afresh on the local Slurm cluster: ``python tests/ground_truth/record.py [FAULT|SCRIPT...]``.

Each fault is one profiled run of eight ranks on four nodes, launched by the public command, with the fault put in from
outside. Each script of ``own_scripts.py`` is launched as a user's own, with four ranks. What is kept under
``recordings/NAME`` is a run directory of the run's configuration, stripped exports, and what the links counted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Thread

import psutil
from faults import FAULTS, Fault
from own_scripts import SCRIPTS, OwnScript

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDINGS = HERE / "recordings"
STEPS = 12
OVERRIDES = ["experiment=anomaly_demo", "wait=true", f"train.steps={STEPS}", "train.evaluate=false"]
RUN_TIMEOUT_S = 300

sys.path.insert(0, str(ROOT / "profiles" / "samples"))


def run_with_fault(fault: Fault, folder: Path, env: dict[str, str], *overrides: str) -> Path:
    """Launch the profiled run in ``folder`` with the fault in it; the run directory. Raises CalledProcessError."""
    name = f"ground_truth_{os.getpid()}"
    ranks_env = env | {
        "HPCMM_GROUND_TRUTH": json.dumps(list(fault.injected)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "inject"), str(ROOT), env.get("PYTHONPATH")])),
    }
    with ExitStack() as during:
        if fault.throttle:
            during.enter_context(throttled(*fault.throttle, env=env))
        for stop in fault.stops:
            during.enter_context(stopping(*stop, folder))
        if fault.cut:
            during.enter_context(cut_off(*fault.cut, folder, env))
        if fault.crowd:
            during.enter_context(crowded(*fault.crowd, folder))
        try:
            subprocess.run(
                [sys.executable, "-m", "hpcmm.launch", *OVERRIDES, f"name={name}", *fault.overrides, *overrides],
                cwd=folder,
                env=ranks_env,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                timeout=RUN_TIMEOUT_S,
                check=True,
            )
        except BaseException:
            # The job outlives the command that follows it.
            subprocess.run(["scancel", f"--name={name}"], env=env, check=False)
            raise
    return (folder / "runs" / "latest").resolve()


def run_script(script: OwnScript, folder: Path, env: dict[str, str]) -> Path:
    """Launch the profiled script in ``folder``; the run directory. Raises CalledProcessError."""
    path, *arguments = script.command
    shutil.copy(HERE / "scripts" / path, folder)
    quoted = ",".join(f'"{argument}"' for argument in arguments)
    nodes = [f"cluster.nodes={script.nodes}", f"cluster.ranks_per_node={4 // script.nodes}"]
    # As many ranks as GPUs, or hpcmm takes the script for one that starts ranks itself.
    nodes.append(f"cluster.gpus_per_node={4 // script.nodes}")
    overrides = ["task=script", f"task.path={path}", f"task.args=[{quoted}]", "profile=nsys", "wait=true", *nodes]
    with throttled(*script.throttle, env=env) if script.throttle else nullcontext():
        subprocess.run(
            [sys.executable, "-m", "hpcmm.launch", "cluster=local_slurm", *overrides],
            cwd=folder,
            env=env | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            timeout=RUN_TIMEOUT_S,
            check=True,
        )
    return (folder / "runs" / "latest").resolve()


@contextmanager
def throttled(node: str, rate: str, *options: str, env: dict[str, str]) -> Iterator[None]:
    """A node behind a slow link; ``options`` of the command, such as ``--only send``."""
    command = str(ROOT / "slurm" / "local" / "fault")
    subprocess.run([command, "throttle", node, rate, *options], env=env, stdout=sys.stderr, check=True)
    try:
        yield
    finally:
        subprocess.run([command, "restore", node], env=env, stdout=sys.stderr, check=True)


@contextmanager
def stopping(rank: int, seconds: float, after_step: int, folder: Path) -> Iterator[None]:
    """Stop a rank's process for a while, once, after it has done a step."""

    def stop() -> None:
        process = psutil.Process(pid_after(rank, after_step, folder))
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    with beside(stop):
        yield


@contextmanager
def cut_off(node: str, seconds: float, after_step: int, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """Unplug a node's link for a while, once, after rank 0 has done a step."""
    command = str(ROOT / "slurm" / "local" / "fault")

    def cut() -> None:
        pid_after(0, after_step, folder)
        subprocess.run([command, "cut", node], env=env, stdout=sys.stderr, check=True)
        time.sleep(seconds)
        subprocess.run([command, "restore", node], env=env, stdout=sys.stderr, check=True)

    with beside(cut):
        yield


@contextmanager
def crowded(rank: int, hogs: int, folder: Path) -> Iterator[None]:
    """Bind a rank to one core, and busy processes to the same one."""
    busy: list[subprocess.Popen[bytes]] = []

    def crowd() -> None:
        process = psutil.Process(pid_after(rank, 0, folder))
        for thread in process.threads():
            psutil.Process(thread.id).cpu_affinity([0])
        hog = ["taskset", "-c", "0", sys.executable, "-c", "while True: pass"]
        busy.extend(subprocess.Popen(hog) for _ in range(hogs))

    try:
        with beside(crowd):
            yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def beside(act: Callable[[], None]) -> Iterator[None]:
    """``act`` in a thread of its own meanwhile."""
    thread = Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def pid_after(rank: int, step: int, folder: Path) -> int:
    """Process of a rank, as soon as the rank has done a step. Raises TimeoutError."""
    metrics = folder / "runs" / "latest" / "metrics" / f"rank_{rank:04d}.jsonl"
    until = time.monotonic() + RUN_TIMEOUT_S
    while time.monotonic() < until:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        if any(record["event"] == "step" and record["step"] >= step for record in records):
            return int(next(record["pid"] for record in records if record["event"] == "start"))
        time.sleep(0.01)
    raise TimeoutError(f"rank {rank} has not done step {step}")


def keep(run: Path, target: Path) -> None:
    """Stripped exports, configuration and link counters of ``run``, as a run directory of their own."""
    from strip import strip

    shutil.rmtree(target, ignore_errors=True)
    (target / "nsys").mkdir(parents=True)
    # No path of the machine that recorded it.
    config = (run / "config.yaml").read_text(encoding="utf-8").replace(str(run.parent), "runs")
    (target / "config.yaml").write_text(config, encoding="utf-8")
    if (run / "links").is_dir():
        shutil.copytree(run / "links", target / "links")
    for report in sorted((run / "nsys").glob("*.nsys-rep")):
        with tempfile.TemporaryDirectory() as scratch:
            export = Path(scratch) / f"{report.stem}.sqlite"
            command = ["nsys", "export", "--type", "sqlite", "-o", str(export), str(report)]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            strip(export, target / "nsys" / export.name)


def main(chosen: list[str]) -> int:
    known = [*FAULTS, *SCRIPTS]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        print(f"record.py: no such fault: {', '.join(unknown)}. There are {', '.join(known)}.", file=sys.stderr)
        return 1
    cluster = Path(os.environ.get("HPCMM_CLUSTER_DIR") or "/var/lib/hpcmm-cluster")
    env = os.environ | {"SLURM_CONF": str(cluster / "etc" / "slurm.conf")}
    # Ended from outside, it still mends the link and cancels the job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    subprocess.run([str(ROOT / "slurm" / "local" / "up")], env=env, stdout=sys.stderr, check=True)
    for name in chosen or known:
        with tempfile.TemporaryDirectory(prefix="hpcmm-ground-truth-") as folder:
            if name in SCRIPTS:
                run = run_script(SCRIPTS[name], Path(folder), env)
            else:
                run = run_with_fault(FAULTS[name], Path(folder), env)
            keep(run, RECORDINGS / name)
        size = sum(path.stat().st_size for path in (RECORDINGS / name).rglob("*") if path.is_file())
        print(f"{name}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
