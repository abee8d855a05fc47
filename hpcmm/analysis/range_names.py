"""What the name of an NVTX range says: whether it counts repetitions, and which part of a step it may be; and where the
steps begin of a loop that names its parts alone.

Names are a program's own. Nothing here is certain, so that who asks also looks at the times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from hpcmm.reports.report import MAX_NAME_LENGTH
from hpcmm.text import visible

NUMBER = "{n}"
"""Stands for a number that differs from range to range of one kind: ``iteration {n}``."""
_VALUE = r"[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
_AFTER = r"(?:(?<=[=:(\[,])|(?<=[=:,]\s))"
"""Where a sign, or a word for a number, belongs to a value: ``loss=-0.3``, but ``step-3``."""
_HEXADECIMAL = "0[xX][0-9a-fA-F]+"
_NUMBER = rf"{_HEXADECIMAL}|(?:{_AFTER}[-+])?{_VALUE}|{_AFTER}[-+]?(?i:nan|inf)\b"
_NUMBERS = re.compile(_NUMBER)
"""As programs write them: 12, 0x1f, 0.31, 1e-4, nan."""
_GROUPED = "[1-9][0-9]{0,2}(?:[,_'][0-9]{3})+(?![0-9])"
_NUMBERS_IN_GROUPS = re.compile(f"{_GROUPED}|{_NUMBER}")
"""The same, and 12,345 as one number."""
_SEPARATED = re.compile("[0-9]+(?:[,_'][0-9]+)+")
_WHOLE = re.compile(f"{_HEXADECIMAL}|{_GROUPED}|[0-9]+")
_ANSI = re.compile(r"(?:\x1b|\\x1b)(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\^_])")
"""What steers a terminal, as it is or as the escape that a report's text has for it."""
_ESCAPE = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SUFFIX = re.compile(r", (?:seq|op_id|sizes|input_op_ids) = .*", re.DOTALL)
"""What PyTorch's emit_nvtx appends to an operator's name; it differs from call to call."""
MOST_CALLS_A_NAME = 1.5
"""A number that gives nearly each range a name of its own counts; one of a layer comes again in each step."""
MOST_NAMES = 200
"""Of one kind: with more, the numbers are folded whatever they are."""
MOST_DIGITS = 18
LONGEST_KIND = 200
"""Of a name that was cut."""

_STEPS = frozenset({"step", "steps", "iter", "iters", "iteration", "iterations", "it", "batch", "minibatch"})
_STEPS_IN_ONE = re.compile("^(train|training|global|profiler)?(step|iter|iteration|minibatch|batch)$")
_NO_STEPS = frozenset(
    re.findall(
        "[a-z]+",
        "adam adamw backward bwd block bucket checkpoint ckpt chunk clip collate data dataloader eval evaluate "
        "evaluation expert fetch forward fwd get grad gradient head layer load loader loading log logging loss lr "
        "micro microbatch next opt optim optimizer prefetch read request sample save scheduler sgd sub substep test "
        "testing val valid validate validation zero",
    )
)
"""Words of a name that is not a step's, whatever else it says."""
_METRICS = frozenset({"acc", "accuracy", "grad", "gradient", "loss", "lr", "norm", "ppl", "time"})
"""Words of a value that a program adds to a step's name: ``step 12 loss=0.31``."""
_TOLD = re.compile(r"([A-Za-z_]\w*)\s*[=:]\s*\{n\}|\b(acc|loss|lr|norm|ppl)\s+\{n\}")
_LONGER = frozenset({"epoch", "epochs", "stage", "phase", "warmup"})
"""Words of a name that holds steps, if it does not name the step as well."""

_LIBRARIES = frozenset(
    {
        "cccl",
        "cub",
        "cublas",
        "cublaslt",
        "cudnn",
        "cudnn8",
        "cufft",
        "curand",
        "cusolver",
        "cusparse",
        "cutensor",
        "mpi",
    }
    | {"nccl", "nvshmem", "nvtx", "rccl", "thrust", "ucx", "ucp", "hpcmm.comm", "hpcmm.capture", "nvtx python gc"}
    | {"dali", "myelin", "nvjpeg", "tensorrt", "triton"}
)
"""Domains, in lower case, whose ranges tell of a library's calls."""


