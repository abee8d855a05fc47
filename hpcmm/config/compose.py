"""Overrides -> :class:`~hpcmm.config.schema.RunConfig`, with errors that name the valid keys."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcmm.config.schema import RunConfig
from hpcmm.errors import HpcmmError
from hpcmm.resources import resource

_PIECES = re.compile(
    r"""
    (?P<quoted> '(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" )
    | (?P<bare> [^\s,\[\]{}:'"\\()$]+ (?: (?:[ \t]+|:) [^\s,\[\]{}:'"\\()$]+ )* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_KEPT = frozenset({"null"})
_MEANS_MORE = re.compile(r"[\\$(){}]")
"""An escape, an interpolation, a call such as ``range(1,3)``, a dictionary: Hydra's grammar says what they are."""


def quote_bare_words(value: str) -> str:
    """``value`` of an override, a word, list or dictionary, with quotes around each bare word in it.

    Quoted words and null stay as they are, and so does the whole of a value that is no word or list of words.
    """
    if _MEANS_MORE.search(_PIECES.sub(lambda piece: piece["other"] or "", value)):
        return value
    return _PIECES.sub(_quoted, value)


def _quoted(piece: re.Match[str]) -> str:
    word = piece["bare"]
    return piece[0] if word is None or word in _KEPT else f"'{word}'"


_SHOWN = 80
"""Characters of an override that are repeated in a message."""


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose ``conf/`` with Hydra overrides such as ``train.steps=10`` or ``cluster=local``.

    Raises HpcmmError, in one sentence, for an override that does not parse, an unknown key or group option, a value of
    the wrong type, a value that must be given and is not, and a sweep, which is more than one run.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise HpcmmError(f"{override.input_line} is a sweep, and one run was asked for.")
    with explained():
        return to_run(compose_tree(parsed))


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides of known keys, sweeps included. Raises HpcmmError for all others."""
    parser = OverridesParser.create()
    return [_parsed(parser, override) for override in overrides]


def _parsed(parser: OverridesParser, override: str) -> Override:
    shown = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}..."
    try:
        return _known(parser.parse_override(_raw(override)))
    except (HydraException, ValueError) as error:
        raise HpcmmError(
            f"Not a Hydra override: {shown!r}: {_first_line(error)} Write KEY=VALUE, or GROUP=OPTION."
        ) from error
    except RecursionError:
        raise HpcmmError(f"{shown!r} is nested too deeply.") from None


def compose_tree(overrides: Sequence[Override]) -> DictConfig:
    """The merged tree, its interpolations unresolved. Raises Hydra's errors: use within :func:`explained`.

    The parts that ``hydra.compose`` is made of, without Hydra's own configuration of jobs and loggers, which takes as
    long as all of ``conf/`` and is thrown away.
    """
    setbase("1.3")
    for source in (FileConfigSource, StructuredConfigSource):
        SourcesRegistry.instance().register(source)
    ConfigStore.instance().store(name="schema", node=RunConfig)
    search = ConfigSearchPathImpl()
    search.append("main", f"file://{resource('conf')}")
    search.append("schema", "structured://")
    loader = ConfigLoaderImpl(search)
    repository = CachingConfigRepository(loader.repository)
    parser = OverridesParser.create()
    parsed = [parser.parse_override(override_text(override)) for override in overrides]
    defaults = create_defaults_list(repository, "config", parsed, prepend_hydra=False, skip_missing=False)
    tree = loader._compose_config_from_defaults_list(defaults.defaults, repository)
    OmegaConf.set_struct(tree, True)
    loader._apply_overrides_to_config(defaults.config_overrides, tree)
    return tree


def to_run(composed: DictConfig) -> RunConfig:
    """The typed configuration; resolves the interpolations of ``composed``."""
    OmegaConf.resolve(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise HpcmmError(f"The configuration needs a value for {', '.join(missing)}: give it as {missing[0]}=VALUE.")
    run = OmegaConf.to_object(composed)
    assert isinstance(run, RunConfig)
    return run


@contextmanager
def explained() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into one sentence each."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise HpcmmError(_explain(error)) from error
    except RecursionError:
        raise HpcmmError("The configuration is nested too deeply, or refers to itself.") from None


def config_groups() -> dict[str, list[str]]:
    """The groups of ``conf/``, such as ``model`` and ``model/decoder``, with their options, both sorted."""
    root = resource("conf")
    return {
        group.relative_to(root).as_posix(): sorted(option.stem for option in group.glob("*.yaml"))
        for group in sorted(root.rglob("*"))
        if group.is_dir()
    }


def override_text(override: Override) -> str:
    """The override as Hydra is to read it."""
    text = override.input_line
    assert text is not None
    # Hydra adds a key to a dictionary only when it is told so with ++.
    in_dictionary = get_origin(_type_of(override.key_or_group)) is dict
    return f"++{text}" if in_dictionary and override.type is OverrideType.CHANGE else text


def _raw(override: str) -> str:
    """``override`` with its words quoted where they are to stay as they are written (``1e-4``, ``true``, ``007``)."""
    key, separator, value = override.partition("=")
    return f"{key}{separator}{quote_bare_words(value)}" if _takes_text(_type_of(key.lstrip("+"))) else override


def _takes_text(annotation: Any) -> bool:
    """Whether a value of this type is text, or made of text: ``str | None``, ``list[str]``, ``dict[str, str]``."""
    values = get_args(annotation)[1:] if get_origin(annotation) is dict else get_args(annotation)
    return str in values


def _type_of(key: str) -> Any:
    """The type of a key of RunConfig, that of the whole dictionary for a key in one, None for an unknown key."""
    node: Any = RunConfig
    for part in key.split("."):
        if get_origin(node) is dict:
            break
        node = type_hints(node).get(part) if isinstance(node, type) and is_dataclass(node) else None
    return node


@functools.cache
def type_hints(schema: Hashable) -> dict[str, Any]:
    """The types of a class' fields. Python evaluates their text at each question, which a sweep asks thousands of."""
    return get_type_hints(schema)


def _known(override: Override) -> Override:
    """``override`` when its key is known; raises HpcmmError, naming the valid ones, when it is not."""
    key = override.key_or_group
    groups = config_groups()
    if override.is_hydra_override():
        raise HpcmmError(f"{key} is a setting of Hydra's, which hpcmm makes itself: leave it out.")
    if key in groups:
        if override.value() is None:
            without = ", or leave it out" if key == "experiment" else ""
            raise HpcmmError(f"{key} needs an option: choose one of {', '.join(groups[key])}{without}.")
        return override
    node: Any = RunConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not is_dataclass(node):
            break
        valid = [field.name for field in fields(node)]
        if part not in valid:
            raise HpcmmError(_unknown(".".join(parts[:depth]), part, valid + (sorted(groups) if depth == 0 else [])))
        assert isinstance(node, type)
        node = type_hints(node)[part]
    return override


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
        node = type_hints(node)[part]
    return [field.name for field in fields(node)] if is_dataclass(node) else []


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0].strip()
    return line if line.endswith(".") else line + "."
