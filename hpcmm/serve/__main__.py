"""``python -m hpcmm.serve RUN``: see ``--help``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hpcmm.cli import run_command
from hpcmm.errors import HpcmmError
from hpcmm.serve.address import Address
from hpcmm.serve.options import ServeOptions

DESCRIPTION = "Serve a trained run as a page: upload an image, ask, and see where it is anomalous."
EPILOG = """\
RUN is the name of a run in --runs-root, the start of that name (the newest is taken), or a directory; a point of a
sweep is SWEEP/0003. Its newest checkpoint is loaded, unless another user could have written it.

Without --cluster the server runs here until Ctrl-C. With it, it is a Slurm job of one node: KEY=VALUE is as for
hpcmm.launch (cluster.time_limit_min=120, cluster.cpus_per_rank=4). Its state and its end: python -m hpcmm.jobs.

The server listens on 127.0.0.1 alone and needs the token in the printed address. Whoever has that token can use it.

exit status: 0 the server ended as asked (with --cluster: it answers, or with --detach: it is queued), 1 it could not
start, 130 after Ctrl-C while waiting for the job, which stays.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.serve") -> int:
    """The command line; returns the exit status."""
    return run_command("hpcmm.serve", lambda given: _command(_parser(prog).parse_intermixed_args(given)), arguments)


def _command(options: argparse.Namespace) -> int:
    if options.address:
        return _print_address(options)
    if options.cluster is None:
        return _serve_here(options)
    return _submit(options)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the Slurm job")
    parser.add_argument("--cluster", metavar="NAME", help="run as a Slurm job there: a file of conf/cluster")
    parser.add_argument("--detach", action="store_true", help="return once the job is queued, do not wait for it")
    parser.add_argument("--address", action="store_true", help="say how to reach the server whose job's run is RUN")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--port", type=int, metavar="N", help="default: a free one")
    parser.add_argument("--threshold", type=float, metavar="X", help="default: chosen on the held-out images")
    parser.add_argument("--max-batch", type=int, metavar="N", help="images through the model at once (default: 8)")
    parser.add_argument("--max-wait-ms", type=float, metavar="T", help="the first of them waits so long (default: 5)")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument("--max-upload-mb", type=float, metavar="MB", help="size of one image file (default: 16)")
    parser.add_argument("--max-megapixels", type=float, metavar="M", help="pixels of one image (default: 40)")
    parser.add_argument("--max-files", type=int, metavar="N", help="images of one table (default: 32)")
    return parser


def _options(given: argparse.Namespace) -> ServeOptions:
    from hpcmm.serve.find import find_served_run  # noqa: PLC0415 -- not needed by --help

    run = find_served_run(given.run, given.runs_root)
    names = {field.name for field in fields(ServeOptions)} - {"run"}
    values = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return ServeOptions(run=str(run.root), **values)


def _serve_here(given: argparse.Namespace) -> int:
    from hpcmm.serve.server import serve  # noqa: PLC0415 -- torch and gradio

    if given.overrides or given.detach:
        what = given.overrides[0] if given.overrides else "--detach"
        raise HpcmmError(f"{what} is for a Slurm job: name its cluster with --cluster, or leave it out.")
    serve(_options(given), _say_here)
    print("The server has ended.")
    return 0


def _say_here(address: Address) -> None:
    print(f"open:    {address.url}")
    print(f"from your own machine, first: {address.direct_tunnel()}")
    print("Ctrl-C ends the server.", flush=True)


def _submit(given: argparse.Namespace) -> int:
    from hpcmm.serve.job import submit, wait_for_address  # noqa: PLC0415

    submission = submit(_options(given), given.cluster, given.overrides, given.runs_root)
    name = submission.run.root.name
    print(f"job id:         {submission.job_id}")
    print(f"run directory:  {submission.run.root}")
    print(f"to end it:      python -m hpcmm.jobs cancel {name}{_root_option(given)}", flush=True)
    if given.detach:
        print(f"once it runs:   python -m hpcmm.serve {name} --address{_root_option(given)}")
        return 0
    _say_there(wait_for_address(submission))
    return 0


def _print_address(given: argparse.Namespace) -> int:
    from hpcmm.serve.find import find_address  # noqa: PLC0415

    _say_there(find_address(given.run, given.runs_root))
    return 0


def _say_there(address: Address) -> None:
    from hpcmm.serve.address import this_host  # noqa: PLC0415

    print(f"on your own machine: {address.tunnel(this_host())}")
    print(f"then open:           {address.url}", flush=True)


def _root_option(given: argparse.Namespace) -> str:

    return "" if given.runs_root == Path("runs") else f" --runs-root {shlex.quote(str(given.runs_root))}"


if __name__ == "__main__":
    sys.exit(main())