def plain(name: str) -> str:
    """A range's name without what steers a terminal, so that the digits of that count as none of its numbers."""
    if "\\" not in name and name.isprintable():
        return name
    return visible(_ESCAPE.sub("\N{REPLACEMENT CHARACTER}", _ANSI.sub("", name)))


def _of_kind(name: object) -> str:
    return _SUFFIX.sub("", plain(str(name)))


def _number_patterns(names: Sequence[str]) -> list[re.Pattern[str]]:
    """How the numbers of each name are to be read: ``1,234`` is one unless a name of its kind has ``1,23``."""
    if not any(map(_SEPARATED.search, names)):
        return [_NUMBERS] * len(names)
    kinds = [_NUMBERS.sub(NUMBER, _SEPARATED.sub(NUMBER, name)) for name in names]
    grouped = re.compile(_GROUPED)
    lists = {
        kind
        for kind, name in zip(kinds, names, strict=True)
        if not all(map(grouped.fullmatch, _SEPARATED.findall(name)))
    }
    return [_NUMBERS if kind in lists else _NUMBERS_IN_GROUPS for kind in kinds]


def templates(names: Sequence[object]) -> npt.NDArray[np.object_]:
    """Each name with :data:`NUMBER` for its numbers if others differ by these alone; without emit_nvtx's additions."""
    own = [_of_kind(name) for name in names]
    folded = [numbers.sub(NUMBER, name) for name, numbers in zip(own, _number_patterns(own), strict=True)]
    # Where the reader has cut a long name depends on how many digits come before: the end is no part of its kind.
    folded = [
        kind[:LONGEST_KIND] if len(str(name)) >= MAX_NAME_LENGTH else kind
        for kind, name in zip(folded, names, strict=True)
    ]
    kinds: dict[str, set[str]] = {}
    for kind, name in zip(folded, own, strict=True):
        kinds.setdefault(kind, set()).add(name)
    alike = [kind if len(kinds[kind]) > 1 else name for kind, name in zip(folded, own, strict=True)]
    return np.array(alike, dtype=object)


def without_counters(name: pd.Series) -> npt.NDArray[np.object_]:
    """The name of each range (categories) without the numbers that count: ``iteration {n}``, but ``layer 3``.

    Of several numbers in a name, those that tell most ranges apart are folded first, until what is left comes again.
    """
    categories = [_of_kind(each) for each in name.cat.categories]
    codes = name.cat.codes.to_numpy()
    calls = np.bincount(codes[codes >= 0], minlength=len(categories))
    patterns = _number_patterns(categories)
    kinds: dict[str, list[int]] = {}
    for index, (each, numbers) in enumerate(zip(categories, patterns, strict=True)):
        kinds.setdefault(numbers.sub(NUMBER, each), []).append(index)
    found = np.array(categories, dtype=object)
    for kind, members in kinds.items():
        if NUMBER in kind and len(members) > 1:
            alike = [categories[index] for index in members]
            found[members] = _folded(alike, int(calls[members].sum()), patterns[members[0]])
    return found[codes] if len(codes) else np.empty(0, dtype=object)


_MICRO_BATCHES = frozenset({"backward", "batch", "bwd", "forward", "fwd", "microbatch"})
"""Words of a part of a step behind which the number of a micro-batch stands."""


def without_micro_batches(name: str) -> str:
    """A phase's name without the number of its micro-batch: ``fwd {n}`` for ``fwd 3``."""

    def folded(number: re.Match[str]) -> str:
        before = _WORD.findall(name[: number.start()])
        return NUMBER if before and before[-1].lower() in _MICRO_BATCHES else number[0]

    return _NUMBERS.sub(folded, name)


def _folded(names: list[str], calls: int, pattern: re.Pattern[str]) -> list[str]:
    """``names`` of one kind, with as many of their numbers folded as it takes."""
    texts = [pattern.split(name) for name in names]
    numbers = np.array([pattern.findall(name) for name in names], dtype=object)
    open_places = list(range(numbers.shape[1]))
    while open_places:
        distinct = len({tuple(row) for row in numbers})
        if distinct <= MOST_NAMES and calls > MOST_CALLS_A_NAME * distinct:
            break
        place = max(open_places, key=lambda each: len(set(numbers[:, each])))
        numbers[:, place] = NUMBER
        open_places.remove(place)
    return ["".join(_woven(parts, row)) for parts, row in zip(texts, numbers, strict=True)]


