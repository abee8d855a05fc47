"""``launch.stage``: data on each node's own disk before the ranks start, and gone when the job ends.

One process a node (``python -m hpcmm.worker stage RUN_DIR``) copies, says so on one line, and stays. It removes the
copy when its input ends, as it does with the batch script, or when Slurm tells it to end. ``staged RUN_DIR NODES`` in
the batch script reads those lines and writes ``staged.json``, by which each rank finds its node's copy.

Links that lead to a place within their source are links in the copy; of others what they lead to is copied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import IO

from hpcmm.config.schema import RunConfig, StageCheck
from hpcmm.errors import HpcmmError
from hpcmm.files import write_json
from hpcmm.node.cache import make_private_folder
from hpcmm.node.recorder import node_of
from hpcmm.runs.run_dir import RunDir
from hpcmm.worker.environment import scratch_dir

LOCK = "lock"
"""A file in the folder of a node's copies, which is locked as long as somebody needs them."""
_PREFIX, _DATA = "hpcmm-stage", "data"
_THREADS, _PIECE_BYTES = 8, 4 << 20
_MOST_WAITING = 64
"""Files that wait for a thread: a data set may have millions, which are not all kept in memory."""
_DEEPEST = 200
_LEAVE_S = 20.0
"""The ranks of a job that is told to end get this long to let go of their data; Slurm kills after 30 s by default."""
_BLOCK_BYTES = 4096
"""What a file takes of most file systems at least."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Entry:
    """One thing to make in the copy."""

    source: str
    """What is copied, behind all links."""
    place: str
    """Where it lies in the copy, relative to the folder of copies."""
    bytes: int = 0
    mtime_ns: int = 0
    is_folder: bool = False
    link: str | None = None
    """The text of a link; None for a file or a folder."""


@dataclass
class Tally:
    """The files among entries."""

    files: int = 0
    bytes: int = 0
    on_disk: int = 0
    """Bytes, in blocks."""
    mtimes_ns: int = 0
    """Their sum, which a file that is written meanwhile changes."""

    def add(self, entry: Entry) -> None:
        if not entry.is_folder and entry.link is None:
            self.files += 1
            self.bytes += entry.bytes
            self.on_disk += -(-entry.bytes // _BLOCK_BYTES) * _BLOCK_BYTES
            self.mtimes_ns += entry.mtime_ns


@dataclass(frozen=True)
class Copied:
    """What one node did."""

    node: str
    folder: str
    places: dict[str, str]
    """The copy of each source."""
    bytes: int
    files: int
    took_s: float


# What there is to copy.


def entries_of(source: str) -> Iterator[Entry]:
    """A file, or a folder with all that lies in it, folders before what they hold.

    Raises HpcmmError for what is not there or cannot be read, for a pipe, device or socket, and for a link that leads
    back to a folder around it.
    """
    try:
        os.stat(source)  # noqa: PTH116 -- raises if links lead in a circle, which pathlib's resolve tells otherwise
        root = os.path.realpath(source)
    except OSError as error:
        raise HpcmmError(f"launch.stage has {source}, which cannot be read ({error.strerror}).") from error
    yield from _walk(root, Path(source).name, root, ())


def _walk(path: str, place: str, root: str, around: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """``path`` has no links in it; ``around`` are device and inode of the folders that it was reached through."""
    try:
        facts = os.lstat(path)
        if stat.S_ISREG(facts.st_mode):
            yield Entry(path, place, facts.st_size, facts.st_mtime_ns)
            return
        if not stat.S_ISDIR(facts.st_mode):
            raise HpcmmError(f"launch.stage cannot copy {path}: it is a pipe, a device or a socket. Remove it there.")
        this = (facts.st_dev, facts.st_ino)
        if this in around or len(around) > _DEEPEST:
            raise HpcmmError(
                f"launch.stage cannot copy {path}: a link within it leads back to it, or its folders are nested more "
                f"than {_DEEPEST} deep. Remove the link."
            )
        yield Entry(path, place, mtime_ns=facts.st_mtime_ns, is_folder=True)
        with os.scandir(path) as found:
            inner = [(each.name, each.is_symlink()) for each in found]
    except OSError as error:
        raise HpcmmError(f"launch.stage cannot copy {path} ({error.strerror}).") from error
    for name, is_link in inner:
        below, its_place = os.path.join(path, name), f"{place}/{name}"  # noqa: PTH118 -- of millions, Path is slow
        if is_link:
            yield from _follow(below, its_place, root, (*around, this))
        else:
            yield from _walk(below, its_place, root, (*around, this))


def _follow(link: str, place: str, root: str, around: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    target = os.path.realpath(link)
    if not os.path.lexists(target):
        yield Entry(link, place, link=os.readlink(link))  # noqa: PTH115 -- as it is: broken here, and broken there
    elif target == root or target.startswith(f"{root}/"):
        top = place.partition("/")[0]
        inside = f"{top}/{os.path.relpath(target, root)}" if target != root else top
        yield Entry(link, place, link=os.path.relpath(inside, os.path.dirname(place)))  # noqa: PTH120
    else:
        yield from _walk(target, place, root, around)


# The copy.


class _Stop(Exception):  # noqa: N818 -- not an error: this process was told to end
    """Raised by the handler of SIGTERM."""


class Copier:
    """Copies entries into a folder by several threads, and checks each file."""

    def __init__(self, folder: Path, check: StageCheck) -> None:
        self.folder = folder
        self.check = check
        self.tally = Tally()
        self._is_over = threading.Event()

    def copy(self, entries: Iterable[Entry]) -> None:
        """Raises HpcmmError for a file that changes meanwhile, that does not arrive whole, or that has no room."""
        waiting: deque[Future[None]] = deque()
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for entry in entries:
                target = self.folder / entry.place
                if entry.link is not None:
                    target.symlink_to(entry.link)
                elif entry.is_folder:
                    target.mkdir(mode=0o700)
                else:
                    self.tally.add(entry)
                    waiting.append(pool.submit(self._copy_file, entry, target))
                if len(waiting) >= _MOST_WAITING:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except OSError as error:
            raise self._failed(self.folder, error) from error
        finally:
            self._is_over.set()
            pool.shutdown(cancel_futures=True)

    def _copy_file(self, entry: Entry, target: Path) -> None:
        try:
            with _opened(entry.source, os.O_RDONLY | os.O_NONBLOCK) as source, _opened(target, _NEW) as made:
                before = os.fstat(source.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise _changed(entry.source)
                digest = self._copy_content(source, made)
                after, arrived = os.fstat(source.fileno()), os.fstat(made.fileno())
                if (entry.bytes, entry.mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise _changed(entry.source)
                if arrived.st_size != entry.bytes:
                    raise HpcmmError(f"{target} has {arrived.st_size} bytes, but {entry.source} {entry.bytes}.")
                if before.st_mode & 0o100:
                    os.fchmod(made.fileno(), 0o700)
                os.utime(made.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
                if digest is not None:
                    self._check_content(made, digest, target)
        except OSError as error:
            raise self._failed(Path(entry.source), error) from error

    def _copy_content(self, source: IO[bytes], made: IO[bytes]) -> bytes | None:
        """Returns the checksum of what was read, if one is asked for."""
        digest = hashlib.blake2b() if self.check is StageCheck.checksum else None
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while (size := source.readinto(buffer)) and not self._is_over.is_set():  # type: ignore[attr-defined]
            written = 0
            while written < size:
                written += made.write(buffer[written:size])
            if digest is not None:
                digest.update(buffer[:size])
        return digest and digest.digest()

    def _check_content(self, made: IO[bytes], digest: bytes, target: Path) -> None:
        """Read the copy again, from the disk and not from memory."""
        os.fsync(made.fileno())
        os.posix_fadvise(made.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with _opened(target, os.O_RDONLY) as again:
            on_disk = hashlib.blake2b()
            while piece := again.read(_PIECE_BYTES):
                on_disk.update(piece)
            if on_disk.digest() != digest:
                raise HpcmmError(f"{target} does not hold what was written: the disk is damaged. Tell the site.")

    def _failed(self, path: Path, error: OSError) -> HpcmmError:
        if error.errno in _FULL:
            return HpcmmError(
                f"{self.folder} is full ({error.strerror}) before all is copied: set cluster.scratch_dir to a larger "
                "folder of the nodes, or stage less."
            )
        if error.errno == errno.ENOENT:
            return _changed(str(path))
        return HpcmmError(f"launch.stage cannot copy {path} ({error.strerror}).")


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def _opened(path: str | Path, flags: int) -> IO[bytes]:
    """Without following a link in the last place, unbuffered, and closed to others."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb" if flags & os.O_WRONLY else "rb", buffering=0)


