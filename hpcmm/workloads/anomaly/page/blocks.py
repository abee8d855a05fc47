"""The page: one image with a question, or many images as a table, in gradio's components."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from hpcmm.errors import HpcmmError
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.served import heading, sentence, user_name
from hpcmm.serve.service import Service
from hpcmm.serve.uploads import SUFFIXES, sent_file, sent_files
from hpcmm.workloads.anomaly.page import rendering
from hpcmm.workloads.anomaly.page.findings import MOST_CAPTION_CHARACTERS, MOST_QUESTION_CHARACTERS, Inspector, Seen
from hpcmm.workloads.anomaly.page.predictor import Finding, Request
from hpcmm.workloads.anomaly.page.rendering import Row
from hpcmm.workloads.anomaly.page.served import DetectorPage

QUESTION = "Is there an anomaly in the image, and where?"
_STATE_LIFE_S = 1800


def fill_page(page: DetectorPage, service: Service[Request, Finding], cache: Path) -> None:
    """Add the components to the open Blocks. ``cache`` is the folder that files to download are written to."""
    inspector = Inspector(service, page.predictor.side, speaks=page.predictor.speaks)
    gr.HTML(_title(page))
    with gr.Tab("One image"):
        _one_image(page, inspector)
    with gr.Tab("Many images"):
        _many_images(page, inspector, service.options, cache)


def _one_image(page: DetectorPage, inspector: Inspector) -> None:
    seen = gr.State(None, time_to_live=_STATE_LIFE_S)
    with gr.Row():
        with gr.Column(scale=5):
            image = gr.Image(
                label="Image", sources=["upload", "clipboard"], height=300, buttons=[], format="png", elem_id="image"
            )
            image.preprocess = sent_file
            caption = _caption(page, "caption")
            question = gr.Textbox(
                QUESTION,
                label="Question",
                info=None if page.predictor.speaks else "A rule answers: it reads the map, not the question.",
                max_length=MOST_QUESTION_CHARACTERS,
                lines=1,
                elem_id="question",
            )
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            if page.examples:
                gr.HTML('<p class="hpcmm-small">Or take one of the held-out images:</p>')
                examples = gr.Gallery(
                    [str(example.sample.image) for example in page.examples],
                    label="Held-out images",
                    show_label=False,
                    columns=4,
                    rows=2,
                    height="auto",
                    allow_preview=False,
                    object_fit="cover",
                    buttons=[],
                    interactive=False,
                    elem_id="examples",
                )
        with gr.Column(scale=6):
            shown = gr.HTML(sentence("Upload an image or take an example, then ask."), elem_id="result")
            threshold = _threshold(page, "threshold")

    async def answer(
        upload: tuple[Path, str] | None, caption: str, question: str, threshold: float, request: gr.Request
    ) -> tuple[str, Seen | None]:
        path, name = upload or (None, "")
        try:
            found = await inspector.look(path, name, caption, question, user=user_name(request.session_hash))
        except HpcmmError as error:
            return sentence(str(error), "problem"), None
        return await asyncio.to_thread(rendering.result, found, _within(threshold)), found

    def again(threshold: float, found: Seen | None) -> Any:
        return gr.skip() if found is None else rendering.result(found, _within(threshold))

    def take(event: gr.SelectData) -> tuple[str, str]:
        example = page.examples[int(event.index)]
        return str(example.sample.image), example.caption

    inputs, outputs = [image, caption, question, threshold], [shown, seen]
    hidden = {"api_visibility": "private"}
    gr.on([ask.click, question.submit], answer, inputs, outputs, **hidden)
    # What is quick goes past gradio's queue: a page that has two events in it at once can miss an answer for good.
    threshold.change(
        again,
        [threshold, seen],
        shown,
        trigger_mode="always_last",
        show_progress="hidden",
        queue=False,
        **hidden,
    )
    if page.examples:
        examples.select(take, None, [image, caption], queue=False, **hidden)


def _many_images(page: DetectorPage, inspector: Inspector, options: ServeOptions, cache: Path) -> None:
    at_once = max(1, min(options.max_batch, options.max_waiting // 2))
    rows = gr.State([], time_to_live=_STATE_LIFE_S)
    with gr.Row():
        with gr.Column(scale=5):
            files = gr.File(
                label=f"Images, up to {options.max_files}",
                file_count="multiple",
                file_types=list(SUFFIXES),
                height=220,
                elem_id="files",
            )
            files.preprocess = sent_files
            caption = _caption(page, "caption-of-all")
            score = gr.Button("Score all", variant="primary", elem_id="score-all")
            threshold = _threshold(page, "threshold-of-all")
            download = gr.DownloadButton("Download the table as CSV", interactive=False, elem_id="download")
        with gr.Column(scale=6):
            table = gr.HTML(sentence("Upload images of one kind, then score them."), elem_id="table")
            gallery = gr.HTML("", elem_id="gallery")

    async def score_all(
        uploads: list[tuple[Path, str]], caption: str, threshold: float, request: gr.Request
    ) -> tuple[str, str, Any, list[Row]]:
        if not uploads or len(uploads) > options.max_files:
            many = f"At most {options.max_files} images are taken at once; these are {len(uploads or [])}."
            said = many if uploads else "There are no images yet: upload some."
            return sentence(said, "problem"), "", gr.DownloadButton(interactive=False), []
        found = await _look_at_all(inspector, at_once, uploads, caption, user_name(request.session_hash))
        return (*await asyncio.to_thread(drawn, threshold, found), found)

    def drawn(threshold: float, found: list[Row]) -> tuple[Any, Any, Any]:
        if not found:
            return gr.skip(), gr.skip(), gr.skip()
        threshold = _within(threshold)
        folder = cache / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        path = folder / "scores.csv"
        path.write_text(rendering.to_csv(found, threshold), encoding="utf-8", errors="replace")
        return (
            rendering.table(found, threshold),
            rendering.gallery(found, threshold),
            gr.DownloadButton(value=str(path), interactive=True),
        )

    shown = [table, gallery, download]
    score.click(score_all, [files, caption, threshold], [*shown, rows], api_visibility="private")
    threshold.change(
        drawn,
        [threshold, rows],
        shown,
        trigger_mode="always_last",
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )


async def _look_at_all(
    inspector: Inspector, most: int, uploads: list[tuple[Path, str]], caption: str, user: str
) -> list[Row]:
    """All files, ``most`` at a time, so that one table does not fill the queue in front of the others' questions."""
    at_once = asyncio.Semaphore(most)

    async def look(path: Path, name: str) -> Row:
        async with at_once:
            try:
                return Row(name, await inspector.look(path, name, caption, None, user=user, kind="table"))
            except HpcmmError as error:
                return Row(name, None, str(error))

    return list(await asyncio.gather(*(look(path, name) for path, name in uploads)))


def _caption(page: DetectorPage, elem_id: str) -> Any:
    return gr.Dropdown(
        page.captions,
        value=page.captions[0] if page.captions else None,
        label="What it shows",
        allow_custom_value=True,
        elem_id=elem_id,
        info=f"Choose, or write a phrase of at most {MOST_CAPTION_CHARACTERS} characters.",
    )


def _threshold(page: DetectorPage, elem_id: str) -> Any:
    chosen = page.threshold
    return gr.Slider(
        0, 1, value=round(chosen.value, 3), step=0.001, label="Threshold",
        info=f"{chosen.value:.3f}: {chosen.origin}", elem_id=elem_id,
    )  # fmt: skip


def _title(page: DetectorPage) -> str:
    about = page.about
    speaks = (
        "the run's language model answers" if page.predictor.speaks else "no language model: a rule on the map answers"
    )
    standins = " Trained on stand-in images: its scores say nothing about real parts." if about.is_standin else ""
    told = f"{about.model} · checkpoint {about.checkpoint} · {speaks}.{standins}"
    return heading(about.run, told)


def _within(threshold: object) -> float:
    return min(1.0, max(0.0, float(threshold))) if isinstance(threshold, (int, float)) else 0.5