def _woven(parts: Sequence[str], numbers: Sequence[str]) -> list[str]:
    woven = [parts[0]]
    for number, part in zip(numbers, parts[1:], strict=True):
        woven += [number, part]
    return woven


def counted(names: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """The number of each name that goes up from one to the next, in the names' order; None if none does.

    Of several such numbers it is the one behind a word for a step, else the one that goes up by one most often.
    """
    own = [_of_kind(name) for name in names]
    patterns = _number_patterns(own)
    found = [numbers.findall(name) for name, numbers in zip(own, patterns, strict=True)]
    width = len(found[0]) if found else 0
    if not width or any(len(each) != width for each in found):
        return None
    best, best_merit = None, (False, -1.0)
    for place, before in zip(range(width), patterns[0].split(own[0]), strict=False):
        told = [each[place] for each in found]
        if not all(map(_WHOLE.fullmatch, told)):
            continue
        values = list(map(_value, told))
        if max(values) >= 10**MOST_DIGITS:
            continue
        column = np.array(values, dtype=np.int64)
        difference = np.diff(column)
        share = float((difference == 1).mean()) if len(difference) else 1.0
        merit = (_says_step(before), share)
        if (difference > 0).all() and merit > best_merit:
            best, best_merit = column, merit
    return best


def _value(number: str) -> int:
    return int(number, 16) if number[1:2] in {"x", "X"} else int(re.sub("[,_']", "", number))


@lru_cache(maxsize=4096)
def words(name: str) -> frozenset[str]:
    """The words of a name in lower case: ``ProfilerStep#3`` has ``profiler`` and ``step``."""
    return frozenset(word.lower() for word in _WORD.findall(name.replace(NUMBER, " ")))


def looks_like_a_step(name: str) -> bool:
    """Whether a name says that the range is one repetition of a training loop."""
    return _says_step(_without_metrics(name)) and not never_a_step(name)


def _says_step(name: str) -> bool:
    told = words(name)
    return bool(told & _STEPS) or any(_STEPS_IN_ONE.match(word) is not None for word in told)


def never_a_step(name: str) -> bool:
    """Whether a name says that the range is something else than one repetition of a training loop."""
    told = words(_without_metrics(name))
    return bool(told & _NO_STEPS) or is_operator(name) or (bool(told & _LONGER) and not _says_step(name))


def _without_metrics(name: str) -> str:
    """A name without the values that follow the word for a step; as it is if no such word is left."""

    def kept(told: re.Match[str]) -> str:
        said = words(told[1] or told[2])
        is_metric = not said & (_NO_STEPS - _METRICS) or "time" in said
        return "" if is_metric and not _says_step(told[1] or told[2]) else told[0]

    rest = _TOLD.sub(kept, name)
    return rest if _says_step(rest) else name


def is_operator(name: str) -> bool:
    """Whether a range is an operator's or a function's of a library, of which each step has hundreds."""
    return "::" in name or name.startswith(("autograd", "cuda", "nccl", "cudnn", "cublas"))


def is_library(domain: str) -> bool:
    """Whether a domain is a library's, whose ranges are no part of a program's loop."""
    return domain.lower() in _LIBRARIES


def matching(name: pd.Series, expression: str) -> npt.NDArray[np.bool_]:
    """Which names ``expression`` matches as a whole; if it matches none, which it matches in part.

    Each distinct name is matched once, and is short, since no more of it is read. What holds :data:`NUMBER` is no
    expression, but what a message calls the ranges.
    """
    categories = [plain(str(each)) for each in name.cat.categories]
    if NUMBER in expression:
        ways = [templates(categories) == expression]
    else:
        compiled = re.compile(expression)
        ways = [
            np.array([matches(each) is not None for each in categories], dtype=np.bool_)
            for matches in (compiled.fullmatch, compiled.search)
        ]
    for way in ways:
        found = np.append(way, False)
        if found.any():
            chosen: npt.NDArray[np.bool_] = found[name.cat.codes.to_numpy()]
            return chosen
    return np.zeros(len(name), dtype=np.bool_)


_LOADING = frozenset({"data", "dataloader", "dataloading", "fetch", "loader", "loading", "prefetch"})
_READS = frozenset({"fetch", "get", "load", "next", "generator", "read", "wait", "waiting"})
_EXAMPLES = frozenset({"batch", "batches", "example", "examples", "input", "inputs", "sample", "samples"})
_LOADS_ALONE = frozenset({"load", "loads", "read", "reading", "reads"})
_NO_LOADING = frozenset({"copy", "cuda", "device", "fsdp", "gpu", "norm", "parallel", "to", "transfer"})
_SAVES = frozenset({"checkpoint", "checkpointing", "ckpt"})
_OPTIMIZER = frozenset({"adam", "adamw", "optim", "optimize", "optimizer", "sgd"})
_OPTIMIZER_ALONE = frozenset({"opt", "step", "update"})
"""``opt_step`` is one, but the name of a model may have the word, too."""


@lru_cache(maxsize=4096)
def part_of_a_step(name: str) -> str:
    """Which of hpcmm's own phases a program's phase is: data, forward, backward, optimizer, checkpoint; else empty."""
    told = words(_without_metrics(name))
    if told & {"backward", "bwd"} and told & {"forward", "fwd"}:
        return ""
    if told & _SAVES and not told & {"activation", "recompute", "forward", "backward"}:
        return "checkpoint"
    loads = told & _LOADING or (told & _READS and told & _EXAMPLES) or "__next__" in name
    if (loads or (told and told <= _LOADS_ALONE)) and not told & _NO_LOADING:
        return "data"
    if "opt" in told and told <= _OPTIMIZER_ALONE:
        return "optimizer"
    for part, said in (("backward", {"backward", "bwd"}), ("forward", {"forward", "fwd"}), ("optimizer", _OPTIMIZER)):
        if told & said:
            return part
    return ""


_COMMUNICATES = frozenset(
    {"allgather", "allreduce", "barrier", "bcast", "broadcast", "collective", "collectives", "comm", "communicate"}
    | {"communication", "exchange", "irecv", "isend", "receive", "recv", "reducescatter", "send"}
)
_TOGETHER = ({"all", "gather"}, {"all", "reduce"}, {"reduce", "scatter"})
"""Words that say together that ranks exchange something, whatever stands between them."""
_ALL_TO_ALL = re.compile("all[^a-z]?to[^a-z]?all", re.IGNORECASE)
_GRADIENTS = frozenset({"grad", "grads", "gradient", "gradients"})


@lru_cache(maxsize=4096)
def communicates(name: str) -> bool:
    """Whether a program's phase is communication with other ranks, by what it is called."""
    told = words(name)
    return (
        bool(told & _COMMUNICATES)
        or any(told >= said for said in _TOGETHER)
        or _ALL_TO_ALL.search(name) is not None
        or ("sync" in told and bool(told & _GRADIENTS))
    )


_EVALUATES = frozenset({"eval", "evaluate", "evaluation", "test", "testing", "val", "valid", "validate", "validation"})
MIN_CYCLES, REGULAR = 5, 0.9
"""Ranges that come in the same numbers in this share of so many repetitions are parts of a loop."""
FREQUENT = 0.5
"""What comes in fewer repetitions, as an evaluation does, is no part of the loop."""
MIN_RUN = 2
"""Repetitions of another kind come in runs if there are so many one after the other, as a mean."""


class Cycles(NamedTuple):
    """Repetitions of a loop."""

    begins: npt.NDArray[np.intp]
    """The place of each one's first part among all parts."""
    is_step: npt.NDArray[np.bool_]


def cycles_by_rule(labels: pd.Series, length_ns: pd.Series) -> dict[str, Cycles]:
    """The steps of a loop by each range that can tell where they begin, the best one first; empty if none is clear.

    ``labels``: the outermost ranges of a thread in the order of time. A step begins after the optimizer's longest
    range; without one with the loading of a batch, else with a forward pass. The other rules give as many steps: ranks
    that do not have the first range may be cut by them. Numbers are left out of what a rule is called.
    """
    taken_ns = length_ns.groupby(labels).sum().sort_values(ascending=False)
    by_part: dict[str, list[str]] = {}
    for label in map(str, taken_ns.index):
        if not words(label) & _EVALUATES:
            by_part.setdefault(part_of_a_step(label), []).append(label)
    found: dict[str, Cycles] = {}
    if not {"optimizer", "data"} & by_part.keys() and not {"forward", "backward"} <= by_part.keys():
        return found
    names = labels.to_numpy(object)
    for label in (label for part in ("optimizer", "data", "forward") for label in by_part.get(part, [])):
        begins = np.flatnonzero(names == label)
        if part_of_a_step(label) == "optimizer":
            begins = np.append(0, begins + 1)
            begins = begins[begins < len(names)]
        cycles = Cycles(begins, _steps_among(labels, begins, label))
        count, best = cycles.is_step.sum(), next((each.is_step.sum() for each in found.values()), 0)
        if not found and not count:
            break  # another rule would cut the loop into micro-batches
        if not found or REGULAR * best - 1 <= count <= best / REGULAR + 1:
            found.setdefault(_NUMBERS.sub(NUMBER, label), cycles)
    return found


def _steps_among(labels: pd.Series, begins: npt.NDArray[np.intp], rule: str) -> npt.NDArray[np.bool_]:
    """Which repetitions, that have their ``begins`` at positions, are steps; a part of one at either end is none.

    It is clear if several of ``labels``, none of which looks like a step itself, come equally often in almost all.
    """
    steps = np.zeros(len(begins), np.bool_)
    if len(begins) < MIN_CYCLES or any(map(looks_like_a_step, labels.unique())):
        return steps
    cycle = np.searchsorted(begins, np.arange(len(labels)), side="right")
    table = pd.crosstab(cycle[cycle > 0], labels.to_numpy(object)[cycle > 0])
    trains = np.ones(len(table), np.bool_) if part_of_a_step(rule) == "optimizer" else _trains(table)
    counts = table.to_numpy()[trains]
    if len(counts) < MIN_CYCLES:
        return steps
    alike = counts == np.median(counts, axis=0)
    frequent = (counts > 0).mean(axis=0) >= FREQUENT
    if frequent.sum() > 1 and (alike[1:-1].mean(axis=0) >= REGULAR)[frequent].all():
        is_whole = np.ones(len(counts), np.bool_)
        is_whole[[0, -1]] = alike[[0, -1]][:, frequent].all(axis=1)
        steps[trains] = is_whole
    return steps


def _trains(table: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which repetitions, of which ``table`` counts the ranges by label, train; none if that is not clear.

    Batches of a validation may be called as those of the training, but for what only these have: a backward pass, or
    whatever the others lack several times in a row.
    """
    present = table.to_numpy() > 0
    labels = [str(label) for label in table.columns]
    is_backward = [part_of_a_step(label) == "backward" and not words(label) & _EVALUATES for label in labels]
    trains: npt.NDArray[np.bool_] = np.logical_or.reduce(present[:, is_backward], axis=1)
    if trains.sum() >= MIN_CYCLES:
        # A pipeline's micro-batches have their forward passes first: each is followed by one without a backward pass.
        follow = (trains[1:] & trains[:-1]).sum() >= FREQUENT * trains.sum()
        return trains if trains.all() or follow else np.zeros_like(trains)
    trains = np.ones(len(table), np.bool_)
    for has in present.T:
        lacks = ~has[int(has.argmax()) :]  # what begins later is no sign of another loop before
        if not _in_runs(has) or not _in_runs(lacks):
            continue
        if has.mean() < FREQUENT:
            if _runs(has) > 1:
                return np.zeros_like(trains)
        else:
            trains &= has
    return trains


def _runs(mask: npt.NDArray[np.bool_]) -> int:
    return int(mask[:1].sum() + (mask[1:] & ~mask[:-1]).sum())


def _in_runs(mask: npt.NDArray[np.bool_]) -> bool:
    return bool(mask.any()) and bool(mask.sum() >= MIN_RUN * _runs(mask))
