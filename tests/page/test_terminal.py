"""What the terminal, a pipe and a narrow window get."""

import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from hpcmm import cli
from hpcmm.analyze import Analysis
from hpcmm.cli import progress_bar
from hpcmm.page import terminal
from hpcmm.page.terminal import print_study

BOX_DRAWING = {chr(code) for code in range(0x2500, 0x25A0)}


def printed(analysis: Analysis, *, width: int, terminal: bool) -> str:
    output = StringIO()
    print_study(analysis.study, Path("out"), Console(file=output, width=width, force_terminal=terminal))
    return output.getvalue()


def suggestion(analysis: Analysis) -> str:
    return str(analysis.tables["bottlenecks"].iloc[0]["suggestion"])


def test_a_pipe_gets_one_plain_line_a_row(slow_data: Analysis) -> None:
    text = printed(slow_data, width=40, terminal=False)
    assert "\x1b" not in text
    assert not BOX_DRAWING & set(text)
    lines = text.splitlines()
    assert lines[0].startswith("Rank 2 on node2 costs ")
    row = next(line for line in lines if line.startswith("1  "))
    assert "data loading" in row
    assert "rank 2 on node2" in row
    assert row.endswith(suggestion(slow_data))
    header = next(line for line in lines if line.startswith("#  "))
    second = next(line for line in lines if line.startswith("2  "))
    for name in ("share", "cause", "who", "phase", "sure", "try"):
        assert row[header.index(name) - 1] == second[header.index(name) - 1] == " "


def test_how_to_tell_the_parts_of_a_computation_without_phases_is_said(slow_data: Analysis) -> None:
    traces = [replace(trace, segments=trace.segments.assign(phase="other")) for trace in slow_data.study.traces]
    for study, expected in ((slow_data.study, False), (replace(slow_data.study, traces=tuple(traces)), True)):
        output = StringIO()
        print_study(study, Path("out"), Console(file=output))
        assert ("No phase covers the computation: annotate.phase(...)" in output.getvalue()) == expected


def test_a_long_phase_is_shortened_in_the_middle(slow_data: Analysis) -> None:
    name = "model.encoder.layers.attention." * 4 + "projection"
    rows = slow_data.bottlenecks()
    tables = {**slow_data.tables, "bottlenecks": rows.assign(phase=f"{name}, data")}
    output = StringIO()
    print_study(replace(slow_data.study, tables=tables), Path("out"), Console(file=output, width=200))
    row = next(line for line in output.getvalue().splitlines() if line.startswith("1  "))
    assert "  model.encoder.layers.att...on.projection, data  " in row
    assert name in output.getvalue().splitlines()[0]


@pytest.mark.parametrize("width", [20, 40, 72, 100, 160])
def test_no_line_is_wider_than_the_terminal(slow_data: Analysis, width: int) -> None:
    text = printed(slow_data, width=width, terminal=True)
    assert "\x1b[1m" in text
    plain = Console(file=StringIO(), width=width)
    lines = [plain.render_str(line).plain for line in _without_codes(text).splitlines()]
    assert all(cell_len(line.rstrip()) <= width for line in lines if not line.startswith("Report: "))
    words = "".join(lines).replace(" ", "")
    assert words.count(suggestion(slow_data).replace(" ", "")) >= (2 if width < terminal.TABLE_WIDTH else 1)


def test_hostile_names_send_no_control_characters(hostile: Analysis) -> None:
    for terminal_there in (False, True):
        text = printed(hostile, width=200, terminal=terminal_there)
        assert "\x1b[31m" not in text
        assert "[31m" in text


def test_nothing_essential_is_cut_in_a_pipe(clean: Analysis, capsys) -> None:
    print_study(clean.study, Path("x" * 300))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Report: {'x' * 300}/report.html"
    assert any(line.endswith(suggestion(clean)) for line in lines)


def test_long_work_says_how_far_it_is_in_a_log(capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli, "QUIET_S", 0.0)
    with progress_bar() as progress:
        progress("reading \x1b[31mrank", 3, 64)
    assert capsys.readouterr().err == "hpcmm.analyze: reading \\x1b[31mrank (3/64)\n"
    monkeypatch.setattr(cli, "QUIET_S", 60.0)
    with progress_bar() as progress:
        progress("reading", 3, 64)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_progress_bar(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar() as progress:
        progress("reading rank_0003", 3, 64)
    assert "3/64" in capsys.readouterr().err


def test_a_terminal_that_moves_no_cursor_gets_lines(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cli, "QUIET_S", 0.0)
    with progress_bar() as progress:
        progress("reading rank_0003", 3, 64)
    assert capsys.readouterr().err == "hpcmm.analyze: reading rank_0003 (3/64)\n"


def _without_codes(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)
