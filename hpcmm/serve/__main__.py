"""``python -m hpcmm.serve RUN``: see ``--help``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from hpcmm.cli import run_command
from hpcmm.config.workload import shipped_workloads, workload_of
from hpcmm.errors import HpcmmError
from hpcmm.serve.address import Address, find_address, find_served_run, this_host
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.served import ServedModel

PROGRAM = "python -m hpcmm.serve"
DESCRIPTION = "Serve a trained run as a page: {what}."
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
    return run_command("hpcmm.serve", lambda given: _command(given, prog), arguments, errors=(HpcmmError, OSError))


def _command(given: list[str], prog: str) -> int:
    pages = _pages_of(given)
    options = _parser(pages, prog).parse_intermixed_args(given)
    if options.address:
        return _print_address(options)
    if options.cluster is None:
        return _serve_here(options, pages)
    return _submit(options, pages)


def _pages_of(arguments: Sequence[str]) -> list[ServedModel]:
    """The page of the named run, before its options can be known; if no run is found, those that hpcmm ships."""
    peek = argparse.ArgumentParser(prog=PROGRAM, add_help=False, exit_on_error=False)
    peek.add_argument("run", nargs="?")
    _add_options(peek)
    with suppress(argparse.ArgumentError):  # the whole parser says it
        given, _ = peek.parse_known_intermixed_args(arguments)
        words = [] if given.address else [given.run, *given.overrides]
        for word in (word for word in words if word and "=" not in word):
            with suppress(HpcmmError):  # the value of an unknown option, or a run that is refused later with a sentence
                from hpcmm.config import config_file  # noqa: PLC0415 -- omegaconf, which --help does not need

                workload = workload_of(config_file.load(find_served_run(word, given.runs_root).config))
                page = None if workload is None else workload.served()
                return [] if page is None else [page]
    return [page for workload in shipped_workloads() if (page := workload.served()) is not None]


def _parser(pages: Sequence[ServedModel], prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION.format(what="; ".join(page.description for page in pages)) if pages else None,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    _add_options(parser)
    for page in pages:
        page.add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every page."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the Slurm job")
    parser.add_argument("--cluster", metavar="NAME", help="run as a Slurm job there, as cluster=NAME of hpcmm.launch")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="folder of your own clusters")
    parser.add_argument("--detach", action="store_true", help="return once the job is queued, do not wait for it")
    parser.add_argument("--address", action="store_true", help="say how to reach the server whose job's run is RUN")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--port", type=int, metavar="N", help="default: a free one")
    parser.add_argument("--max-batch", type=int, metavar="N", help="requests through the model at once (default: 8)")
    parser.add_argument("--max-wait-ms", type=float, metavar="T", help="the first of them waits so long (default: 5)")
    parser.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument("--max-upload-mb", type=float, metavar="MB", help="size of one uploaded file (default: 16)")
    parser.add_argument("--max-megapixels", type=float, metavar="M", help="pixels of one image (default: 40)")
    parser.add_argument("--max-files", type=int, metavar="N", help="files of a table or conversation (default: 32)")


def _options(given: argparse.Namespace, pages: Sequence[ServedModel]) -> ServeOptions:
    run = find_served_run(given.run, given.runs_root)
    if not pages:
        raise HpcmmError(f"The task of {run.root} has no page to serve: name a run of a workload that has.")
    names = {field.name for field in fields(ServeOptions)} - {"run", "page"}
    values = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    page = {name: value for each in pages for name, value in each.options(given).items()}
    return ServeOptions(run=str(run.root), page=page, **values)


def _serve_here(given: argparse.Namespace, pages: Sequence[ServedModel]) -> int:
    from hpcmm.serve.server import serve  # noqa: PLC0415 -- torch and gradio

    if given.overrides or given.detach:
        what = given.overrides[0] if given.overrides else "--detach"
        raise HpcmmError(f"{what} is for a Slurm job: name its cluster with --cluster, or leave it out.")
    serve(_options(given, pages), _say_here)
    print("The server has ended.")
    return 0


def _say_here(address: Address) -> None:
    print(f"open:    {address.url}")
    print(f"from your own machine, first: {address.direct_tunnel()}")
    print("Ctrl-C ends the server.", flush=True)


def _submit(given: argparse.Namespace, pages: Sequence[ServedModel]) -> int:
    from hpcmm.config.space import with_config_dirs  # noqa: PLC0415 -- hydra, which a server does not need
    from hpcmm.serve.job import submit, wait_for_address  # noqa: PLC0415

    overrides = with_config_dirs(given.overrides, given.config_dir)
    submission = submit(_options(given, pages), given.cluster, overrides, given.runs_root)
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
    _say_there(find_address(given.run, given.runs_root))
    return 0


def _say_there(address: Address) -> None:
    print(f"on your own machine: {address.tunnel(this_host())}")
    print(f"then open:           {address.url}", flush=True)


def _root_option(given: argparse.Namespace) -> str:

    return "" if given.runs_root == Path("runs") else f" --runs-root {shlex.quote(str(given.runs_root))}"


if __name__ == "__main__":
    sys.exit(main())
