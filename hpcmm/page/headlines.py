"""The sentences that every output begins with, and how numbers and foreign text are written."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import pandas as pd

from hpcmm.analysis import process_groups
from hpcmm.analysis.delay_costs import BETWEEN_STEPS
from hpcmm.analysis.findings import ONE_STEP, computation_has_phases, gpu_doubt, phases_launch
from hpcmm.analysis.gpu_findings import device_name, span_s
from hpcmm.analysis.gpu_trace import counted, traced
from hpcmm.analysis.study import Study, usual_reason, why_failed
from hpcmm.analysis.trace import NOT_LAUNCHED, OTHER, RankTrace
from hpcmm.ranges import write_ranges
from hpcmm.text import visible

MAX_TEXT = 300
"""Characters of a foreign name that are shown."""


def plain(value: object) -> str:
    """Foreign text without control characters (ANSI codes, newlines), cut to :data:`MAX_TEXT`."""
    head = str(value)[: MAX_TEXT + 1]
    text = visible(head)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: object, digits: int = 3) -> str:
    """A number for people: ``digits`` significant digits, thousands separated, nothing for a missing one."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else plain(value)


def seconds(value: float) -> str:
    """A duration with the unit that suits it."""
    if value >= 999.5:
        return f"{value:,.0f} s"
    if value >= 0.9995 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 0.9995e-3 else f"{value * 1e6:.3g} µs"


