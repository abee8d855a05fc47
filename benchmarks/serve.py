"""Throughput and latency of a served run, batched against unbatched, with 1, 4 and 16 users who ask without a pause.

    python benchmarks/serve.py RUN [--rounds 5] [--seconds 4] [--users 1,4,16] [--json FILE]

Two views: `model` is the batcher with the model behind it, in one process; `page` is a whole server, whose users upload
an image and ask over HTTP as the page does, from a process on the same machine. Batched is --max-batch 8, unbatched
--max-batch 1. Both are measured by turns, and each number is the median over the rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
from measuring import Row, ratio, summary
from PIL import Image

from hpcmm.config import config_file
from hpcmm.runs.run_dir import RunDir

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "tests" / "serve"))

BATCHES = {"unbatched": 1, "batched": 8}
WAIT_MS = 5.0
Use = Callable[[], None]
"""One user's one question, from sending it to its answer."""


@dataclass(frozen=True)
class Cell:
    """Answers a second, and the latencies' median and 95th percentile in milliseconds."""

    per_s: float
    p50_ms: float
    p95_ms: float


def measure(users: Sequence[Use], seconds: float) -> Cell:
    """All users ask, each again as soon as it is answered, for so long."""
    latencies: list[float] = []
    started = threading.Barrier(len(users) + 1)
    failures: list[BaseException] = []
    ends = [0.0]

    def ask(use: Use) -> None:
        try:
            use()  # connects, and embeds what is new
            started.wait()
            while time.perf_counter() < ends[0]:
                began = time.perf_counter()
                use()
                latencies.append(time.perf_counter() - began)
        except BaseException as error:
            failures.append(error)
            started.abort()

    threads = [threading.Thread(target=ask, args=(use,)) for use in users]
    for thread in threads:
        thread.start()
    ends[0] = time.perf_counter() + 3600
    try:
        started.wait(timeout=120)
    except threading.BrokenBarrierError:
        raise SystemExit(f"a user could not ask: {failures}") from None
    began = time.perf_counter()
    ends[0] = began + seconds
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    if failures:
        raise SystemExit(f"a user could not ask: {failures}")
    p50, p95 = np.percentile(latencies, [50, 95]) * 1000
    return Cell(len(latencies) / elapsed, float(p50), float(p95))


@contextmanager
def model_users(run: Path) -> Iterator[Callable[[str, int], list[Use]]]:
    """Users of the batcher, each with an image of its own."""
    from hpcmm.serve.service import Batcher  # noqa: PLC0415
    from hpcmm.train.checkpoint import load_model  # noqa: PLC0415
    from hpcmm.worker.distributed import select_accelerator  # noqa: PLC0415
    from hpcmm.workloads.anomaly.page.predictor import Predictor, Request  # noqa: PLC0415
    from hpcmm.workloads.anomaly.page.served import ServedDetector  # noqa: PLC0415

    select_accelerator()
    directory = RunDir(run)
    config = config_file.load(directory.config)
    model = load_model(directory, lambda: ServedDetector().build_model(config))
    predictor = Predictor(model, config.data.image_size)
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        batchers = {}
        for name, most in BATCHES.items():
            batchers[name] = Batcher(predictor, most=most, wait_s=WAIT_MS / 1000, waiting=64)
            stack.callback(batchers[name].close)

        def users(name: str, count: int) -> list[Use]:
            images = rng.random((count, predictor.side, predictor.side, 3), np.float32)
            asked = [Request(image, "a brick wall") for image in images]
            return [lambda request=request: batchers[name].submit(request).result(60) for request in asked]

        yield users


@contextmanager
def page_users(run: Path) -> Iterator[Callable[[str, int], list[Use]]]:
    """Users of two servers, one batched and one not; each uploads and asks."""
    import serving  # noqa: PLC0415
    from client import Client  # noqa: PLC0415

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        picture = folder / "image.jpg"
        Image.fromarray(noise).save(picture)
        servers = {}
        for name, most in BATCHES.items():
            (folder / name).mkdir()
            limits = ("--max-batch", str(most), "--max-wait-ms", str(WAIT_MS), "--threshold", "0.5")
            servers[name] = stack.enter_context(serving.served(run, folder / name, *limits))

        def users(name: str, count: int) -> list[Use]:
            clients = [stack.enter_context(Client(servers[name])) for _ in range(count)]
            return [lambda client=client: _asked(client.ask(picture, "a brick wall")) for client in clients]

        yield users


def _asked(page: str) -> None:
    if "hpcmm-result" not in page:
        raise RuntimeError(page[:200])


def numbers(cells: Sequence[Cell], unbatched_per_s: float) -> Row:
    """Of all rounds; ``times_unbatched`` by answers a second."""
    return {
        "rounds": len(cells),
        **summary([cell.per_s for cell in cells], "per_s", "answers"),
        **summary([cell.p50_ms / 1000 for cell in cells], "s", "p50"),
        **summary([cell.p95_ms / 1000 for cell in cells], "s", "p95"),
        "times_unbatched": ratio(statistics.median(cell.per_s for cell in cells), unbatched_per_s),
    }


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=measuring.positive, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--users", default="1,4,16")
    options = parser.parse_args()
    counts = [int(count) for count in options.users.split(",")]
    rows: list[Row] = []
    print("| view | users | | answers a second | p50 ms | p95 ms | times unbatched |")
    print("|---|---|---|---|---|---|---|")
    for view, opened in (("model", model_users), ("page", page_users)):
        with opened(options.run.resolve()) as users_of:
            users = {(name, count): users_of(name, count) for name in BATCHES for count in counts}
            cells: dict[tuple[str, int], list[Cell]] = {key: [] for key in users}
            for _ in range(options.rounds):
                for key, asking in users.items():
                    cells[key].append(measure(asking, options.seconds))
        for count in counts:
            alone = statistics.median(cell.per_s for cell in cells["unbatched", count])
            for name in BATCHES:
                own = cells[name, count]
                per_s, p50, p95 = (
                    statistics.median(getattr(cell, field) for cell in own) for field in ("per_s", "p50_ms", "p95_ms")
                )
                gain = f"{per_s / alone:.2f}"
                rows.append({"view": view, "users": count, "name": name, **numbers(own, alone)})
                print(f"| {view} | {count} | {name} | {per_s:.1f} | {p50:.0f} | {p95:.0f} | {gain} |", flush=True)
    measuring.write(options.json, "serve", rows)


if __name__ == "__main__":
    main()
