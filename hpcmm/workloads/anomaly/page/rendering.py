"""What was found, as HTML and CSV. Names, captions and words are other people's: each is escaped here."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from hpcmm.serve.served import escaped
from hpcmm.serve.uploads import data_uri, jpeg
from hpcmm.workloads.anomaly.page.drawing import SMALL_SIDE, overlay
from hpcmm.workloads.anomaly.page.findings import Seen, as_image

CSV_COLUMNS = ("file", "score", "threshold", "anomalous", "answer", "problem")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Row:
    """A file of a table: what was seen, or why it could not be."""

    name: str
    seen: Seen | None
    problem: str = ""


def result(seen: Seen, threshold: float) -> str:
    """One image with its verdict, score, words, heat map and legend."""
    anomalous = seen.score >= threshold
    picture = data_uri(jpeg(overlay(as_image(seen.picture), seen.map, threshold)))
    kind, verdict = ("bad", "anomalous") if anomalous else ("good", "normal")
    note = f'<p class="hpcmm-small">{escaped(seen.note)}</p>' if seen.note else ""
    speaker = "a rule on the heat map" if seen.words is None else "the language model"
    return (
        f'<section class="hpcmm-result" data-verdict="{verdict}" data-score="{seen.score:.4f}">'
        f'<div class="hpcmm-head"><span class="hpcmm-badge hpcmm-{kind}">{verdict}</span>{_bar(seen.score, threshold)}'
        f'</div><p class="hpcmm-answer">{escaped(seen.answer(threshold))}'
        f'<span class="hpcmm-small"> — {speaker}</span></p>'
        f'<figure><img src="{picture}" alt="heat map over {escaped(seen.name)}">{_legend(threshold)}</figure>'
        f"{note}</section>"
    )


def table(rows: Sequence[Row], threshold: float) -> str:
    """All files, the highest score first, those with a problem last."""
    ordered = sorted(rows, key=lambda row: (row.seen is None, -row.seen.score if row.seen else 0.0))
    lines = "".join(_line(row, threshold) for row in ordered)
    called = sum(row.seen is not None and row.seen.score >= threshold for row in rows)
    failed = sum(row.seen is None for row in rows)
    said = f"{called} of {len(rows) - failed} images are anomalous at the threshold {threshold:.2f}."
    if failed:
        said += f" {failed} could not be used."
    return (
        f'<p class="hpcmm-answer">{said}</p><div class="hpcmm-scroll"><table class="hpcmm-table"><thead><tr>'
        "<th>file</th><th>score</th><th>verdict</th><th>answer</th></tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def gallery(rows: Sequence[Row], threshold: float) -> str:
    """Small heat maps of all images that could be used, the highest score first."""
    found = sorted((row for row in rows if row.seen is not None), key=lambda row: -row.seen.score if row.seen else 0.0)
    return f'<div class="hpcmm-gallery">{"".join(_card(row.seen, threshold) for row in found if row.seen)}</div>'


def to_csv(rows: Sequence[Row], threshold: float) -> str:
    """The table as CSV. A name that a spreadsheet would run as a formula gets an apostrophe in front."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        if row.seen is None:
            values = ["", f"{threshold:.4f}", "", "", row.problem]
        else:
            called = "yes" if row.seen.score >= threshold else "no"
            values = [f"{row.seen.score:.4f}", f"{threshold:.4f}", called, row.seen.answer(threshold), ""]
        writer.writerow([_cell(value) for value in (row.name, *values)])
    return written.getvalue()


def _line(row: Row, threshold: float) -> str:
    name = f"<td>{escaped(row.name)}</td>"
    if row.seen is None:
        return f'<tr>{name}<td></td><td><span class="hpcmm-badge">—</span></td><td>{escaped(row.problem)}</td></tr>'
    kind, verdict = ("bad", "anomalous") if row.seen.score >= threshold else ("good", "normal")
    return (
        f'<tr>{name}<td class="hpcmm-number">{row.seen.score:.3f}</td>'
        f'<td><span class="hpcmm-badge hpcmm-{kind}">{verdict}</span></td>'
        f"<td>{escaped(row.seen.answer(threshold))}</td></tr>"
    )


def _card(seen: Seen, threshold: float) -> str:
    image = as_image(seen.picture)
    image.thumbnail((SMALL_SIDE, SMALL_SIDE))
    name = escaped(seen.name)
    picture = data_uri(jpeg(overlay(image, seen.map, threshold), quality=80))
    return (
        f'<figure><img src="{picture}" alt="heat map over {name}">'
        f'<figcaption title="{name}">{seen.score:.2f} {name}</figcaption></figure>'
    )


def _bar(score: float, threshold: float) -> str:
    """The score from 0 to 1 as a bar, with a mark at the threshold."""
    return (
        f'<div class="hpcmm-score"><b>score {score:.2f}</b><div class="hpcmm-bar" role="img" '
        f'aria-label="score {score:.2f}, threshold {threshold:.2f}"><div class="hpcmm-fill" '
        f'style="width:{100 * min(1.0, max(0.0, score)):.1f}%"></div>'
        f'<div class="hpcmm-mark" style="left:{100 * threshold:.1f}%"></div></div></div>'
    )


def _legend(threshold: float) -> str:
    return (
        '<figcaption class="hpcmm-legend"><span>0 normal</span><div class="hpcmm-scale">'
        f'<div class="hpcmm-mark" style="left:{100 * threshold:.1f}%"></div></div><span>1 anomalous</span>'
        '<span class="hpcmm-outline">reaches the threshold</span></figcaption>'
    )


def _cell(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA_STARTS) else value