def percent(value: float) -> str:
    """A share with two significant digits or so."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def size(value: float) -> str:
    """Bytes with the decimal unit that suits them."""
    units = ["B", "kB", "MB", "GB", "TB"]
    index = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    return f"{value / 1000**index:.3g} {units[index]}"


_UNKNOWN = "a process of unknown rank"


def rank_name(rank: int, node: str = "", names: Mapping[int, str] = MappingProxyType({})) -> str:
    """``rank 3 · node2``. A negative number stands for a process of unknown rank, whose name is in ``names``."""
    name = plain(names.get(rank, f"rank {rank}" if rank >= 0 else _UNKNOWN))
    return f"{name} · {plain(node)}" if node else name


def trace_name(trace: RankTrace) -> str:
    """The rank; if it is unknown the process, or its GPU, that stands for it."""
    return plain(trace.name)


def rank_list(ranks: Iterable[object], names: Mapping[int, str] = MappingProxyType({})) -> str:
    """``0-3, 7`` for the ranks 0, 1, 2, 3 and 7; processes of unknown rank by their names."""
    known = {int(str(rank)) for rank in ranks if not pd.isna(rank)}  # type: ignore[call-overload]
    unknown = [rank_name(rank, names=names) for rank in sorted(known) if rank < 0]
    return ", ".join(filter(None, [plain(write_ranges([rank for rank in known if rank >= 0], ", ")), *unknown]))


def headline(study: Study) -> str:
    """The first bottleneck in one sentence, or why there is none."""
    table = study.tables["bottlenecks"]
    if not len(study.steps.numbers):
        return _capture_headline(study) or "No steps to analyse: " + _why_no_steps(study)
    steps = study.steps
    step = f"{seconds(steps.mean_s)} step" if steps.adjoin else f"{seconds(steps.period_s)} from step to step"
    if table.empty:
        told = f"{plain(study.nothing_stands_out(step))}."
        doubt = graphs_line(study) or gpu_doubt(study.traces)
        return f"{told} But {plain(doubt)}." if doubt else told
    row = table.iloc[0]
    lost = f"{seconds(float(row['lost_s_per_step']))} of each {step} ({percent(float(row['step_share']))})"
    several = "s" if "," in str(row["phase"]) else ""
    cause = plain(row["cause"])
    # A phase that is no more than the rest of the step, or that the cause tells already, adds nothing.
    named = row["phase"] and row["phase"] not in {OTHER, BETWEEN_STEPS} and not cause.startswith(f"{row['phase']} of ")
    where = f" in phase{several} {plain(row['phase'])}" if named else ""
    if pd.notna(row["rank"]):
        rank = rank_name(int(row["rank"]), names=study.names)
        on = f" on {plain(row['node'])}" if row["node"] else ""
        return f"{rank[:1].upper()}{rank[1:]}{on} costs {lost}: {cause}{where}."
    if row["node"]:
        return f"Node {plain(row['node'])} costs {lost}: {cause}{where}."
    if " is heavier than " in cause:
        return f"{cause[:1].upper()}{cause[1:]}, which costs {lost}."
    costs = "cost" if cause.endswith("batches") else "costs"
    return f"{cause[:1].upper()}{cause[1:]} {costs} {lost}{where}."


_OF_PROCESS = re.compile(r"^process [0-9]+: ")
"""What a reason begins with if it is of one process of a report."""


def _why_no_steps(study: Study) -> str:
    if study.failed_before_steps:
        return plain(why_failed(study.failed_run))
    why = plain(usual_reason(study.tables["coverage"]))
    if why:
        line = f" The line to add: {study.line_to_add}" if study.line_to_add else ""
        return f"{why}.{_of_collectives(study)}{_of_phases(study)}{line}"
    return "none was closed on all ranks."


_KNOWN_LAST, _MOSTLY_LAST = 8, 0.9
"""Of so many collectives one rank must come last in this share, which hardly happens by chance."""


def _of_collectives(study: Study) -> str:
    """What collectives cost in a capture without steps, and who comes last."""
    table = study.tables["collectives"]
    exposed = table["exposed_wait_s"] + table["exposed_transfer_s"]
    if not exposed.sum():
        return ""
    by_rank = table.groupby("rank")
    span_s = float((by_rank["end_s"].max() - by_rank["start_s"].min()).mean())
    each_s = float(exposed.sum()) / len(by_rank)
    op = str(exposed.groupby(table["op"]).sum().idxmax())
    of_op = table[table["op"] == op]
    waited = float(table["exposed_wait_s"].sum() / exposed.sum())
    told = (
        f" From its first collective to its last a rank spends {seconds(each_s)} of {seconds(span_s)} in them "
        f"({percent(each_s / span_s)}), most of it in {plain(op)}, {number(round(len(of_op) / len(by_rank)))} of them, "
        f"half of at least {size(float(of_op['bytes'].fillna(0).median()))}; {percent(waited)} of it is waiting"
    )
    last = table.drop_duplicates(["op", "group", "sequence"])["late_rank"].dropna().value_counts()
    if last.sum() >= _KNOWN_LAST and last.iloc[0] >= _MOSTLY_LAST * last.sum():
        who = rank_name(int(str(last.index[0])), names=study.names)
        told += f", and {who} comes last in {last.iloc[0]} of {last.sum()}"
    return f"{told}."


_MOST_PHASES = 5


def _of_phases(study: Study) -> str:
    """What phases of a capture without steps take, communication included, the longest first."""
    table = study.tables["phases"]
    name = table["phase"].where(table["within"] == "", table["within"])
    each_s = table.groupby(name)["duration_s"].sum().sort_values(ascending=False) / max(1, table["rank"].nunique())
    if each_s.empty:
        return ""
    told = ", ".join(f"{plain(phase)} {seconds(taken_s)}" for phase, taken_s in each_s.head(_MOST_PHASES).items())
    return f" Phases of a rank, in all: {told}{', ...' if len(each_s) > _MOST_PHASES else ''}."


def mesh_line(study: Study) -> str:
    """How the ranks are laid out, as their process groups tell it; empty if they do not."""
    sizes = process_groups.mesh(study.traces)
    experts = sizes.pop("expert", 0)
    told = [" x ".join(f"{axis} {count}" for axis, count in sizes.items())] if sizes else []
    told += [f"expert {experts}"] if experts else []  # which is a part of the data axis
    return "mesh: " + ", ".join(told) if told else ""


def lost_heading(study: Study) -> str:
    """What the column of losses is called: a capture without steps counts as a whole."""
    return "lost a step" if study.counts_steps else "lost"


def ranges_line(study: Study) -> str:
    """Which part of the run is looked at, and which of the program's own ranges are steps and phases; empty if it is
    all of it, and they are those of hpcmm's annotation."""
    return plain("; ".join(filter(None, (study.window, study.ranges))))


def throughput_line(study: Study) -> str:
    """Tokens, operations and memory; empty if the ranks noted none."""
    return plain(study.throughput)


