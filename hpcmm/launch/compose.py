"""Overrides -> :class:`~hpcmm.config.RunConfig`, with errors that name the valid keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcmm.config import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.resources import resource


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose ``conf/`` with Hydra overrides such as ``train.steps=10`` or ``cluster=local``.

    Raises HpcmmError, in one sentence, for an override that does not parse, an unknown key or group option, a value of
    the wrong type, and a value that must be given and is not.
    """
    known = [_known(override) for override in _parse(overrides)]
    ConfigStore.instance().store(name="schema", node=RunConfig)
    try:
        with initialize_config_dir(str(resource("conf")), version_base="1.3", job_name="hpcmm"):
            composed = compose("config", overrides=known)
        return _typed(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise HpcmmError(_explain(error)) from error


def _typed(composed: DictConfig) -> RunConfig:
    OmegaConf.resolve(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise HpcmmError(f"The configuration needs a value for {', '.join(missing)}: give it as {missing[0]}=VALUE.")
    run = OmegaConf.to_object(composed)
    assert isinstance(run, RunConfig)
    return run


def config_groups() -> dict[str, list[str]]:
    """The groups of ``conf/``, such as ``model`` and ``model/decoder``, with their options, both sorted."""
    root = resource("conf")
    return {
        group.relative_to(root).as_posix(): sorted(option.stem for option in group.glob("*.yaml"))
        for group in sorted(root.rglob("*"))
        if group.is_dir()
    }


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except (HydraException, ValueError) as error:
        raise HpcmmError(f"Not a Hydra override: {_first_line(error)} Write KEY=VALUE, or GROUP=OPTION.") from error


def _known(override: Override) -> str:
    """The override's text when its key is known; raises HpcmmError, naming the valid ones, when it is not."""
    key, text = override.key_or_group, override.input_line
    assert text is not None
    groups = config_groups()
    if key in groups:
        if override.value() is None and key != "experiment":
            raise HpcmmError(f"{key} needs an option: choose one of {', '.join(groups[key])}.")
        return text
    node: Any = RunConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not is_dataclass(node):
            break
        valid = [field.name for field in fields(node)]
        if part not in valid:
            raise HpcmmError(_unknown(".".join(parts[:depth]), part, valid + (sorted(groups) if depth == 0 else [])))
        assert isinstance(node, type)
        node = get_type_hints(node)[part]
    # Hydra adds a key to a dictionary only when it is told so with ++.
    is_dictionary = get_origin(node) is dict
    return f"++{text}" if is_dictionary and override.type is OverrideType.CHANGE else text


def _unknown(parent: str, part: str, valid: list[str]) -> str:
    prefix = f"{parent}." if parent else ""
    names = sorted({prefix + name for name in valid})
    close = difflib.get_close_matches(prefix + part, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    where = f"Keys of {parent}" if parent else "Keys"
    return f"{prefix}{part} is no key of the configuration: {hint}{where}: {', '.join(names)}."


def _explain(error: Exception) -> str:
    """One sentence from Hydra's and OmegaConf's errors, which come in several lines."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    group = re.search(r"Could not (?:find|load) '?([\w/]+)/([^'\s/]+?)'?[\s.]", text + " ")
    if group and group[1] in (groups := config_groups()):
        return (
            f"{group[1]}={group[2]} is no option of the group {group[1]}: choose one of {', '.join(groups[group[1]])}."
        )
    if key and "not in" in text:
        parent, _, part = key[1].rpartition(".")
        return _unknown(parent, part, _valid_keys(parent))
    if key:
        return f"{key[1]}: {_first_line(cause)}"
    return _first_line(cause)


def _valid_keys(path: str) -> list[str]:
    node: Any = RunConfig
    for part in filter(None, path.split(".")):
        node = get_type_hints(node)[part]
    return [field.name for field in fields(node)] if is_dataclass(node) else []


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0].strip()
    return line if line.endswith(".") else line + "."
