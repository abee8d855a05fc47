"""``python -m hpcmm.init``: see ``--help``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from hpcmm.cli import run_command
from hpcmm.config.compose import compose_run
from hpcmm.config.parts import folders_of, options_of, own_folders, user_config_folder
from hpcmm.config.schema import SUBMIT_VARIABLES, ClusterConfig, RunConfig
from hpcmm.config.space import with_config_dirs
from hpcmm.config.validate import cluster_problems
from hpcmm.doctor.__main__ import Examined, examine
from hpcmm.doctor.checks import report_lines
from hpcmm.errors import HpcmmError
from hpcmm.files import write_whole
from hpcmm.init.proposal import Line, Wanted, propose, written
from hpcmm.init.site import Site, ask_site, is_name
from hpcmm.launch.interpreter import ask, with_python
from hpcmm.node.cache import given_cache_dir, make_folder
from hpcmm.runs.ownership import own_output_folder
from hpcmm.slurm.sbatch import check_slurm_conf
from hpcmm.text import printable

EPILOG = """\
examples:
  python -m hpcmm.init                                     asks on a terminal, else takes what it proposes
  python -m hpcmm.init --yes --partition gpu --nodes 4     asks nothing
  python -m hpcmm.init --print                             shows the file, and writes nothing

Each value in the file has its reason above it. A value that you give is taken in place of the guess.

exit status: 0 the file is written (or printed), and nothing that the check found is bad; 1 the check found something
bad, or there is no file. docs/init.md tells how each value is guessed.
"""
_WAIT_S = 120
_MOST_CHECKED = 2
"""Nodes of the check."""
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@-]{0,199}")
_OF_ONE_MACHINE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs"})
_SHARED_VARIABLES = ("SCRATCH", "WORK", "WORKDIR", "PROJECT", "WORKSPACE")
"""By which sites name a user's folder on the parallel file system."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m hpcmm.init") -> int:
    """The command line; returns the exit status."""
    said = "nothing is written unless its path was printed"
    errors = (HpcmmError, OSError)
    return run_command("hpcmm.init", lambda given: _command(given, prog), arguments, errors=errors, interrupted=said)