def _changed(path: str) -> HpcmmError:
    return HpcmmError(f"{path} changed while it was copied: stage data that nobody writes to.")


def _amount(size: float) -> str:
    if size >= 999.5e6:
        return f"{size / 1e9:,.1f} GB"
    if size >= 999.5:
        return f"{size / 1e6:.3g} MB" if size >= 999.5e3 else f"{size / 1e3:.3g} kB"
    return _counted(round(size), "byte")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def copy_all(sources: Sequence[str], folder: Path, check: StageCheck) -> Tally:
    """Copy ``sources`` into ``folder``; nothing, if there is no room for all. Raises HpcmmError."""
    expected, folders = Tally(), []
    for entry in chain.from_iterable(map(entries_of, sources)):
        expected.add(entry)
        if entry.is_folder:
            folders.append(entry)
    _check_room(folder, expected, len(folders))
    copier = Copier(folder, check)
    copier.copy(chain.from_iterable(map(entries_of, sources)))
    for each in folders:  # a file that came or went has changed its folder
        if not _is_as_it_was(each):
            raise _changed(each.source)
    if copier.tally != expected:
        raise _changed(" or ".join(sources))
    return copier.tally


def _check_room(folder: Path, expected: Tally, folders: int) -> None:
    room = os.statvfs(folder)
    free, files = room.f_bavail * room.f_frsize, expected.files + folders
    if expected.on_disk > free:
        has, copies = f"{_amount(free)} free", _amount(expected.bytes)
    elif room.f_files and files > room.f_favail:
        has, copies = f"room for {room.f_favail:,} files", f"{files:,} files and folders"
    else:
        return
    raise HpcmmError(
        f"{folder.parent.parent} has {has}, but launch.stage copies {copies}: set cluster.scratch_dir to a larger "
        "folder of the nodes, or stage less."
    )


