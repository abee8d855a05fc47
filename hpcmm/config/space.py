"""What overrides are read in: the folders with config groups, and the keys that the chosen task has."""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_origin

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.version import setbase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcmm.config.keys import parts_of, type_hints
from hpcmm.config.parts import (
    CONFIG_DIR,
    TARGET,
    check_writers,
    folders_of,
    given_as,
    given_folders,
    searched_places,
    yaml_problem,
)
from hpcmm.config.schema import RunConfig
from hpcmm.config.untyped_config import refuse_traps_of_own
from hpcmm.config.workload import load_workload
from hpcmm.errors import HpcmmError
from hpcmm.files import MOST_BYTES
from hpcmm.resources import resource
from hpcmm.text import printable

TASK_CLASS = f"task.{TARGET}"
MOST_ENTRIES = 10_000
CONFIG_DIR_OPTION = "--config-dir"
DEEPEST = 3
"""Levels of config groups below a group, such as the one of ``model/decoder``."""


@dataclass(frozen=True)
class ConfigSpace:
    """The groups and keys that a run can have."""

    folders: tuple[Path, ...]
    """Folders with config groups: hpcmm's own, then the user's, of which the first that has a name counts."""
    schema: type[RunConfig]
    loader: ConfigLoaderImpl = field(repr=False)
    repository: CachingConfigRepository = field(repr=False)
    """The files that have been read, so that no one is read twice."""
    chosen: frozenset[str] = frozenset()
    """Groups of which an option is chosen, so that an override can choose another: ``model/decoder``, and with the
    key that it is chosen for ``model/decoder@model.decoder``."""

    def files_to_merge(self) -> CachingConfigRepository:
        """The files that have been read, as copies: merging changes what it merges."""
        repository = copy.copy(self.repository)
        repository.cache = copy.deepcopy(self.repository.cache)
        return repository

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """The groups, such as ``model`` and ``model/decoder``, with their options, both sorted."""
        found: dict[str, set[str]] = {}
        for root in self.folders:
            for group, options in _groups_in(root):
                found.setdefault(group, set()).update(options)
        return {group: sorted(found[group]) for group in sorted(found)}

    def type_of(self, key: str) -> Any:
        """The type of a key, that of the whole dictionary for a key in one, None for an unknown key."""
        node: Any = self.schema
        for part in key.split("."):
            if get_origin(node) is dict:
                break
            node = type_hints(node).get(part) if isinstance(node, type) and is_dataclass(node) else None
        return node

    def field_of(self, key: str) -> tuple[str, ...]:
        """The field that ``key`` lies in: itself, or the dictionary or the part that it is a key of."""
        node: Any = self.schema
        path: list[str] = []
        for part in key.split("."):
            if not (isinstance(node, type) and is_dataclass(node)):
                break
            node = type_hints(node)[part]
            path.append(part)
        return tuple(path)

    def is_part(self, key: str) -> bool:
        """Whether ``key``, or the key that it lies in, holds a part."""
        return any(key == part or key.startswith(f"{part}.") for part, _ in parts_of(self.schema))

    def check_key(self, key: str) -> None:
        """Raises HpcmmError, naming the valid keys, if there is no such key."""
        node: Any = self.schema
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not is_dataclass(node):
                break
            assert isinstance(node, type)
            if part not in type_hints(node):
                raise HpcmmError(self.unknown(".".join(parts[:depth]), part))
            node = type_hints(node)[part]

    def unknown(self, parent: str, part: str) -> str:
        """A sentence on the key ``part`` of the section ``parent``, which has no such key."""
        node: Any = self.schema
        for each in filter(None, parent.split(".")):
            node = type_hints(node)[each]
        valid = [field.name for field in fields(node) if field.name[0] != "_"] if is_dataclass(node) else []
        valid += [] if parent else [group for group in self.groups if "/" not in group or group in self.chosen]
        prefix = f"{parent}." if parent else ""
        names = sorted({prefix + name for name in valid})
        close = [name for name in difflib.get_close_matches(prefix + part, names, n=2) if name != prefix + part][:1]
        if not parent and part in self.groups:
            return (
                f"{part} is a config group, but the chosen task has no such key: choose a task that has it, or leave "
                f"{part} out. A script has arguments of its own, in task.args or behind --."
            )
        elsewhere = [key for key in _keys_within(self.schema) if parent and key.rpartition(".")[2] == part]
        close = elsewhere if len(elsewhere) == 1 else close
        hint = f"did you mean {close[0]}? " if close else ""
        where = f"Keys of {parent}" if parent else "Keys"
        return f"{prefix}{part} is not a configuration key: {hint}{where}: {', '.join(names)}."


