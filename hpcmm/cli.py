"""The command ``hpcmm``, and what every command makes of errors, Ctrl-C, closed pipes and long work."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType

from hpcmm.errors import HpcmmError
from hpcmm.resources import find_modules_at_last, find_modules_in
from hpcmm.text import printable

COMMANDS = {
    "launch": "compose a run from conf/, check it, and submit it to Slurm",
    "analyze": "read the nsys reports of a run: how many seconds a step loses, to what, because of which rank",
    "jobs": "what runs, where, what it says, and why it failed",
    "init": "ask Slurm, and propose a file that describes your cluster",
    "doctor": "check this machine and the nodes of a cluster for what breaks or slows training",
    "evaluate": "score trained runs on held-out data, side by side",
    "serve": "a trained run as a page, for those who have its token",
}
"""Each is also ``python -m hpcmm.NAME``. The value is its line in ``hpcmm --help``."""

QUIET_S = 15.0
"""Where standard error is no terminal, or one that moves no cursor, long work says this often how far it is."""
Progress = Callable[[str, int, int], None]
"""Is called with what is done, how much of it is, and of how much."""
INTERRUPTED = 130
"""As a shell has it: 128 and the number of the signal."""
_HELP = frozenset({"-h", "--help"})
_SCRIPT = "hpcmm"
_OWN = ("hydra", "omegaconf", "submitit", "jinja2", "psutil", "rich.console", "rich.progress")
"""What a command imports late, if at all."""


def main(arguments: Sequence[str] | None = None, prog: str = _SCRIPT) -> int:
    """The command line; returns the exit status. Only what the chosen command needs is imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] and given[0] in COMMANDS:
        if arguments is None and prog == _SCRIPT:
            _find_modules_here(given[0])
        command: Callable[[Sequence[str], str], int] = import_module(f"hpcmm.{given[0]}.__main__").main
        return command(given[1:], f"{prog} {given[0]}")
    return run_command("hpcmm", lambda words: _say(_parser(prog), words), given, needs_folder=False)


def run_command(
    name: str,
    command: Callable[[list[str]], int],
    arguments: Sequence[str] | None = None,
    *,
    errors: tuple[type[Exception], ...] = (HpcmmError,),
    interrupted: str | None = None,
    needs_folder: bool = True,
    one_line: bool = False,
) -> int:
    """Run ``command`` with the arguments (None: of this process). Returns the exit status.

    What follows a word ``--`` is not for hpcmm.

    - ``errors`` are the user's, the cluster's or a file's: one sentence after ``name``, and 1. With ``one_line`` a line
      break in it, which the name of a file may hold, begins no new line.
    - Ctrl-C is 130. ``interrupted`` is said of it, None: nothing. The words of a KeyboardInterrupt itself come first.
    - A reader of the output, such as ``head``, that is gone has enough: 0.
    - ``needs_folder``: a working directory that is gone is an error, but not for ``--help``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.excepthook = _trace_printably
    try:
        if needs_folder and not _HELP & set(given[: given.index("--") if "--" in given else None]):
            check_working_directory()
        find_modules_at_last(_OWN)
        return _with_all_output(command, given)
    except BrokenPipeError as error:
        if _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if not isinstance(error, errors):  # another pipe, whose end is a failure
            raise
        return _tell(name, error, one_line=one_line)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # so does rich's console end a program
            return 0
        raise
    except errors as error:
        return _tell(name, error, one_line=one_line)
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or interrupted
        if said is not None:
            print(f"{name}: interrupted; {said}." if said else f"{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _trace_printably(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback, whose words may come from a file of another user."""
    for text in traceback.format_exception(kind, error, trace):
        for line in text.splitlines():
            print(printable(line), file=sys.stderr)


def check_working_directory() -> None:
    """Raises HpcmmError if the folder has been deleted, or closed to the user, in the meantime."""
    try:
        os.getcwd()  # noqa: PTH109 -- pathlib would make an object of it
    except OSError as error:
        raise HpcmmError(f"The working directory is gone ({error.strerror}): change to another folder.") from error


def _tell(name: str, error: Exception, *, one_line: bool) -> int:
    said = str(error)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        said = f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}."
    lines = [said] if one_line else said.split("\n")
    print(f"{name}: " + "\n".join(map(printable, lines)), file=sys.stderr, flush=True)
    return 1


def _with_all_output(command: Callable[[list[str]], int], given: list[str]) -> int:
    """The command's status once its output is written, where a reader that is gone is noticed at the latest."""
    try:
        status = command(given)
    except SystemExit:  # argparse, after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors and a hung-up peer are always reported
    return bool(output.poll(0))


def _find_modules_here(command: str) -> None:
    """Let the working directory take the place of the script's folder on Python's path, as with ``python -m``.

    A launch copies the project's code by this path.
    """
    if not getattr(sys.flags, "safe_path", False):
        with contextlib.suppress(OSError):  # it is gone, which the command says
            here = str(Path.cwd())
            del sys.path[0]
            find_modules_in(here, command)


def _say(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """The help or the version, or what is wrong with ``words``, none of which is a command."""
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not parser.parse_args(words).version:
        parser.error(f"name a command first: {', '.join(COMMANDS)}")
    from importlib.metadata import version  # noqa: PLC0415 -- for this alone

    print(f"hpcmm {version('hpcmm')}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Launch multi-node training on Slurm, and see where its time goes.",
        epilog=f"{prog} COMMAND --help tells more. Each command is also python -m hpcmm.COMMAND.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    return parser


@contextlib.contextmanager
def progress_bar(program: str = "hpcmm.analyze") -> Iterator[Progress]:
    """A callback for standard error: a bar on a terminal that can draw it, elsewhere a line of ``program`` at times."""
    if not sys.stderr.isatty():
        yield _progress_lines(program)
        return
    # 0.1 s of imports that a pipe can do without.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    console = Console(stderr=True)
    if console.is_dumb_terminal:  # which a bar would leave empty
        yield _progress_lines(program)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, count="")

        def show(what: str, done: int, of: int) -> None:
            total, count = (of, f"{done}/{of}") if of > 1 else (None, "")
            bar.update(task, description=printable(what), completed=done, total=total, count=count)

        yield show


def _progress_lines(program: str) -> Progress:
    last = time.monotonic()

    def show(what: str, done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            print(f"{program}: {printable(what)}" + (f" ({done}/{of})" if of > 1 else ""), file=sys.stderr, flush=True)

    return show
