"""A run's trained model, from its configuration and its newest checkpoint."""

from __future__ import annotations

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.runs.run_dir import RunDir
from hpcmm.train.checkpoint import read_trained
from hpcmm.workloads.anomaly.llm_folder import ensure_llm, model_config
from hpcmm.workloads.anomaly.models import AnomalyModel, build_model


def load_model(run: RunDir, config: RunConfig) -> AnomalyModel:
    """The model with the weights of ``checkpoints/latest``, float32, in evaluation mode, on the CPU.

    The frozen encoders and the language model's own weights are no part of a checkpoint: they come from where the
    configuration says. Raises HpcmmError where there is no checkpoint, it does not fit the model, or another user could
    have written it.
    """
    state = read_trained(run)
    ensure_llm(config)
    model = build_model(model_config(config), config.train.seed)
    try:
        unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The checkpoint of {run.root} cannot be loaded: {reason}") from error
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lacking = sorted(trained & set(unknown.missing_keys))
    if lacking or unknown.unexpected_keys:
        names = lacking or unknown.unexpected_keys
        raise HpcmmError(f"The checkpoint of {run.root} is of another model: {names[0]} does not fit.")
    return model.eval()