def _keys_within(section: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in type_hints(section).items():
        if name[0] != "_":
            yield prefix + name
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _keys_within(kind, f"{prefix}{name}.")


def space_of(overrides: Sequence[str]) -> ConfigSpace:
    """The space of a run: the folders with config groups, and the keys of the task that is chosen.

    The task is chosen as Hydra does it, by overrides, experiments and the defaults of files. Raises HpcmmError if the
    folder, the task or its class is not there, and for a sweep over tasks of different keys.
    """
    parsed = _group_overrides(overrides)
    folders = _folders(parsed)
    loader, repository = _repository(folders)
    bare = ConfigSpace(folders, RunConfig, loader, repository)
    with explained(bare):
        choices = [_chosen(bare, each) for each in _points(bare, parsed)]
    schemas = {schema for schema, _ in choices}
    if len(schemas) > 1:
        raise HpcmmError("This sweep is over tasks that have different keys: launch one after the other.")
    del repository.cache["config_path=schema"]  # that without keys
    for source in repository.get_sources():
        if isinstance(source, StructuredConfigSource):
            source.store.store(name="schema", node=choices[0][0])  # a copy of Hydra's own store
    return ConfigSpace(folders, choices[0][0], loader, repository, choices[0][1])


@contextmanager
def explained(space: ConfigSpace) -> Iterator[None]:
    """Turn Hydra's, OmegaConf's and YAML's errors into one sentence each."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise HpcmmError(_explain(error, space)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HpcmmError(f"The configuration cannot be read: {yaml_problem(error)}.") from error
    except RecursionError:
        raise HpcmmError("The configuration is nested too deeply, or refers to itself.") from None


def with_config_dirs(words: Sequence[str], folders: Sequence[str] = ()) -> list[str]:
    """``words`` with ``folders`` of the option ``--config-dir`` in front of what ``launch.config_dir=`` names.

    The option may also stand among ``words``, but for what comes after ``--``. Raises HpcmmError if its folder is
    missing there.
    """
    end = list(words).index("--") if "--" in words else len(words)
    found, others, is_next = list(folders), [], False
    for word in words[:end]:
        name, equals, value = word.partition("=")
        if is_next or (name == CONFIG_DIR_OPTION and equals):
            found.append(word if is_next else value)
            is_next = False
        elif word == CONFIG_DIR_OPTION:
            is_next = True
        else:
            others.append(word)
    if is_next or "" in found:
        raise HpcmmError(f"{CONFIG_DIR_OPTION} needs a folder: write {CONFIG_DIR_OPTION} DIR.")
    if not found:
        return list(words)
    given = _group_overrides(others).get(CONFIG_DIR)
    if given is not None and not given.is_sweep_override() and isinstance(given.value(), str):
        found.append(str(given.value()))
        others = [word for word in others if word.partition("=")[0] != CONFIG_DIR]
    value = QuotedString(os.pathsep.join(found), Quote.single).with_quotes()
    # In front, for of several words for a key the last one counts, and one that is refused must be.
    return [f"{CONFIG_DIR}={value}", *others, *words[end:]]


def _group_overrides(words: Sequence[str]) -> dict[str, Override]:
    """The overrides that may choose the task or the folders, by their key; what does not parse is refused later."""
    parser = OverridesParser.create()
    found: dict[str, Override] = {}
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key in (CONFIG_DIR, TASK_CLASS) or ("." not in key and "=" in word):
            with suppress(HydraException, ValueError, RecursionError):
                found[key] = parser.parse_override(word)
    return found


def _folders(parsed: Mapping[str, Override]) -> tuple[Path, ...]:
    """Where config groups lie, ``launch.config_dir`` among them. Raises HpcmmError if that cannot be used."""
    given = parsed.get(CONFIG_DIR)
    if given is not None and given.is_sweep_override():
        raise HpcmmError(f"{CONFIG_DIR} cannot be swept: name one folder.")
    config_dir = None if given is None else given.value()
    if config_dir is not None and (not isinstance(config_dir, str) or "${" in config_dir):
        raise HpcmmError(f"{CONFIG_DIR} is {config_dir}, but must be the plain name of a folder.")
    for folder in given_folders(config_dir):
        if not folder.is_dir():
            raise HpcmmError(f"{CONFIG_DIR} is {config_dir}, but there is no such folder: {folder}.")
    folders = folders_of(config_dir)
    _refuse_same_names(folders)
    return folders


def _repository(folders: Sequence[Path]) -> tuple[ConfigLoaderImpl, CachingConfigRepository]:
    """Hydra's loader over the folders, and the files that it has read."""
    setbase("1.3")
    for source in (FileConfigSource, StructuredConfigSource):
        SourcesRegistry.instance().register(source)
    ConfigStore.instance().store(name="schema", node={})  # its keys follow, once the task is known
    search = ConfigSearchPathImpl()
    for folder in folders:
        search.append("main", f"file://{folder}")
    search.append("schema", "structured://")
    loader = ConfigLoaderImpl(search)
    return loader, _CheckedRepository(loader.repository)


class _CheckedRepository(CachingConfigRepository):
    """One that reads no file of the user's which would take Hydra without end to understand, or all of the memory."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        if f"config_path={config_path}" in self.cache:
            return super().load_config(config_path)
        folders = [Path(source.path) for source in self.get_sources() if isinstance(source, FileConfigSource)]
        name = f"{config_path.removesuffix('.yaml')}.yaml"
        for folder in folders:
            if (folder / name).exists() if folder == resource("conf") else _is_checked(folder / name, folder):
                break  # the others' files of that name are not read
        try:
            return super().load_config(config_path)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            file = next((folder / name for folder in folders if (folder / name).exists()), name)
            raise HpcmmError(f"{file} cannot be read: {yaml_problem(error)}.") from error


def _is_checked(file: Path, top: Path) -> bool:
    """Whether a file of the folder ``top`` is there. Raises HpcmmError if it is, and cannot be read, or everybody
    could have written it."""
    try:
        if not file.exists():
            return False
        check_writers(file, top)
        if not file.is_file():
            raise HpcmmError(f"{file} cannot be read: it is not a file.")
        with file.open("rb") as opened:  # what a link names too, for the folder is the user's own choice
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise HpcmmError(f"{file} cannot be read: it is larger than {MOST_BYTES} bytes.")
        refuse_traps_of_own(content.decode())
        return True
    except OSError as error:
        raise HpcmmError(f"{file} cannot be read: {yaml_problem(error)}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise HpcmmError(f"{file} cannot be read: {yaml_problem(error)}.") from error


def _points(space: ConfigSpace, parsed: Mapping[str, Override]) -> Iterator[list[Override]]:
    """The group choices of each combination of swept tasks and experiments; of other sweeps the first value."""
    choices: list[list[Override]] = []
    for key, override in parsed.items():
        if key == TASK_CLASS or key not in space.groups or not _names_options(override):
            continue  # the class of the task comes last, and what is no option is refused later
        values = elements_of(override, space) if override.is_sweep_override() else [override]
        choices.append(values if key in ("task", "experiment") else values[:1])
    given = [parsed[TASK_CLASS]] if TASK_CLASS in parsed else []
    for point in itertools.product(*choices):
        yield [*point, *given]


def _names_options(override: Override) -> bool:
    return override.is_sweep_override() or isinstance(override.value(), str)


def elements_of(override: Override, space: ConfigSpace) -> list[Override]:
    """An override for each value of a sweep over options."""
    swept = override._value
    names: Iterable[Any]
    if isinstance(swept, Glob):
        group = override.key_or_group
        if group not in space.groups:
            raise HpcmmError(
                f"{override.input_line}: glob() is for config groups, and {group} is a key: list its values."
            )
        names = swept.filter(space.groups[group])
        if not names:
            raise HpcmmError(
                f"{override.input_line} fits no option of the group {group}, which has "
                f"{', '.join(space.groups[group])}."
            )
    else:
        names = override.sweep_iterator() if override.is_discrete_sweep() else []
    return [
        replace(
            override,
            value_type=ValueType.ELEMENT,
            _value=name,
            # Made of the parsed values and not parsed again: that takes the grammar a millisecond for each.
            input_line=f"{override.get_key_element()}={Override._get_value_element_as_str(name)}",
        )
        for name in names
    ]


def _chosen(space: ConfigSpace, point: Sequence[Override]) -> tuple[type[RunConfig], frozenset[str]]:
    """The keys of the task that a point chooses, and all groups that it chooses an option of."""
    groups = [override for override in point if override.key_or_group != TASK_CLASS]
    defaults = create_defaults_list(space.repository, "config", groups, prepend_hydra=False, skip_missing=False)
    target: Any = None
    for default in defaults.defaults:
        loaded = space.repository.load_config(default.config_path) if default.config_path else None
        if loaded is not None and default.package in ("", "task") and default.config_path != "schema":
            values: Any = loaded.config
            section = values if default.package == "task" else values.get("task")
            target = (section.get(TARGET) if OmegaConf.is_dict(section) else None) or target
    for override in point:
        target = override.value() if override.key_or_group == TASK_CLASS else target
    names = set()
    for default in defaults.defaults:
        group = (default.config_path or "").rpartition("/")[0]
        names |= {group, f"{group}@{default.package}"}
    return RunConfig if target is None else load_workload(str(target)).schema, frozenset(names)


def _refuse_same_names(folders: Sequence[Path]) -> None:
    """A user's file that has the name of one of hpcmm's own would silently not be read."""
    own, *others = folders
    for folder in others:
        names = [f"{group}/{option}.yaml" for group, options in _groups_in(folder) for option in options]
        for name in ("config.yaml", *names):
            if (folder / name).is_file() and (own / name).is_file():
                raise HpcmmError(f"{folder / name}: hpcmm has a {name} of its own, so give yours another name.")


def _groups_in(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each config group below ``root`` with its options. Raises HpcmmError for a folder that holds far more."""
    seen = 0
    for folder, folders, files in os.walk(root):
        seen += len(folders) + len(files)
        if seen > MOST_ENTRIES:
            raise HpcmmError(
                f"{given_as(root)}, which holds more than {MOST_ENTRIES} files: name a folder with config groups."
            )
        group = Path(folder).relative_to(root).as_posix()
        folders[:] = [each for each in folders if not each.startswith(".")] if group.count("/") < DEEPEST else []
        if group != ".":
            yield group, [file.removesuffix(".yaml") for file in files if file.endswith(".yaml")]


def groups_help(space: ConfigSpace) -> str:
    """A line for each config group with its options, and where they were searched."""
    lines = [printable(f"  {name + '=':<12} {', '.join(options)}") for name, options in space.groups.items()]
    return "\n".join([*lines, f"  searched: {searched_places(space.folders)}"])


def _explain(error: Exception, space: ConfigSpace) -> str:
    """One sentence from Hydra's and OmegaConf's errors, which come in several lines."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    group = re.search(r"Could not (?:find|load) '?([\w/]+)/([^'\s/]+?)'?[\s.]", text + " ")
    if group and group[1] in (groups := space.groups):
        options = ", ".join(groups[group[1]])
        searched = searched_places(space.folders)
        return (
            f"{group[1]}={group[2]} is not an option of the group {group[1]}: choose one of {options}. "
            f"Searched: {searched}."
        )
    if unused := re.search(r"Could not override '([\w/]+)(?:@[^']*)?'", text):
        return (
            f"{unused[1]} is a config group, but the chosen task has no use for it: choose a task that has, or leave "
            f"{unused[1]} out."
        )
    if key and "not in" in text:
        parent, _, part = key[1].rpartition(".")
        return space.unknown(parent, part)
    if in_file := re.match(r"In '([^']+)': \w+ raised while composing config:\n(.+)", text):
        said = in_file[2].strip().rstrip(".")
        return f"{key[1] if key else 'The configuration'}: {said} (in {in_file[1]}.yaml)."
    if key and "is not a ListConfig, list or tuple" in text:
        given = re.search(r"override [^=]*=['\"]?(.*?)['\"]?$", str(error))
        said = f"{key[1]} is a list: write {key[1]}=[{given[1] if given else 'WORD'}]."
    else:
        said = f"{key[1]}: {first_line(cause)}" if key else first_line(cause)
    return said


def first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0].strip()
    return line if line.endswith(".") else line + "."
