"""In Pythons that a rank starts, such as those of ``torchrun``: tell where they stand, and annotate them.

The folder of this file stands first on their ``PYTHONPATH``. It delays the start of each of them, of any version, so it
imports nothing that is not built into Python, and needs no more than Python 3.6. Without a profiler nothing is
annotated. The ``sitecustomize`` that this file hides is run as ever. The rank itself listens by :func:`listen`, too.
"""

import _thread
import faulthandler
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing would delay each start
    from collections.abc import Iterable, Mapping
    from types import FrameType
    from typing import Any

LISTENS_AT = "HPCMM_STACKS"
"""The environment variable that tells where to introduce oneself: a file of the process in front of the rank, its
inode, and the signal by which that process asks if nothing else helps."""

_C10D = "torch.distributed.distributed_c10d"
_MOST_GROUPS = 64
_MOST_FRAMES = 100
_MOST_RANKS = 1024
"""Of a group whose members are told."""
_MOST_START_S = 10.0
_SIGTERM = 15


def memory() -> int:
    """A file without a name, for what one process leaves to another that opens it by ``/proc``: it is appended to."""
    try:
        number = os.memfd_create("hpcmm")
    except (AttributeError, OSError):  # a Python that was built for an older C library, or an older kernel
        import tempfile  # noqa: PLC0415 -- rarely needed

        with tempfile.TemporaryFile(buffering=0) as file:
            number = os.dup(file.fileno())
    try:
        return os.open(f"/proc/self/fd/{number}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    finally:
        os.close(number)


def opened(place: str, inode: int, flags: int) -> int:
    """The file at a place in ``/proc``. Raises OSError, also if another one has taken that place."""
    number = os.open(place, flags | os.O_CLOEXEC)
    if os.fstat(number).st_ino != inode:
        os.close(number)
        raise FileNotFoundError(place)
    return number


def listen(*, is_rank: bool = False) -> None:
    """From now on a thread tells where the main thread stands, and the numbers of steps and collectives, when asked.

    It sleeps in a pipe until then. While C code holds Python's lock it cannot answer: for that case a signal is set
    that only that thread gets, so that no system call of the program's is interrupted. No thread's stack changes then,
    so that a handler in C can write them all. Does nothing if no process of this machine listens.

    ``is_rank``: this is the process that was launched, which leaves its stacks at SIGTERM in a place of its own.
    """
    try:
        place, inode, number = os.environ[LISTENS_AT].split(":")
        introductions = opened(place, int(inode), os.O_WRONLY | os.O_APPEND)
        if os.fstat(introductions).st_nlink:  # it has a name, and so is another one
            os.close(introductions)
            return
    except (KeyError, ValueError, OSError):
        return
    try:
        _listeners.append(_Listener(introductions, int(number), is_rank=is_rank))
    except (OSError, RuntimeError, ValueError) as error:  # no room, no thread: the program itself needs none of this
        print(f"hpcmm: process {os.getpid()} will not tell where it stands ({error}).", file=sys.stderr)
    finally:
        os.close(introductions)


class _Listener:
    """The files by which this process is asked and answers, and the thread that does."""

    def __init__(self, introductions: int, number: int, *, is_rank: bool) -> None:
        self._main, self._introductions = _thread.get_ident(), introductions
        self._stack, self._told = memory(), memory()
        self._questions, self._ask = os.pipe()
        self._inodes = {each: os.fstat(each).st_ino for each in (self._stack, self._told, self._questions, self._ask)}
        self._is_rank = is_rank
        faulthandler.register(number, file=self._stack, all_threads=True, chain=False)
        signals = __import__("_signal")
        if not is_rank and signals.getsignal(_SIGTERM) == signals.SIG_DFL:
            faulthandler.register(_SIGTERM, file=self._stack, all_threads=True, chain=True)
        # Not by the module threading: a program may wait for all of its threads.
        self._introduced = _thread.allocate_lock()
        self._introduced.acquire()
        _thread.start_new_thread(self._answer, ())
        self._introduced.acquire(True, _MOST_START_S)  # C code may hold Python's lock from now on

    def close(self) -> None:
        """In a process that this one has started by a fork, which has no such thread."""
        for number in self._inodes:
            if self._is_there(number):
                os.close(number)

    def _is_there(self, number: int) -> bool:
        """Whether the program has not closed this file, as some close all that they do not know."""
        try:
            return os.fstat(number).st_ino == self._inodes[number]
        except OSError:
            return False

    def _answer(self) -> None:
        """Say who answers, then answer what comes by two lines."""
        try:
            files = {name: (number, self._inodes[number]) for name, number in self._files()}
            thread = _thread.get_native_id() if hasattr(_thread, "get_native_id") else 0
            itself = {"pid": os.getpid(), "thread": thread, "is_rank": self._is_rank, "files": files}
            _tell(self._introductions, dict(itself, **_place_by_environment()))
        finally:
            self._introduced.release()
        try:
            while self._is_there(self._questions) and os.read(self._questions, 64) and self._is_there(self._told):
                frame = sys._current_frames().get(self._main)
                _tell(self._told, {"stack": _stack_of(frame)})
                values = {"step": step_begun(), "groups": _collectives(), "spins": _uses_gpu(), "name": _name()}
                _tell(self._told, dict(_place(), **values, **exchanges(frame)))
                del frame  # it would keep what it holds
        except OSError:
            return

    def _files(self) -> "tuple[tuple[str, int], ...]":
        return ("stack", self._stack), ("told", self._told), ("ask", self._ask)


_listeners: "list[_Listener]" = []


def _after_fork() -> None:
    is_heard = bool(_listeners)
    while _listeners:
        _listeners.pop().close()
    if is_heard:
        listen()


def _tell(told: int, values: "dict[str, object]") -> None:
    """By a line that ``ast.literal_eval`` reads."""
    os.write(told, repr(values).encode("utf-8", "backslashreplace") + b"\n")


def _stack_of(frame: "FrameType | None") -> str:
    """As faulthandler writes it."""
    lines = ["Stack (most recent call first):"]
    while frame is not None and len(lines) <= _MOST_FRAMES:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
        frame = frame.f_back
    return "\n".join(lines) + "\n"


def _place_by_environment() -> "dict[str, object]":
    numbers = {"rank": os.environ.get("RANK", ""), "world": os.environ.get("WORLD_SIZE", "")}
    return {name: int(text) if text.isdecimal() else None for name, text in numbers.items()}


def _place() -> "dict[str, object]":
    """Rank and number of ranks: by its process group, if it has joined one, else by its environment."""
    c10d = sys.modules.get(_C10D)
    try:
        if c10d is not None and c10d.is_initialized():
            return {"rank": int(c10d.get_rank()), "world": int(c10d.get_world_size()), "joined": True}
    except Exception:  # it may just be imported
        return _place_by_environment()
    return _place_by_environment()


def _name() -> str:
    """As multiprocessing calls this process; empty if it did not start it."""
    process = sys.modules.get("multiprocessing.process")
    try:
        return "" if process is None or process.parent_process() is None else str(process.current_process().name)
    except Exception:  # as above
        return ""


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")
    try:
        return torch is not None and bool(torch.cuda.is_initialized())
    except Exception:  # as above
        return False


def _collectives() -> "dict[str, int]":
    """The number of the latest collective in each process group of several ranks, by the group's name."""
    c10d = sys.modules.get(_C10D)
    found: dict[str, int] = {}
    try:
        for group in list(c10d._world.pg_map) if c10d is not None else []:
            if group.size() > 1 and len(found) < _MOST_GROUPS:
                found[str(group.group_name)] = int(group._get_sequence_number_for_group())
    except Exception:  # internals of PyTorch's, which another version may have changed
        return found
    return found


def exchanges(frame: "FrameType | None") -> "dict[str, Any]":
    """What a thread waits in (``waits``: op, group, number, peer), what groups are for (``marks``: name, ranks), and
    in whose numbers sends and receives count (``mixed``).

    The call that waits tells its group. Of a wait for what has begun before, PyTorch's flight recorder tells which
    collectives of which groups are not over, if this version has one.
    """
    c10d: Any = sys.modules.get(_C10D)
    nothing: dict[str, Any] = {"waits": [], "marks": {}, "mixed": []}
    try:
        if frame is None or c10d is None or not c10d.is_initialized():
            return nothing
        open_, mixed = _recorded()
        called = _call_that_waits(frame, c10d)
        waits = [called] if called else (open_ or [("wait", "", None, None)]) if _waits_for_work(frame, c10d) else []
        groups = {str(each.group_name): each for each in list(c10d._world.pg_map) if each.size() > 1}
        names = {**{name: "" for _, name, _, _ in waits}, **_names(groups)}
        marks = {name: (names[name], _ranks_of(groups[name], c10d)) for name in names if name in groups}
        return {"waits": waits[:_MOST_GROUPS], "marks": marks, "mixed": mixed[:_MOST_GROUPS]}
    except Exception:  # internals of PyTorch's, which another version may have changed
        return nothing


def exchange_that_failed(frame: "FrameType") -> "tuple[str, str, int | None]":
    """Of a call that raised: its name, the group and the other rank, as far as it is one of ``torch.distributed``."""
    try:
        name, group, _, peer = _call_that_waits(frame, sys.modules[_C10D]) or ("", "", None, None)
    except Exception:  # as above
        return "", "", None
    return name, group, peer


def _recorded() -> "tuple[list[tuple[str, str, int | None, int | None]], list[str]]":
    """By the flight recorder: the oldest collective of each group that is not over, and groups with gaps in numbers."""
    import json  # noqa: PLC0415 -- not before somebody asks

    found: dict[str, tuple[str, str, int | None, int | None]] = {}
    last: dict[str, int] = {}
    mixed: dict[str, None] = {}
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        recorder = getattr(sys.modules["torch._C._distributed_c10d"], dump, None)
        entries = json.loads(recorder(includeCollectives=True, onlyActive=False)).get("entries", []) if recorder else []
        for entry in entries:
            group, number = str(entry["process_group"][0]), int(entry["collective_seq_id"])
            if not entry["is_p2p"]:
                if last.get(group, number - 1) != number - 1:
                    mixed[group] = None
                last[group] = number
            if not entry["retired"] and entry["state"] != "completed":
                op = str(entry["profiling_name"]).partition(":")[2].partition(" ")[0]
                found.setdefault(group, (op, group, None if entry["is_p2p"] else number, None))
    return list(found.values()), list(mixed)


def _call_that_waits(frame: "FrameType", c10d: "Any") -> "tuple[str, str, int | None, int | None] | None":
    """The innermost call of ``torch.distributed`` with its group; or the receive or send whose work is waited for."""
    passed = _passed(frame.f_locals.values(), c10d) if _method_called(frame) == "wait" else None
    if passed is not None:
        return passed
    outer: FrameType | None = frame
    for _ in range(_INNERMOST):
        if outer is None:
            break
        name = outer.f_code.co_name
        # Only there, for whose variables are looked at keeps them until it returns.
        if str(outer.f_globals.get("__name__", "")).startswith("torch.distributed.") and not _asks(name):
            values = outer.f_locals
            if "group" in values:
                group, name = values["group"], name.lstrip("i")
                if not isinstance(group, c10d.ProcessGroup):
                    group = c10d.group.WORLD  # None once it has been left
                peer = values.get({"send": "dst", "recv": "src"}.get(name, ""))
                return name, str(getattr(group, "group_name", "")), None, peer if isinstance(peer, int) else None
        outer = outer.f_back
    return None


def _asks(name: str) -> bool:
    """Whether a function of ``torch.distributed`` waits for nobody."""
    return name.lstrip("_").partition("_")[0] in {"get", "is", "set"}


def _passed(values: "Iterable[Any]", c10d: "Any") -> "tuple[str, str, int | None, int | None] | None":
    """What lists among some values say of sends and receives that began together; a receive, if there is one."""
    listed = [each for value in list(values) if isinstance(value, list) for each in value]
    operations = [each for each in listed if isinstance(each, c10d.P2POp)]
    for each in sorted(operations, key=lambda operation: str(operation.op.__name__)):  # irecv, isend
        return each.op.__name__.lstrip("i"), str(c10d._group_or_default_group(each.group).group_name), None, each.peer
    return None


def _waits_for_work(frame: "FrameType", c10d: "Any") -> bool:
    """Whether C++ code is in a wait for collectives: of a work, of a tensor that one brings, or in backward."""
    caller = frame.f_back
    named = {frame.f_code.co_name, caller.f_code.co_name if caller is not None else ""}
    if _method_called(frame) == "wait" or named & {"_engine_run_backward", "wait_tensor"}:
        return True
    if not str(frame.f_globals.get("__name__", "")).startswith("deepspeed."):
        return False
    # Its handles have their waits called by a function that also marks them for profilers.
    return any(isinstance(getattr(value, "__self__", None), c10d.Work) for value in list(frame.f_locals.values()))


_INNERMOST = 12


def _method_called(frame: "FrameType") -> str:
    """The name of the method that a frame calls just now, if its arguments are simple; else empty."""
    import dis  # noqa: PLC0415 -- not before somebody asks

    name = ""
    for each in dis.get_instructions(frame.f_code):
        if each.offset >= frame.f_lasti:
            break
        if each.opname in {"LOAD_METHOD", "LOAD_ATTR"}:
            name = str(each.argval)
        elif not each.opname.startswith(_SIMPLE):
            name = ""
    return name


_SIMPLE = ("LOAD_CONST", "LOAD_FAST", "KW_NAMES", "PRECALL", "CACHE", "PUSH_NULL")


def _names(groups: "Mapping[str, Any]") -> "dict[str, str]":
    """What groups are for, as the program has named them, or the library that made them has described them."""
    annotated: Any = sys.modules.get("hpcmm.annotate.groups")
    named = annotated.named_groups() if annotated is not None else {}
    found = {}
    for name, group in list(groups.items())[:_MOST_GROUPS]:
        described = str(getattr(group, "group_desc", ""))
        word = named[name].name if name in named else "" if described in {"undefined", "default_pg"} else described
        if word:
            found[name] = word
    return found


def _ranks_of(group: "Any", c10d: "Any") -> "list[int]":
    """In order; none of them if they are too many to tell."""
    return sorted(map(int, c10d.get_process_group_ranks(group))) if group.size() <= _MOST_RANKS else []


def step_begun() -> "int | None":
    """The step of ``hpcmm.annotate`` that the program was in last, if it has imported that."""
    ranges = sys.modules.get("hpcmm.annotate.ranges")
    try:
        return None if ranges is None else int(ranges.step_begun().__index__())
    except Exception:  # it was in none, or gave it another name than a number
        return None


class _AtImportOfTorch:
    """Looks on at imports, and finds no module itself."""

    done = False

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG003
        if name == "torch" and not cls.done:
            cls.done = True
            _annotate()


def _annotate() -> None:
    try:
        from hpcmm.annotate.auto_instrument import annotate_program  # noqa: PLC0415 -- not before it is needed

        annotate_program()
    except Exception as error:  # the program itself needs none of this
        print(f"hpcmm: process {os.getpid()} is not annotated ({error}).", file=sys.stderr)


def _run_hidden() -> None:
    """Run the next ``sitecustomize`` on the path, in this one's place."""
    from importlib.machinery import PathFinder  # noqa: PLC0415 -- the rank itself has no need of it

    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 -- pathlib would delay each start
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec  # noqa: PLC0415

        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
if __name__ == "sitecustomize":
    listen()
    if "NVTX_INJECTION64_PATH" in os.environ and sys.version_info >= (3, 9):
        sys.meta_path.insert(0, _AtImportOfTorch)
    _run_hidden()