def _is_as_it_was(folder: Entry) -> bool:
    with contextlib.suppress(OSError):
        return Path(folder.source).stat().st_mtime_ns == folder.mtime_ns
    return False


# The folder on the node.


@contextlib.contextmanager
def own_folder(scratch: Path) -> Iterator[Path]:
    """A new folder that only this user can enter, held by a lock, and removed at the end with all that lies in it.

    The ranks that use it hold the lock too, and are waited for. Raises HpcmmError if it cannot be made.
    """
    _remove_left_behind(scratch)
    try:
        folder = make_private_folder(f"{_PREFIX}-{os.geteuid()}-", scratch, "cluster.scratch_dir")
        (folder / _DATA).mkdir(mode=0o700)
        held = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(held, fcntl.LOCK_SH)
        (folder / f"{LOCK}.new").rename(folder / LOCK)  # it is held from when others can see it
    except OSError as error:
        raise HpcmmError(
            f"{scratch} takes no folder with a lock ({error.strerror}): set cluster.scratch_dir."
        ) from error
    try:
        yield folder
    finally:
        _wait_until_unused(held)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            print(f"hpcmm: {folder} cannot be removed ({error.strerror}): remove it by hand.", file=sys.stderr)
        os.close(held)


def _wait_until_unused(held: int) -> None:
    until = time.monotonic() + _LEAVE_S
    while time.monotonic() < until:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return