def exchanged_line(study: Study) -> str:
    """The bytes that a rank exchanges in a step, by what its groups are for; empty if no operation tells its size."""
    table = study.tables.get("comm_bytes")
    table = table[~table["warmup"]] if table is not None and len(table) else None
    if table is None or table.empty:
        return ""
    steps, ranks = table["step"].nunique(), table["rank"].nunique()
    # A group of one rank exchanges nothing, and a message that one rank sends is what another receives.
    table = table[(table["bus_bytes"] > 0) & (table["op"] != "recv")]
    by_axis = table.groupby("axis")["bytes"].sum().sort_values(ascending=False)
    told = [f"{size(float(total) / steps / ranks)} {axis or 'unnamed'}" for axis, total in by_axis.items()]
    return f"exchanged a step and rank: {plain(', '.join(told))}" if told else ""


def coverage_line(study: Study) -> str:
    """How many of the expected reports were read; several of one rank count once for it."""
    status = study.tables["coverage"]["status"]
    rest = status[status != "found"].value_counts()
    told = ", ".join(f"{count} {str(name).replace('_', ' ')}" for name, count in rest.items())
    used, whole = study.ranks_with_steps
    which = study.joined_windows + study.looked_at
    return f"{used} of {whole} ranks with steps" + (f" ({told})" if told else "") + which