def _command(given: Sequence[str], prog: str) -> int:
    options = _parser(prog).parse_args(given)
    check_slurm_conf()
    site = ask_site()
    asks = sys.stdin.isatty() and not (options.yes or options.print)
    wanted = _asked(site, _wanted(site, options)) if asks else _wanted(site, options)
    file = _place(options.out, wanted.name)
    lines = propose(site, wanted)
    _refuse_problems(lines)
    if options.print:
        print(_text(lines, site, wanted), end="")
        return 0
    if not options.force and os.path.lexists(file):
        raise HpcmmError(f"{file} is there already: --force replaces it, --name or --out makes another.")
    nodes = 0 if options.no_check else min(_MOST_CHECKED, _nodes_in(lines))
    if asks:
        print(f"\n{_text(lines, site, wanted)}")
        check = f", and check it with a short job of {nodes} node{'' if nodes == 1 else 's'}" if nodes else ""
        if _answer(f"Write {file}{check}? yes or no", "yes", _yes_or_no) == "no":
            return 1
    config = _write(file, lines, site, wanted)
    print(f"written:  {printable(str(file))}", flush=True)
    words = _cluster_words(file)
    if nodes:
        status = _check(
            config, nodes, options.wait, wanted, lambda named: _write(file, propose(site, named), site, named)
        )
    else:
        print(f"check it: python -m hpcmm.doctor {words} --nodes {min(_MOST_CHECKED, _nodes_in(lines))}")
        status = 0
    print(f"next:     python -m hpcmm.launch {words} profile=nsys analyze=after -- train.py")
    return status


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Ask Slurm what this cluster is, and write a file that describes it to hpcmm: cluster=NAME.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", help="what cluster= will call it (default: Slurm's own name)")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--qos", metavar="NAME")
    number = _number(1)
    parser.add_argument("--nodes", type=number, metavar="N", help="of a job, if it does not say otherwise")
    parser.add_argument("--ranks-per-node", type=number, metavar="N")
    parser.add_argument("--gpus-per-node", type=_number(0), metavar="N")
    parser.add_argument("--gpu-type", metavar="TYPE", help="as Slurm names it: a100, 1g.5gb")
    parser.add_argument("--cpus-per-rank", type=number, metavar="N")
    parser.add_argument("--memory-gb", type=number, metavar="N", help="of a node")
    parser.add_argument("--time-limit-min", type=number, metavar="N")
    parser.add_argument(
        "--python", metavar="PATH", help="of the ranks, or its environment's folder (default: this one)"
    )
    parser.add_argument("--modules", metavar="A,B", help="environment modules to load (default: those loaded now)")
    parser.add_argument("--interface", metavar="NAME", help="network interface (default: as the check finds it)")
    parser.add_argument("--cache-dir", metavar="DIR", help="shared folder for what outlives runs")
    parser.add_argument("--runs-root", metavar="DIR", help="shared folder for all runs (default: ./runs of a launch)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="DIR/cluster/NAME.yaml, or DIR (default: "
                        "~/.config/hpcmm/conf)")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument("--print", action="store_true", help="print the file, and write nothing")
    parser.add_argument("--yes", action="store_true", help="ask nothing, take what is proposed")
    parser.add_argument("--no-check", action="store_true", help="start no job")
    parser.add_argument(
        "--wait", type=number, default=_WAIT_S, metavar="S", help=f"of the check's job (default: {_WAIT_S})"
    )
    return parser


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{printable(text)} is not a number from {least} on")
        return int(text)

    return number


def _wanted(site: Site, options: argparse.Namespace) -> Wanted:
    """What the options say, and what the user's own environment does. Raises HpcmmError for what can be none."""
    for key in ("partition", "account", "qos", "gpu_type"):
        value = getattr(options, key)
        if value is not None and not is_name(value):
            raise HpcmmError(f"--{key.replace('_', '-')} {printable(value)} cannot be a name of Slurm's.")
    if options.interface is not None and not _INTERFACE.fullmatch(options.interface):
        raise HpcmmError(f"--interface {printable(options.interface)} cannot be a network interface's name.")
    cache_dir, about_cache = _cache(options.cache_dir, os.environ)
    return Wanted(
        name=_name(site, options),
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node or options.gpus_per_node or None,
        gpus_per_node=options.gpus_per_node,
        gpu_type=options.gpu_type,
        cpus_per_rank=options.cpus_per_rank,
        memory_gb=options.memory_gb,
        time_limit_min=options.time_limit_min,
        python=_python(options.python),
        modules=tuple(_modules(options.modules, os.environ)),
        cache_dir=cache_dir,
        about_cache=about_cache,
        runs_root=options.runs_root,
        submit_environment={name: os.environ[name] for name in SUBMIT_VARIABLES if os.environ.get(name)},
        interface=options.interface,
    )


def _python(given: str | None) -> str | None:
    """The path without a way from here; what is no path is looked up on the nodes."""
    if given is None:
        return None
    path = os.path.expanduser(given)  # noqa: PTH111 -- pathlib's raises for an unknown user
    return os.path.abspath(path) if os.sep in path or Path(path).is_dir() else path  # noqa: PTH100 -- keeps links


def _name(site: Site, options: argparse.Namespace) -> str:
    if options.name is not None:
        return _own_name(options.name)
    if options.out is not None and options.out.suffix == ".yaml":
        return _own_name(options.out.stem)
    name = site.name if _is_word(site.name) else "mysite"
    return f"{name}_site" if name in options_of("cluster", own_folders()) else name


def _own_name(name: str) -> str:
    if not _is_word(name):
        raise HpcmmError(f"{printable(name)} cannot be a cluster's name: use letters, digits, - and _.")
    if name in options_of("cluster", own_folders()):
        raise HpcmmError(f"hpcmm has a cluster/{name}.yaml of its own, so give yours another name: --name.")
    return name


def _is_word(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", name) is not None


def _modules(given: str | None, environ: Mapping[str, str]) -> Iterator[str]:
    loaded = environ.get("LOADEDMODULES", "").split(":") if given is None else given.split(",")
    for name in filter(None, map(str.strip, loaded)):
        if _MODULE.fullmatch(name):
            yield name
        elif given is not None:
            raise HpcmmError(f"--modules: {printable(name)} cannot be a module's name.")


def _cache(given: str | None, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The cache folder, None for the usual one, and why. That nodes see a folder is guessed by its file system."""
    if given is not None:
        return given, "As you said."
    usual = given_cache_dir(ClusterConfig(name="site"))
    kind = _file_system(usual)
    if kind not in _OF_ONE_MACHINE:
        return None, f"{usual} is used; it is on {kind or 'a file system of unknown kind'}."
    for variable in _SHARED_VARIABLES:
        folder = Path(environ.get(variable) or "-")
        if folder.is_absolute() and folder.is_dir() and _file_system(folder) not in _OF_ONE_MACHINE:
            return str(
                folder / "hpcmm-cache"
            ), f"In ${variable}, for {usual} is on {kind}, which one machine has alone."
    return None, f"{usual} is used; it is on {kind}, which often one machine has alone. The check tells."


def _file_system(folder: Path) -> str:
    """The kind of the file system that a folder is on, or would be; empty if it is not known."""
    real = Path(os.path.realpath(folder))
    mounted = [each for each in psutil.disk_partitions(all=True) if real.is_relative_to(each.mountpoint)]
    return max(mounted, key=lambda each: len(each.mountpoint)).fstype if mounted else ""


def _asked(site: Site, wanted: Wanted) -> Wanted:
    """The same, with the user's answers to what matters most. Enter takes what is proposed."""
    print("Enter takes the value in brackets.")
    guessed = {line.key: line for line in propose(site, wanted)}
    print(printable(guessed["partition"].why))
    names = [each.name for each in site.partitions]
    partition = _answer("partition", str(guessed["partition"].value), _one_of(names))
    if partition != guessed["partition"].value or wanted.partition is not None:
        wanted = replace(wanted, partition=partition)
        guessed = {line.key: line for line in propose(site, wanted)}
    if wanted.account is None and "account" in guessed:
        print(printable(guessed["account"].why))
        account = _answer("account, or - for none", str(guessed["account"].value or "-"), _name_of_slurm)
        if account != str(guessed["account"].value or "-"):
            wanted = replace(wanted, account="" if account == "-" else account)
    if wanted.nodes is None:
        wanted = replace(wanted, nodes=_number_asked("nodes of a job", guessed["nodes"]))
    if wanted.time_limit_min is None:
        wanted = replace(wanted, time_limit_min=_number_asked("time limit in minutes", guessed["time_limit_min"]))
    name = _answer("name, for cluster=NAME", wanted.name, lambda text: _sentence(lambda: _own_name(text)))
    return replace(wanted, name=name)


def _number_asked(question: str, guessed: Line) -> int | None:
    """The user's number; None for the one that is guessed, which keeps its reason."""
    print(printable(guessed.why))
    answer = _answer(question, str(guessed.value), _numeral)
    return None if answer == str(guessed.value) else int(answer)


def _answer(question: str, proposed: str, problem: Callable[[str], str | None]) -> str:
    """The user's answer, once nothing is wrong with it."""
    while True:
        try:
            given = input(f"{question} [{printable(proposed)}]: ").strip() or proposed
        except EOFError:
            raise HpcmmError("The answers have ended, so nothing is written: --yes asks nothing.") from None
        if (said := problem(given)) is None:
            return given
        print(said)


def _one_of(names: Sequence[str]) -> Callable[[str], str | None]:
    return lambda text: None if text in names else f"Choose one of {', '.join(names)}."


def _name_of_slurm(text: str) -> str | None:
    return None if text == "-" or is_name(text) else "That cannot be a name of Slurm's."


def _numeral(text: str) -> str | None:
    return None if re.fullmatch(r"[1-9][0-9]{0,8}", text) else "Give a number from 1 on."


def _yes_or_no(text: str) -> str | None:
    return None if text in ("yes", "no") else "Write yes or no."


def _sentence(call: Callable[[], object]) -> str | None:
    try:
        call()
    except HpcmmError as error:
        return str(error)
    return None


def _place(out: Path | None, name: str) -> Path:
    """The file's path. Raises HpcmmError for one that ``cluster=`` could never find."""
    if out is None or out.suffix != ".yaml":
        return (user_config_folder() if out is None else out.expanduser().absolute()) / "cluster" / f"{name}.yaml"
    file = out.expanduser().absolute()
    if file.parent.name != "cluster":
        raise HpcmmError(f"{file} is in no folder named cluster, where cluster={name} is searched: name it so.")
    if file.stem != name:
        raise HpcmmError(f"cluster={name} is searched in {name}.yaml, but --out is {file}: leave --name out.")
    return file


def _text(lines: Sequence[Line], site: Site, wanted: Wanted) -> str:
    when = datetime.now(UTC).date().isoformat()
    slurm = " ".join(filter(None, ["Slurm", site.version, f"of cluster {site.name}" if site.name else ""]))
    heading = f"Written by `python -m hpcmm.init` on {when} from what {slurm} says. It is yours: change what you like."
    return written(lines, heading, wanted.runs_root)


def _nodes_in(lines: Sequence[Line]) -> int:
    return next(int(line.value) for line in lines if line.key == "nodes")


def _refuse_problems(lines: Sequence[Line]) -> None:
    """Raises HpcmmError for values that do not go together, which only options of the user's can be."""
    given: dict[str, Any] = {line.key: line.value for line in lines if line.value is not None}
    config = RunConfig("init", cluster=ClusterConfig(**given))
    if problems := list(cluster_problems(config)):
        raise HpcmmError("\n".join(problems))
    if config.cluster.python is not None:
        ask(with_python(config, Path.cwd()).cluster)


def _write(file: Path, lines: Sequence[Line], site: Site, wanted: Wanted) -> RunConfig:
    """Write the file, and give the configuration that it makes."""
    make_folder(file.parent)
    write_whole(own_output_folder(file.parent) / file.name, _text(lines, site, wanted), 0o644)
    return compose_run(with_config_dirs([f"cluster={wanted.name}"], [str(file.parent.parent)]))


def _cluster_words(file: Path) -> str:
    """How the file is named on a command line."""
    places = [folder for folder in folders_of(None) if (folder / "cluster" / file.name).is_file()]
    option = [] if places[:1] == [file.parent.parent] else ["--config-dir", str(file.parent.parent)]
    return printable(shlex.join([*option, f"cluster={file.stem}"]))


def _check(config: RunConfig, nodes: int, wait_s: int, wanted: Wanted, rewrite: Callable[[Wanted], object]) -> int:
    """Run the doctor's job, print its word, and write the interface that it finds into the file."""
    print(f"checking: a job of {nodes} node{'' if nodes == 1 else 's'}; it may wait {wait_s} s ...", flush=True)
    with _removed_if_empty(Path(config.runs_root).expanduser()):
        try:
            examined = examine(config, nodes, None, wait_s, nsys=True)
        except HpcmmError as error:
            print(f"hpcmm.init: {printable(str(error))}", file=sys.stderr)
            is_busy = "busy" in str(error).lower()
            print("The file is not checked." if is_busy else "The file is there, but a job was refused: change it.")
            return 0 if is_busy else 1
    print("\n".join(report_lines(examined.names, examined.found, examined.findings)))
    if wanted.interface is None and (interface := _interface(examined)) is not None:
        about = f"The checked nodes met there. {_faster(examined, interface)}".strip()
        rewrite(replace(wanted, interface=interface, about_interface=about))
        print(f"The nodes met on {interface}, which the file says now.")
    return 1 if examined.is_bad else 0


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """A folder that only the check has made does not stay."""
    was_there = folder.exists()
    try:
        yield
    finally:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


def _interface(examined: Examined) -> str | None:
    """The interface by which all checked nodes met; None if they have none in common."""
    found = {examined.found[name].get("interface") for name in examined.names[1:] if examined.found.get(name)}
    (one, *others) = found or {None}
    return one if not others and isinstance(one, str) and one != "lo" and _INTERFACE.fullmatch(one) else None


def _faster(examined: Examined, interface: str) -> str:
    """What to try in its place: an interface with an address that each checked node has, and that is faster."""
    tables = [facts["interfaces"] for name in examined.names[1:] if (facts := examined.found.get(name))]
    speeds = [
        {name: each["mbit_per_s"] for name, each in table.items() if each["addresses"] and _INTERFACE.fullmatch(name)}
        for table in tables
    ]
    own = min((speed.get(interface, 0) for speed in speeds), default=0)
    common = [name for name in speeds[0] if all(speed.get(name, 0) > own for speed in speeds)] if speeds else []
    return f"Faster by their drivers: {', '.join(common)}." if common else ""


if __name__ == "__main__":
    sys.exit(main())
