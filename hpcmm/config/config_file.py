"""A run's configuration as the file ``config.yaml``: written once, and read by whoever runs or uses the run."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hpcmm.config.keys import MISSING
from hpcmm.config.parts import TARGET, options_of, own_folders, read_config_yaml, targets_of, with_parts
from hpcmm.config.schema import RunConfig, cluster_variables
from hpcmm.config.untyped_config import VERSION, VERSION_KEY, plain_values, values_of_today
from hpcmm.config.workload import load_workload
from hpcmm.errors import HpcmmError
from hpcmm.files import other_writer, read_checked, write_whole
from hpcmm.text import visible

_MOST_OF_A_REASON = 300
"""Characters of what OmegaConf and YAML say of a configuration."""


def dump(config: RunConfig, path: Path) -> None:
    """Write the frozen configuration: read-only, for whoever runs this job has to run this."""
    sections = {VERSION_KEY: VERSION, **{each.name: getattr(config, each.name) for each in fields(config)}}
    write_whole(path, "".join(_section_text(key, value) for key, value in sections.items()), mode=0o444)


_MOST_TEXTS = 256
_texts: dict[str, str] = {}
"""The YAML of sections that were written, by their values: a sweep's points have most of them in common."""


def _section_text(key: str, value: Any) -> str:
    """A top-level key with what it holds, as YAML."""
    said = f"{key}={value!r}"  # equal words are equal values, unlike 1 and True
    if said not in _texts:
        if len(_texts) >= _MOST_TEXTS:
            _texts.clear()
        values = {key: _plain(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)}
        _texts[said] = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return _texts[said]


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
    return value.name if isinstance(value, Enum) else value


def load(path: Path) -> RunConfig:
    """Read a frozen configuration, also of an earlier version, with the keys of its workload.

    A class that the file names is followed only if nobody else can have written the file, or the class is hpcmm's own.
    Raises HpcmmError if there is no such configuration in the file.
    """
    given, writer = _frozen(path)
    try:
        values = _of_the_cluster_alone(values_of_today(given))
        schema = _schema_of(values, path, writer)
        texts: dict[str, str] = {}
        created = OmegaConf.create(_with_marks(values, texts))
        loaded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), created))
        loaded = _without_marks(loaded, texts) if texts else loaded
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise HpcmmError(
            f"{path} is not a configuration of this version of hpcmm: {_reason(error)}.{_of_its_own_time(path.parent)}"
        ) from error
    assert isinstance(loaded, RunConfig)
    loaded = with_parts(loaded, own_folders())
    _refuse_foreign_classes(targets_of(loaded), path, writer)
    return loaded


def _schema_of(values: dict[str, Any], path: Path, writer: Path | None) -> type[RunConfig]:
    """The keys of the run's workload."""
    task = values.get("task")
    target = task.get(TARGET) if isinstance(task, dict) else None
    if target is None:
        return RunConfig
    _refuse_foreign_classes([str(target)], path, writer)
    return load_workload(str(target)).schema


def _refuse_foreign_classes(targets: Iterable[str], path: Path, writer: Path | None) -> None:
    """To import a class runs code: of one that is not hpcmm's own, the file must be the user's, and nobody else's."""
    foreign = [target for target in targets if not target.startswith("hpcmm.") and target not in _shipped_optimizers()]
    if foreign and writer is not None:
        raise HpcmmError(
            f"{path} names {visible(foreign[0])[:_MOST_OF_A_REASON]}, which is not hpcmm's, and {writer} can be "
            "written by another user: take the run over (chown, chmod go-w) if you trust it."
        )


@functools.cache
def _shipped_optimizers() -> frozenset[str]:
    """Classes of PyTorch and DeepSpeed that hpcmm's own files name."""
    (folder,) = own_folders()
    files = (read_config_yaml(folder / "optimizer" / f"{name}.yaml") for name in options_of("optimizer", [folder]))
    return frozenset(str(file.get(TARGET)) for file in files)


def _of_the_cluster_alone(values: dict[str, Any]) -> dict[str, Any]:
    """Without what an earlier version let ``cluster.submit_environment`` set beside how the cluster is found."""
    cluster = values.get("cluster")
    given = cluster.get("submit_environment") if isinstance(cluster, dict) else None
    if isinstance(cluster, dict) and isinstance(given, dict):
        return {**values, "cluster": {**cluster, "submit_environment": cluster_variables(given)}}
    return values


def _with_marks(value: Any, texts: dict[str, str], *, in_list: bool = False) -> Any:
    """``value`` with a mark, a key of ``texts``, for each text in which OmegaConf would see more than a text.

    A frozen configuration holds no interpolations, but words of a command line that may look like one.
    """
    if isinstance(value, dict):
        return {key: _with_marks(each, texts) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_marks(each, texts, in_list=True) for each in value]
    if not isinstance(value, str) or not ("${" in value or (in_list and value == MISSING)):
        return value
    mark = f"text-{len(texts)}-{uuid4().hex}"
    texts[mark] = value
    return mark


def _without_marks(value: Any, texts: dict[str, str]) -> Any:
    """``value`` with the texts again that its marks stand for."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = {each.name: _without_marks(getattr(value, each.name), texts) for each in fields(value)}
        return replace(value, **changed)
    if isinstance(value, dict):
        return {key: _without_marks(each, texts) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_marks(each, texts) for each in value]
    return texts.get(value, value) if isinstance(value, str) else value


def _frozen(path: Path) -> tuple[dict[str, Any], Path | None]:
    """The values of a configuration of whatever version of hpcmm, and who else could have written them."""
    try:
        text, writer = read_checked(path)
        plain_values(text)  # refuses what would have OmegaConf work without end
        given = yaml.load(text, get_yaml_loader())  # noqa: S506 -- made of the SafeLoader
    except OSError as error:
        raise HpcmmError(f"{path} cannot be read ({error.strerror}): is this a run directory?") from error
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise HpcmmError(
            f"{path} is damaged ({_reason(error)}): put back what hpcmm.launch wrote, which nothing changes later."
        ) from error
    return {str(key): value for key, value in given.items()}, writer


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
    if not (code / "hpcmm").is_dir() or other_writer(run, run / "code", code, code / "hpcmm") is not None:
        return ""  # nobody is told to run what another user could have written
    paths = shlex.quote(f"PYTHONPATH={code.absolute()}"), shlex.quote(str(run.absolute()))
    return " The run keeps the code that wrote it: env {} python -P -m hpcmm.evaluate {} (or hpcmm.serve).".format(
        *paths
    )
