"""A server of a real run in a process of its own, and how to reach it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 240


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    process: subprocess.Popen[str]
    output: Path
    url: str
    """With the token."""

    @property
    def base(self) -> str:
        return self.url.partition("/?")[0]

    @property
    def token(self) -> str:
        return self.url.partition("token=")[2]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal. Returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def train(runs_root: Path, *overrides: str) -> Path:
    """A run of one rank and one step on small images: a real checkpoint, and scores that mean nothing."""
    return launch(
        runs_root, "name=small", "train.steps=1",
        "data.image_size=64", "data.train_images_per_category=2", "data.test_images_per_category=4",
        "model.decoder_width=32", "model.text_adapter_width=64", *overrides,
    )  # fmt: skip


def launch(runs_root: Path, *overrides: str) -> Path:
    """The directory of a run of one rank, which has ended."""
    words = [
        "cluster=local", "cluster.ranks_per_node=1", "train.evaluate=false", "wait=true", f"runs_root={runs_root}",
        *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hpcmm.launch", *words], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (runs_root / "latest").resolve()


@contextmanager
def served(run: Path, folder: Path, *arguments: str) -> Iterator[Server]:
    """The server of a run, as the command line starts it; ended at the end."""
    output = folder / "server.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcmm.serve", str(run), *arguments],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, preexec_fn=_heed_interrupts,  # noqa: PLW1509
        )  # fmt: skip
    try:
        yield Server(process, output, _address(process, output))
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[str], output: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"^open: +(\S+)$", output.read_text(), re.M)
        if found and "Ctrl-C" in output.read_text():
            return found[1]
        time.sleep(0.2)
    raise AssertionError(output.read_text())


def _heed_interrupts() -> None:
    """As in a terminal: whoever starts the tests in the background has them ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
