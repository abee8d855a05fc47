"""Overrides -> :class:`~hpcmm.config.schema.RunConfig`, with errors that name the valid keys."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hpcmm.config.keys import part_maps_of, parts_of
from hpcmm.config.parts import NAME, folders_of, with_parts
from hpcmm.config.schema import RunConfig
from hpcmm.config.space import ConfigSpace, elements_of, explained, first_line, space_of
from hpcmm.errors import HpcmmError

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
    space = space_of(overrides)
    parsed = parse_overrides(overrides, space)
    for override in parsed:
        if override.is_sweep_override():
            raise HpcmmError(f"{override.input_line} is a sweep, and one run was asked for.")
    with explained(space):
        return to_run(compose_tree(parsed, space, once=True))


def parse_overrides(overrides: Sequence[str], space: ConfigSpace) -> list[Override]:
    """Parse overrides of known keys, sweeps included. Raises HpcmmError for all others."""
    parser = OverridesParser.create()
    return [_parsed(parser, override, space) for override in overrides]


def _parsed(parser: OverridesParser, override: str, space: ConfigSpace) -> Override:
    shown = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}..."
    try:
        return _as_group(_known(parser.parse_override(_raw(override, space)), space), parser, space)
    except (HydraException, ValueError) as error:
        remedy = "Write KEY=VALUE, or GROUP=OPTION."
        if "=" not in override and (override.endswith(".py") or shutil.which(override) is not None):
            remedy = f"Put -- before the command that is to run: -- {shlex.quote(shown)} ..."
        raise HpcmmError(f"Not a Hydra override: {shown!r}: {first_line(error)} {remedy}") from error
    except RecursionError:
        raise HpcmmError(f"{shown!r} is nested too deeply.") from None


def _as_group(override: Override, parser: OverridesParser, space: ConfigSpace) -> Override:
    """``model.decoder=mlp`` as ``model/decoder=mlp``, if these are options, so that both mean the same in all.

    In a dictionary of parts, ``model.modalities.image=vit`` as ``model/modality@model.modalities.image=vit``.
    """
    key = override.key_or_group
    if override.type is not OverrideType.CHANGE or override.package is not None:
        return override
    for part, group in parts_of(space.schema):
        if key == part and group.group in space.chosen and (names := _options_in(override, group.group, space)):
            return parser.parse_override(f"{group.group}={','.join(names)}")
    for parts, group in part_maps_of(space.schema):
        if key.rpartition(".")[0] == parts and (names := _options_in(override, group.group, space)):
            chosen = f"{group.group}@{key}"
            new = "" if chosen in space.chosen else "+"
            return parser.parse_override(f"{new}{chosen}={','.join(names)}")
    return override


def _options_in(override: Override, group: str, space: ConfigSpace) -> list[str]:
    """The values of ``override``, a sweep's or its one, if all of them are options of ``group``; else none."""
    each = elements_of(override, space) if override.is_sweep_override() else [override]
    names = [element.value() for element in each]
    return [str(name) for name in names] if all(name in space.groups.get(group, []) for name in names) else []


def compose_tree(overrides: Sequence[Override], space: ConfigSpace, *, once: bool = False) -> DictConfig:
    """The merged tree, its interpolations unresolved. Raises Hydra's errors: use within :func:`explained`.

    ``once``: nothing else is composed in this space, so its files need no copies.
    The parts that ``hydra.compose`` is made of, without Hydra's own configuration of jobs and loggers, which takes as
    long as all of ``conf/`` and is thrown away.
    """
    loader, repository = space.loader, space.repository if once else space.files_to_merge()
    parser = OverridesParser.create()
    parsed = [parser.parse_override(override_text(override, space)) for override in overrides]
    defaults = create_defaults_list(repository, "config", parsed, prepend_hydra=False, skip_missing=False)
    tree = loader._compose_config_from_defaults_list(defaults.defaults, repository)
    _note_names(tree, defaults.defaults, space.schema)
    OmegaConf.set_struct(tree, True)
    loader._apply_overrides_to_config(defaults.config_overrides, tree)
    return tree


def _note_names(tree: DictConfig, chosen: Sequence[ResultDefault], schema: type[RunConfig]) -> None:
    """Write into each part that a group option chose what that option is called."""
    for default in chosen:
        package, path = default.package or "", default.config_path or ""
        groups = [group for key, group in parts_of(schema) if key == package]
        groups += [group for key, group in part_maps_of(schema) if key == package.rpartition(".")[0]]
        part = OmegaConf.select(tree, package) if groups else None
        if groups and path.startswith(f"{groups[0].group}/") and isinstance(part, DictConfig):
            part[NAME] = path.rpartition("/")[2]


def to_run(composed: DictConfig) -> RunConfig:
    """The typed configuration; resolves the interpolations of ``composed``, and the names of parts."""
    OmegaConf.resolve(composed)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise HpcmmError(f"The configuration needs a value for {', '.join(missing)}: give it as {missing[0]}=VALUE.")
    run = OmegaConf.to_object(composed)
    assert isinstance(run, RunConfig)
    return with_parts(run, folders_of(run.launch.config_dir))


def override_text(override: Override, space: ConfigSpace) -> str:
    """The override as Hydra is to read it."""
    text = override.input_line
    assert text is not None
    # Hydra adds a key to a dictionary, or a parameter to a part, only when it is told so with ++.
    key = override.key_or_group
    in_dictionary = key not in space.groups and (get_origin(space.type_of(key)) is dict or space.is_part(key))
    return f"++{text}" if in_dictionary and override.type is OverrideType.CHANGE else text


def _raw(override: str, space: ConfigSpace) -> str:
    """``override`` with its words quoted if they are to stay as they are written (``1e-4``, ``true``, ``007``)."""
    key, separator, value = override.partition("=")
    if key.lstrip("+") in space.groups:
        return override
    return f"{key}{separator}{quote_bare_words(value)}" if _takes_text(space.type_of(key.lstrip("+"))) else override


def _takes_text(annotation: Any) -> bool:
    """Whether a value of this type is text, or made of text: ``str``, ``list[str]``, ``dict[str, str]``."""
    values = get_args(annotation)[1:] if get_origin(annotation) is dict else get_args(annotation)
    return annotation is str or str in values or any(map(_takes_text, values))


def _known(override: Override, space: ConfigSpace) -> Override:
    """``override`` when its key is known; raises HpcmmError, naming the valid ones, when it is not."""
    key = override.key_or_group
    if override.is_hydra_override():
        raise HpcmmError(f"{key} is a setting of Hydra's, which hpcmm makes itself: leave it out.")
    if key == "parallel.name":
        raise HpcmmError(f"{key} says what the file is called that parallel=NAME chooses: choose it so.")
    if key not in space.groups:
        space.check_key(key)
    elif not override.is_sweep_override() and not isinstance(override.value(), str | list):
        without = ", or leave it out" if key == "experiment" else ""
        raise HpcmmError(f"{key} needs an option: choose one of {', '.join(space.groups[key])}{without}.")
    return override
