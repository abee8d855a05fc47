"""The sentences that every output begins with, and how numbers and foreign text are written."""

from __future__ import annotations

import math

import pandas as pd

from hpcmm.analysis.study import Study

MAX_TEXT = 300
"""Characters of a foreign name that are shown."""


def plain(value: object) -> str:
    """Foreign text without control characters (ANSI codes, newlines), cut to :data:`MAX_TEXT`."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(value))
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: object, digits: int = 3) -> str:
    """A number for people: ``digits`` significant digits, thousands separated, nothing for a missing one."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else plain(value)


def seconds(value: float) -> str:
    """A duration with the unit that suits it."""
    if value >= 1 or value == 0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def headline(study: Study) -> str:
    """The first bottleneck in one sentence, or why there is none."""
    table = study.tables["bottlenecks"]
    if not len(study.steps.numbers):
        return "No steps to analyse: " + _why_no_steps(study)
    step = seconds(study.steps.mean_s)
    if table.empty:
        return f"Nothing stands out: no cause takes 2% of the {step} step, and no rank is to blame."
    row = table.iloc[0]
    lost = f"{seconds(float(row['lost_s_per_step']))} of each {step} step ({percent(float(row['step_share']))})"
    several = "s" if "," in str(row["phase"]) else ""
    where = f" in phase{several} {plain(row['phase'])}" if row["phase"] else ""
    cause = plain(row["cause"])
    if pd.notna(row["rank"]):
        rank = f"Rank {row['rank']}" if row["rank"] >= 0 else f"The report number {-row['rank']} without a rank"
        on = f" on {plain(row['node'])}" if row["node"] else ""
        return f"{rank}{on} costs {lost}: {cause}{where}."
    if row["node"]:
        return f"Node {plain(row['node'])} costs {lost}: {cause}{where}."
    return f"{cause[:1].upper()}{cause[1:]} costs {lost}{where}."


def _why_no_steps(study: Study) -> str:
    reasons = study.tables["coverage"]["reason"]
    reasons = reasons[reasons != ""]
    if len(reasons):
        return plain(reasons.value_counts().idxmax()) + "."
    return (
        "only the warm-up step was captured."
        if study.steps.warmup_number is not None
        else "none was closed on all ranks."
    )


def coverage_line(study: Study) -> str:
    """How many of the expected reports were read."""
    status = study.tables["coverage"]["status"]
    used = int((status == "found").sum())
    rest = status[status != "found"].value_counts()
    told = ", ".join(f"{count} {str(name).replace('_', ' ')}" for name, count in rest.items())
    return f"{used} of {len(status)} ranks with steps" + (f" ({told})" if told else "")


def steps_line(study: Study) -> str:
    """Number and duration of the steps."""
    steps = study.steps
    if not len(steps.numbers):
        return "no steps"
    told = f"{len(steps.numbers)} steps of {seconds(steps.mean_s)} ± {seconds(steps.noise_s)}"
    return told + (f", warm-up step {seconds(steps.warmup_s)} apart" if steps.warmup_number is not None else "")


def clock_line(study: Study) -> str:
    """How well the ranks' clocks agree."""
    return f"clocks agree within {seconds(study.clock.error_ns / 1e9)}; shorter waits are blamed on nobody"
