"""The detector's page to ``hpcmm.serve``: its options, and a run's model with what the page says of it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcmm.config.parts import part_name
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir, newest_checkpoint
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.served import ServedModel, ServedPage
from hpcmm.serve.service import Service
from hpcmm.workloads.anomaly.schema import AnomalyConfig

if TYPE_CHECKING:
    from hpcmm.workloads.anomaly.models import AnomalyModel
    from hpcmm.workloads.anomaly.page.held_out import Example, Threshold
    from hpcmm.workloads.anomaly.page.predictor import Finding, Predictor, Request

CSS = Path(__file__).with_name("page.css")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Settings of this page. Raises HpcmmError for values that cannot be used."""

    threshold: float | None = None
    """Score from which an image is called anomalous; None chooses it on held-out images."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise HpcmmError(f"--threshold is {self.threshold}, but a score lies between 0 and 1.")


@dataclass(frozen=True, slots=True)
class About:
    """The served run, for the page."""

    run: str
    model: str
    checkpoint: str
    is_standin: bool


class ServedDetector(ServedModel):
    """Images to heat maps, scores and words."""

    description = "upload an image, ask, and see where it is anomalous"

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--threshold", type=float, metavar="X", help="default: chosen on the held-out images")

    def options(self, given: Namespace) -> dict[str, Any]:
        names = [field.name for field in fields(PageOptions)]
        return asdict(PageOptions(**{name: value for name in names if (value := getattr(given, name)) is not None}))

    def build_model(self, config: AnomalyConfig) -> AnomalyModel:
        from hpcmm.workloads.anomaly.evaluation import AnomalyEvaluation  # noqa: PLC0415 -- pandas

        return AnomalyEvaluation().build_model(config)

    def load(self, model: AnomalyModel, run: RunDir, config: AnomalyConfig, options: ServeOptions) -> DetectorPage:
        from hpcmm.workloads.anomaly.page import held_out  # noqa: PLC0415 -- imports torch
        from hpcmm.workloads.anomaly.page.predictor import Predictor  # noqa: PLC0415 -- imports torch

        own = PageOptions(**options.page)
        predictor = Predictor(model, config.data.image_size)
        images = held_out.held_out_images(config)
        examples, captions = held_out.examples_of(images)
        return DetectorPage(
            predictor,
            own,
            about=About(
                run.root.name,
                f"decoder {part_name(config.model.decoder)}",
                newest_checkpoint(run),
                is_standin=config.data.generate,
            ),
            threshold=held_out.choose_threshold(run, predictor, images, own.threshold),
            captions=captions,
            examples=examples,
        )


class DetectorPage(ServedPage):
    """One run's detector, and what its page says beside the findings."""

    css = CSS.read_text(encoding="utf-8")

    def __init__(
        self,
        predictor: Predictor,
        options: PageOptions,
        *,
        about: About,
        threshold: Threshold,
        captions: Sequence[str],
        examples: Sequence[Example],
    ) -> None:
        self.predictor = predictor
        self.options = options
        self.about = about
        self.threshold = threshold
        self.captions = list(captions)
        self.examples = list(examples)

    def predict(self, requests: Sequence[Request]) -> list[Finding]:
        return self.predictor(requests)

    def build(self, service: Service[Request, Finding], cache: Path) -> None:
        from hpcmm.workloads.anomaly.page.blocks import fill_page  # noqa: PLC0415 -- gradio takes seconds

        fill_page(self, service, cache)
