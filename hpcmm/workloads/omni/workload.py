"""The omni-modal language model as a workload: what the toolkit asks of it, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hpcmm.config.mesh import EXPERT, PIPELINE, SEQUENCE
from hpcmm.config.model_shape import ModelShape
from hpcmm.config.workload import Workload
from hpcmm.workloads.made_data import notes_on_other_seed
from hpcmm.workloads.omni import shape
from hpcmm.workloads.omni.schema import LanguageModelKind, OmniConfig, problems

if TYPE_CHECKING:
    from hpcmm.evaluate.evaluation import Evaluation
    from hpcmm.serve.served import ServedModel
    from hpcmm.workloads.omni.training import OmniTraining


class OmniWorkload(Workload):
    """A language model that learns to answer questions on images, sounds and text, spread over the ranks of a job."""

    schema = OmniConfig

    def problems(self, config: OmniConfig) -> Iterator[str]:
        """What must hold between the keys of ``model``, ``data`` and ``train``."""
        yield from problems(config)
        yield from shape.problems(config)
        if shape.network_settings(config).get("output_router_logits"):
            cut = [axis for axis in (PIPELINE, SEQUENCE, EXPERT) if config.parallel.mesh.get(axis, 1) != 1]
            if cut:
                yield (
                    f"parallel.mesh has {cut[0]}, and the language model's configuration asks for the router's loss "
                    "(output_router_logits), which is of all layers' and tokens' experts together: set it to false, or "
                    f"leave {cut[0]} out."
                )

    def given_paths(self, config: OmniConfig) -> Mapping[str, str | None]:
        """Conversations and weights. ``model.language_model.path`` counts only if the language model is of a folder."""
        language, modalities = config.model.language_model, config.model.modalities
        weights = {
            f"model.modalities.{name}.weights": part["weights"]
            for name, part in modalities.items()
            if isinstance(part, Mapping) and isinstance(part.get("weights"), str)
        }
        return {
            "data.root": config.data.root,
            "model.language_model.path": language.path if language.kind is LanguageModelKind.folder else None,
            **weights,
        }

    def axes(self, config: OmniConfig) -> frozenset[str]:
        """All of which the language model's architecture has something to cut."""
        return shape.axes(config)

    def model_shape(self, config: OmniConfig) -> ModelShape | None:
        """The language model's sizes, if this machine sees its folder."""
        return shape.model_shape(config)

    def notes_on_start(self, config: OmniConfig, before: Mapping[str, Any]) -> Iterator[str]:
        """Whether the run to start from had other conversations, for the seed makes them."""
        return notes_on_other_seed(config.data.root, config.train.seed, before, "conversations")

    def problems_on_start(self, config: OmniConfig, before: Mapping[str, Any]) -> Iterator[str]:
        """Whether the language models are of one size, as far as this machine can know."""
        return shape.start_problems(config, before)

    def prepare(self, config: OmniConfig) -> None:
        """Make conversations and tokenizer, and convert the packaged language model, as far as the run needs them."""
        from hpcmm.workloads.omni.folders import prepare  # noqa: PLC0415 -- NumPy and SciPy, on the node only

        prepare(config)

    def training_class(self) -> type[OmniTraining]:
        """The model on a rank."""
        from hpcmm.workloads.omni.training import OmniTraining  # noqa: PLC0415 -- imports torch

        return OmniTraining

    def evaluation(self) -> Evaluation:
        """Accuracy by kind of question."""
        from hpcmm.workloads.omni.evaluation import OmniEvaluation  # noqa: PLC0415 -- for this command alone

        return OmniEvaluation()

    def served(self) -> ServedModel:
        """A page on which one talks to the model."""
        from hpcmm.workloads.omni.page.served import ServedOmni  # noqa: PLC0415 -- for this command alone

        return ServedOmni()