def _remove_left_behind(scratch: Path) -> None:
    """Remove what jobs of this user left that were killed: folders that nobody holds.

    Another user may have moved a folder of this user's here that they can write; a staged one they cannot.
    """
    for folder in scratch.glob(f"{_PREFIX}-{os.geteuid()}-*"):
        with contextlib.suppress(OSError):  # another process removes it too, or it is not ours
            facts = folder.lstat()
            if (facts.st_uid, facts.st_mode) != (os.geteuid(), stat.S_IFDIR | 0o700):
                continue
            held = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


# The two commands.


def stage(config: RunConfig, environ: Mapping[str, str] = os.environ, until: IO[bytes] | None = None) -> int:
    """On each node: copy, say so, and keep the copy until the input ends. Returns the exit status.

    Raises HpcmmError, with nothing left behind, that begins with the node's name.
    """
    node = node_of(environ)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        with own_folder(scratch_dir(config.cluster.scratch_dir, environ)) as folder:
            began_s = time.monotonic()
            tally = copy_all(config.launch.stage, folder / _DATA, config.launch.stage_check)
            places = {source: str(folder / _DATA / Path(source).name) for source in config.launch.stage}
            took_s = round(time.monotonic() - began_s, 3)
            print(json.dumps(asdict(Copied(node, str(folder), places, tally.bytes, tally.files, took_s))), flush=True)
            (until or sys.stdin.buffer).read()
            _ignore_signals()
    except _Stop:
        return 128 + signal.SIGTERM
    except HpcmmError as error:
        raise HpcmmError(f"{node}: {error}") from error
    return 0


def _stop(_number: int, _frame: FrameType | None) -> None:
    _ignore_signals()  # the copy is removed now
    raise _Stop


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def collect(run: RunDir, count: int, lines: Iterable[str]) -> bool:
    """In the batch script: wait until ``count`` nodes have said that they have their copy, and write ``staged.json``.

    Prints how much was copied, and how fast on the slowest node. False if a node has not: it has said why itself.
    """
    copied: dict[str, Copied] = {}
    for line in lines:
        try:
            each = Copied(**json.loads(line))
        except (ValueError, TypeError):
            print(line, end="", flush=True)  # of a site's own, which srun runs before the command
            continue
        copied[each.node] = each
        if len(copied) == count:
            break
    if len(copied) < count:
        print(f"{len(copied)} of {_counted(count, 'node')} {'has' if count == 1 else 'have'} a copy of launch.stage.")
        return False
    write_json(run.staged, {"nodes": {node: asdict(each) for node, each in sorted(copied.items())}}, indent=1)
    print(_summary([*copied.values()]), flush=True)
    return True


def _summary(copied: Sequence[Copied]) -> str:
    slowest = max(copied, key=lambda each: each.took_s)
    rate = f", {_amount(slowest.bytes / slowest.took_s)}/s" if slowest.took_s else ""
    where = (
        f"each of {len(copied)} nodes; the slowest, {slowest.node}," if len(copied) > 1 else f"{slowest.node}, which"
    )
    said = (
        f"Staged {_amount(slowest.bytes)} in {_counted(slowest.files, 'file')} on {where} took "
        f"{slowest.took_s:.1f} s{rate}."
    )
    other = next((each for each in copied if (each.bytes, each.files) != (slowest.bytes, slowest.files)), None)
    if other is not None:
        said += f" {other.node} sees other data there: {_amount(other.bytes)} in {_counted(other.files, 'file')}."
    return said
