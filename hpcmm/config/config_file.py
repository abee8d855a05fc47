"""A run's configuration as the file ``config.yaml``: written once, and read by whoever runs or uses the run."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hpcmm.config.schema import RunConfig
from hpcmm.config.untyped_config import VERSION, VERSION_KEY, plain_values, values_of_today
from hpcmm.errors import HpcmmError
from hpcmm.files import read_text, write_whole
from hpcmm.text import visible

_MOST_OF_A_REASON = 300
"""Characters of what OmegaConf and YAML say of a configuration."""


def dump(config: RunConfig, path: Path) -> None:
    """Write the frozen configuration: read-only, for whoever runs this job has to run this."""
    values = {VERSION_KEY: VERSION, **_plain(asdict(config))}
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_whole(path, text, mode=0o444)


class _Dumper(yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper):  # type: ignore[misc]
    """Quotes texts that start like a number: OmegaConf reads ``1e-4`` as one, though YAML 1.1 does not."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text[:1].isalpha() else "'")


_Dumper.add_representer(str, _text)


def _plain(value: Any) -> Any:
    """``value`` with names in place of enumerated values."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.name if isinstance(value, StrEnum) else value


def load(path: Path) -> RunConfig:
    """Read a frozen configuration, also of an earlier version. Raises HpcmmError if there is none in the file."""
    given = _frozen(path)
    try:
        given = OmegaConf.create(values_of_today(_keys_and_values(given)))
        loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), given))
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise HpcmmError(
            f"{path} is not a configuration of this version of hpcmm: {_reason(error)}.{_of_its_own_time(path.parent)}"
        ) from error
    assert isinstance(loaded, RunConfig)
    return loaded


def _frozen(path: Path) -> DictConfig:
    """The values of a configuration of whatever version of hpcmm."""
    try:
        text = read_text(path)
        plain_values(text)  # refuses what would have OmegaConf work without end
        given = OmegaConf.load(StringIO(text))
    except OSError as error:
        raise HpcmmError(f"{path} cannot be read ({error.strerror}): is this a run directory?") from error
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise HpcmmError(
            f"{path} is damaged ({_reason(error)}): put back what hpcmm.launch wrote, which nothing changes later."
        ) from error
    assert isinstance(given, DictConfig)
    return given


def _keys_and_values(given: DictConfig) -> dict[str, Any]:
    """As plain values, with interpolations as they stand."""
    values = OmegaConf.to_container(given, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _reason(error: Exception) -> str:
    """A short line for a terminal, which obeys nothing that the file holds."""
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        said = f"line {error.problem_mark.line + 1}: {error.problem}"
    else:
        said = " ".join(" ".join(str(error).split("\n", 2)[:2]).split()).rstrip(".")
    said = visible(said)
    return said if len(said) <= _MOST_OF_A_REASON else f"{said[:_MOST_OF_A_REASON]} …"


def _of_its_own_time(run: Path) -> str:
    """How to read a run that another version of hpcmm wrote: with the code that it keeps."""
    code = run / "code" / "hpcmm"  # as hpcmm.launch.snapshot lays it out
    if not (code / "hpcmm").is_dir():
        return ""
    paths = shlex.quote(f"PYTHONPATH={code.absolute()}"), shlex.quote(str(run.absolute()))
    return " The run keeps the code that wrote it: env {} python -P -m hpcmm.evaluate {} (or hpcmm.serve).".format(
        *paths
    )