def gaps(coverage: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Who, status and reason of the rows of ``coverage`` that something is wrong with; ranks of which the same is
    said, and that have no report, in one; and so are processes of a report, and of another run."""
    troubled = coverage[(coverage["reason"] != "") & (coverage["status"] != "not_profiled")]
    said = troubled["reason"].str.replace(_OF_PROCESS, "", regex=True)
    alone = (said == troubled["reason"]) & (troubled["report"] != "")
    own = np.where(alone, np.arange(len(troubled)), -1 - pd.factorize(troubled["report"])[0])
    others = troubled["status"] == "other_run"
    alike = troubled.assign(own=np.where(others, len(troubled), own), said=said, node=troubled["node"].mask(others, ""))
    told = []
    for _, rows in alike.groupby(["own", "status", "said", "node"], sort=False):
        row = rows.iloc[0]
        known = rows.loc[rows["rank"].ge(0).fillna(False) & (rows["status"] != "other_run"), "rank"]
        if len(known) > 1:
            who = f"ranks {rank_list(known)}" + (f" · {plain(row['node'])}" if row["node"] else "")
        elif len(known):
            who = rank_name(int(known.iloc[0]), str(row["node"] or ""))
        else:
            more = " and others" * (rows["report"].nunique() > 1)
            who = plain(row["report"]) + more or f"{len(rows)} rank{'s' if len(rows) > 1 else ''}"
        why = f"{len(rows)} processes: {row['said']}" if row["report"] and len(rows) > 1 else row["reason"]
        told.append((who, plain(row["status"]).replace("_", " "), plain(why)))
    return told


def steps_line(study: Study) -> str:
    """Number and duration of the steps."""
    steps = study.steps
    if not len(steps.numbers):
        return "no steps"
    if len(steps.numbers) == 1:
        return f"step {steps.numbers[0]} alone, of {seconds(steps.mean_s)}: {ONE_STEP}"
    told = f"{len(steps.numbers)} steps of {seconds(steps.mean_s)} ± {seconds(steps.noise_s)}"
    told += f", warm-up step {seconds(steps.warmup_s)} apart" if steps.warmup_number is not None else ""
    if steps.left_out:
        several = len(steps.left_out) > 1
        listed = rank_list(steps.left_out, study.names)
        who = f"rank{'s' if several else ''} {listed}" if max(steps.left_out) >= 0 else listed
        told += f" (without {who}, which lack{'' if several else 's'} most of them)"
    return told


def failed_line(study: Study) -> str:
    """That the run failed, if the headline does not say so; empty if it has not."""
    if not study.failed_run or study.failed_before_steps:
        return ""
    return f"the run failed; python -m hpcmm.jobs why {plain(shlex.quote(study.failed_run))} tells why"


def alone_line(study: Study) -> str:
    """That no rank was seen to exchange anything with another; empty if some was."""
    if not study.waits_unseen:
        return ""
    return (
        "no collective was recorded, so nothing is said of communication: each rank trains for itself, or its "
        "collectives are not annotated"
    )


def phases_line(study: Study) -> str:
    """How to see more of a computation that no phase covers, or of a loop without steps; empty if phases cover it."""
    if not len(study.steps.numbers):
        is_known = study.tables["gpu"].empty and len(study.tables["bottlenecks"]) and study.line_to_add
        return f"what gives it steps: {plain(study.line_to_add)}" if is_known else ""
    if computation_has_phases(study.traces):
        return ""
    if len(study.tables["gpu"]) and (study.ranges or phases_launch(study.traces)):  # the GPU computes elsewhen
        return ""
    return (
        "no phase covers the computation: annotate.phase(...) around forward, backward and optimizer tells them apart"
    )


def clock_line(study: Study) -> str:
    """How well the ranks' clocks agree."""
    return f"clocks agree within {seconds(study.clock.error_ns / 1e9)}; shorter waits are blamed on nobody"


def efficiency_line(study: Study) -> str:
    """Parallel efficiency of the run and its factors; empty if there is no table ``efficiency``."""
    table = study.tables.get("efficiency")
    run = table[table["scope"] == "run"] if table is not None and len(table) else None
    if run is None or run.empty:
        return ""
    row = run.iloc[0]
    values = [row["parallel_efficiency"], row["load_balance"], row["communication_efficiency"]]
    if any(pd.isna(value) for value in values):
        return ""
    whole, balance, communication = (percent(float(value)) for value in values)
    return f"parallel efficiency {whole} = load balance {balance} x communication {communication}"


def startup_line(study: Study) -> str:
    """The parts of the newest attempt's start; empty if the ranks recorded none."""
    table = study.tables.get("startup")
    if table is None or table.empty:
        return ""
    newest = table[table["attempt"] == table["attempt"].max()]
    parts = [
        f"{plain(part)} {seconds(float(taken))}" for part, taken in zip(newest["part"], newest["median_s"], strict=True)
    ]
    return f"to the first step's end (medians over ranks): {', '.join(parts)}"


GPU_NOT_TRACED = "no GPU activity was traced, so nothing is said of GPUs"


def gpu_line(study: Study) -> str:
    """How the GPUs spent the steps (the whole capture without steps), as a mean over devices."""
    rows = _by_gpu(_gpu_rows(study))
    if rows.empty:
        return GPU_NOT_TRACED if study.tables["gpu"].empty else f"{GPU_MISSING}, so nothing is said of GPUs"
    share = rows[["compute_s", "exposed_comm_s", "idle_s", "idle_host_s"]].sum() / rows["span_s"].sum()
    is_known = all(trace.gpu_doubt != NOT_LAUNCHED for trace in study.traces)
    host = f"({percent(share['idle_host_s'])} until the host launches more)" if is_known else f"({NOT_LAUNCHED})"
    time = "the time" if study.steps.adjoin else "the time in steps"
    told = f"GPUs compute {percent(share['compute_s'])} of {time}, communicate "
    told += f"{percent(share['exposed_comm_s'])} without computing, and are idle {percent(share['idle_s'])} {host}"
    return "; ".join(filter(None, (told, _shared(study), _left_out(study), graphs_line(study))))


WORTH_SAYING = 0.02
"""Whole CUDA graphs and missing records are named from this share of the time on."""


def graphs_line(study: Study) -> str:
    """That CUDA graphs hide what runs inside of them; empty if they take hardly any time."""
    rows = _by_gpu(_gpu_rows(study))
    share = float(rows["graph_s"].sum() / rows["span_s"].sum()) if len(rows) else 0.0
    if share < WORTH_SAYING:
        return ""
    return (
        f"CUDA graphs that were traced as a whole take {percent(share)} of the GPUs' time: what runs inside of them is "
        "not known, whether computation, communication or gaps (nsys profile --cuda-graph-trace=node shows it)"
    )


def _shared(study: Study) -> str:
    """How many processes use a GPU together; empty if none do."""
    rows = study.tables["gpu"].drop_duplicates(["rank", "device"])
    users = rows["gpu"].value_counts()
    several = users[users > 1]
    if several.empty:
        return ""
    return f"{several.sum()} processes share {'a GPU' if len(several) == 1 else f'{len(several)} GPUs'}"


GPU_MISSING = "the GPU records of all steps are missing"


def _left_out(study: Study) -> str:
    """What is not counted because GPU records are missing; empty if they are all there."""
    table = study.tables["gpu"]
    in_steps = table["step"].notna()
    if in_steps.any():
        steps = table.loc[in_steps, "step"].nunique()
        missing = table.loc[in_steps & ~traced(table), "step"].nunique()
        return f"{missing} of {steps} steps are left out, whose GPU records are missing" if missing else ""
    share = float(table["untraced_s"].sum() / table["span_s"].sum())
    return f"of {percent(share)} there are no records, although there was work" if share >= WORTH_SAYING else ""


def _capture_headline(study: Study) -> str:
    """The first bottleneck of a capture without steps, or nothing if neither GPUs nor OS calls tell of one."""
    rows, table = _by_gpu(_gpu_rows(study)), study.tables["bottlenecks"]
    devices = rows["gpu"].nunique()
    if not devices and (table.empty or len(study.tables["phases"])):
        return ""
    where = "one GPU" if devices == 1 else f"{devices} GPUs"
    whole = seconds(span_s(study.tables["gpu"]) if study.counts_steps else rows["span_s"].sum() / max(devices, 1))
    told = f"{study.no_steps}; of {f'each {whole} step' if study.counts_steps else whole} on {where}"
    graphs = graphs_line(study)
    if table.empty:
        doubt = gpu_doubt(study.traces)
        return (
            f"{told} {f'{graphs}; nothing else' if graphs else 'nothing'} loses 2%{f', but {doubt}' if doubt else ''}."
        )
    row = table.iloc[0]
    share, who = float(row["step_share"]), ""
    if not devices:
        told = f"{study.no_steps}; of {seconds(float(row['lost_s_per_step']) / share)} of the loop"
        who = f" of {rank_name(int(row['rank']), names=study.names)}" if pd.notna(row["rank"]) else ""
    return f"{told} {percent(share)} are lost to this: {plain(row['cause'])}{who}."


def late_line(study: Study) -> str:
    """Who arrives last at collectives that only their order on the device identifies; nothing if nobody does."""
    table = study.tables["collectives"]
    ordered = table[table["basis"].str.startswith("kernel order") & table["late_rank"].notna()]
    if ordered.empty:
        return ""
    late = ordered.drop_duplicates(["group", "op", "sequence"])["late_rank"].value_counts()
    devices = study.tables["gpu"].drop_duplicates("rank")
    last = int(str(late.index[0]))
    of_last = devices[devices["rank"] == last]
    who = rank_name(last, names=study.names)
    if len(of_last):
        node = str(of_last.iloc[0]["node"])
        who = plain(device_name(of_last.iloc[0])) if last >= 0 else who + (f" on {plain(node)}" if node else "")
    waited = float(ordered["wait_s"].sum())
    return (
        f"{who} arrives last at {late.iloc[0]} of {late.sum()} collectives that GPUs had to wait in, {seconds(waited)} "
        "in all; matched by the order of their kernels alone"
    )


def _gpu_rows(study: Study) -> pd.DataFrame:
    """Rows of the steps that count; all rows if there are none."""
    return counted(study.tables["gpu"])


def _by_gpu(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of processes that share a GPU as one: their work adds up, and it is idle while none of them uses it."""
    windows = rows.assign(end_s=rows["start_s"] + rows["span_s"]).groupby(["gpu", "step"], dropna=False)
    work, time = ["compute_s", "exposed_comm_s", "graph_s"], ["span_s", "idle_s", "idle_host_s", "untraced_s"]
    total = windows[[*work, *time]].sum()
    # How many processes there are at a moment of their time: one after the other, or all at once.
    at_once = (total["span_s"] / (windows["end_s"].max() - windows["start_s"].min())).clip(lower=1.0)
    total[time] = total[time].div(at_once, axis=0)
    total[work] = total[work].clip(upper=total["span_s"], axis=0)
    return total.reset_index()
