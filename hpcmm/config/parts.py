"""A part of a model: a class and its parameters, in a YAML file of a config group, chosen by the file's name.

``conf/model/decoder/mlp.yaml`` holds ``_target_: package.module.Class`` and parameters of that class. A login node does
not import the class, since that would import torch: it reads the class's base and parameters from the source text. A
rank imports it, checks that it is a subclass of the group's base, and calls it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISVTX, S_IWOTH
from typing import Any, TypeVar

import platformdirs
import yaml

from hpcmm.config.class_source import class_source, described, fits, is_read_of_torch, syntax_problem
from hpcmm.config.keys import PartGroup, part_maps_of, parts_of
from hpcmm.config.untyped_config import refuse_traps_of_own
from hpcmm.errors import HpcmmError
from hpcmm.files import group_can_write, is_known_owner, name_of, read_text
from hpcmm.resources import ask_for_module, guard_imports, resource, why_not_found
from hpcmm.text import visible

T = TypeVar("T")
CONFIG_DIR = "launch.config_dir"
CONFIG_DIRS_VARIABLE = "HPCMM_CONFIG_DIR"
TARGET = "_target_"
NAME = "name"
"""Key of a resolved part that says what its file is called; no parameter."""


_LONGEST_NAME = 200
"""Of an option; a file's name has 255 characters at most."""


class _Loader(yaml.SafeLoader):
    """Reads ``1e-4`` as a number, as OmegaConf does, and YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?)$"
    ),
    list("-+0123456789."),
)


def own_folders() -> tuple[Path, ...]:
    """The folder of hpcmm's own config groups alone, for what a frozen configuration may still ask."""
    return (resource("conf"),)


def folders_of(config_dir: str | None) -> tuple[Path, ...]:
    """The folders that config groups are searched in, in this order; some of them may not be there.

    hpcmm's own, then those of ``launch.config_dir``, of HPCMM_CONFIG_DIR (both several by ``:``), and the user's own.
    """
    given = [*_named_in(config_dir or "", CONFIG_DIR), *_of_the_environment(), *_of_the_user()]
    return tuple(dict.fromkeys([*own_folders(), *given]))


def given_folders(config_dir: str | None) -> list[Path]:
    """Those that ``launch.config_dir`` names, which must be there."""
    return _named_in(config_dir or "", CONFIG_DIR)


def user_config_folder() -> Path:
    """Where the user's own config groups lie: ``~/.config/hpcmm/conf``. It may not be there."""
    return Path(platformdirs.user_config_dir("hpcmm", appauthor=False)) / "conf"


def searched_places(folders: Sequence[Path]) -> str:
    """The folders as a list in a sentence: what each is, and which is not there."""
    own, *others = folders
    said = [f"{visible(str(own))} (hpcmm's own)"]
    for folder in others:
        readable = os.access(folder, os.R_OK | os.X_OK)
        missing = "not there" if not folder.is_dir() else "" if readable else "cannot be read"
        said.append(f"{visible(str(folder))}{f' ({missing})' if missing else ''}")
    return ", ".join(said)


def given_as(folder: Path) -> str:
    """How a folder of config groups was given, as the begin of a sentence."""
    if folder in _of_the_environment():
        return f"{CONFIG_DIRS_VARIABLE} has {visible(str(folder))}"
    if folder in _of_the_user():
        return f"Your configuration folder is {visible(str(folder))}"
    return f"{CONFIG_DIR} is {visible(str(folder))}"


def _of_the_environment() -> list[Path]:
    return _named_in(os.environ.get(CONFIG_DIRS_VARIABLE, ""), CONFIG_DIRS_VARIABLE)


def _of_the_user() -> list[Path]:
    folder = user_config_folder()
    return [folder] if folder.is_absolute() else []  # without a home it would be one of the current folder


def _named_in(listed: str, setting: str) -> list[Path]:
    try:
        return [Path(name).expanduser().absolute() for name in listed.split(os.pathsep) if name]
    except RuntimeError as error:
        raise HpcmmError(f"{setting} is {visible(listed)}, but there is no such user's home.") from error


def options_of(group: str, folders: Sequence[Path]) -> list[str]:
    """The names that ``group`` has in ``folders``, sorted."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def resolved_part(value: Any, group: str, folders: Sequence[Path]) -> Any:
    """The mapping that the name ``value`` selects; ``value`` itself if it is a mapping, or no such file exists."""
    if not isinstance(value, str) or Path(value).name != value or len(value) > _LONGEST_NAME:
        return value
    for folder in folders:
        if (file := folder / group / f"{value}.yaml").is_file():
            if folder != folders[0]:
                check_writers(file, folder)
            return {NAME: value, **_contents(file, file.stat().st_mtime_ns)}
    return value


def check_writers(file: Path, top: Path) -> None:
    """Say, once for the folder ``top`` of a user's, who else could change a file that is chosen there.

    Such a file may name code, and commands that the job starts with. Raises HpcmmError if everybody could change it.
    """
    real, real_top = (Path(os.path.realpath(each)) for each in (file, top))
    for path, above in {(file, top), (real, real_top)}:
        for each in (*reversed(path.parents), path):
            facts = each.lstat()
            if S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077:
                break  # nobody else comes further
            # With the sticky bit others cannot exchange a folder, but they can add a file.
            is_asked = not S_ISLNK(facts.st_mode) and (each.is_relative_to(above) or not facts.st_mode & S_ISVTX)
            if is_asked and facts.st_mode & S_IWOTH:
                raise HpcmmError(
                    f"{given_as(top)}, but {visible(str(each))} can be written by everybody, and "
                    "what lies there would run as you: close it to them (chmod o-w), or copy it to a folder of your "
                    "own."
                )
            if is_asked and group_can_write(each, facts):
                _say_who_writes(top, f"{visible(str(each))} can be written by its group")
            elif not is_known_owner(facts.st_uid):
                _say_who_writes(top, f"{visible(str(each))} belongs to user {name_of(facts.st_uid)}")


_said: set[Path] = set()


def _say_who_writes(top: Path, who: str) -> None:
    if top not in _said:
        _said.add(top)
        print(f"hpcmm: {given_as(top)}; {who}, so others could change what this run does.", file=sys.stderr)


@functools.lru_cache(maxsize=1000)
def _contents(file: Path, _changed_ns: int) -> Mapping[str, Any]:
    return read_config_yaml(file)


def read_config_yaml(file: Path) -> dict[str, Any]:
    """The values of a file of a config group. Raises HpcmmError that names file, line and what is wrong there."""
    try:
        text = read_text(file)
        refuse_traps_of_own(text)
        values = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HpcmmError(f"{file} cannot be read: {yaml_problem(error)}.") from error
    if values is not None and not isinstance(values, dict):
        raise HpcmmError(f"{file} holds no keys: write KEY: VALUE, one a line.")
    return {str(key): value for key, value in (values or {}).items()}


def yaml_problem(error: BaseException) -> str:
    """What is wrong with a YAML file, and in which line, in a few words."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def with_parts(config: T, folders: Sequence[Path]) -> T:
    """``config`` with each part that is a name replaced by what the file of that name holds."""
    for key, group in parts_of(type(config)):
        section, _, name = key.rpartition(".")
        holder = _value(config, section) if section else config
        setattr(holder, name, _found(getattr(holder, name), group.group, folders))
    for key, group in part_maps_of(type(config)):
        parts = _value(config, key)
        for name, part in parts.items():
            parts[name] = _found(part, group.group, folders)
    return config


def _found(part: Any, group: str, folders: Sequence[Path]) -> Any:
    return _truly_named(resolved_part(part, group, folders), group, folders)


def _truly_named(part: Any, group: str, folders: Sequence[Path]) -> Any:
    """``part`` without its name if the file of that name holds another class: it is called by its class then."""
    if isinstance(part, Mapping) and NAME in part:
        named = resolved_part(part[NAME], group, folders)
        if isinstance(named, Mapping) and named.get(TARGET) != part.get(TARGET):
            return {key: value for key, value in part.items() if key != NAME}
    return part


def _is_option(name: Any, group: str, folders: Sequence[Path]) -> bool:
    return isinstance(name, str) and isinstance(resolved_part(name, group, folders), Mapping)


def part_name(part: Any) -> str:
    """What tables call the part: its name, else its class."""
    if isinstance(part, Mapping):
        return str(part.get(NAME) or str(part.get(TARGET, "")).rpartition(".")[2])
    return str(part)


def _parts_in(config: Any) -> Iterator[tuple[str, PartGroup, Any]]:
    """Key, group and value of each part of the run, those of dictionaries among them."""
    for key, group in parts_of(type(config)):
        yield key, group, _value(config, key)
    for key, group in part_maps_of(type(config)):
        yield from ((f"{key}.{name}", group, part) for name, part in _value(config, key).items() if part is not None)


def targets_of(config: Any) -> Iterator[str]:
    """The classes, as ``package.module.Class``, that the run names: its workload and its parts."""
    if config.task._target_ is not None:
        yield config.task._target_
    for _, _, part in _parts_in(config):
        if isinstance(part, Mapping) and TARGET in part:
            yield str(part[TARGET])


def part_problems(config: Any) -> Iterator[str]:
    """A sentence for each part of ``config`` that is not there, is of the wrong class, or has a wrong parameter."""
    folders = folders_of(config.launch.config_dir)
    for key, group, part in _parts_in(config):
        if not isinstance(part, Mapping):
            yield f"{key} is {part!r}, but hpcmm has {', '.join(options_of(group.group, folders))}."
        elif not isinstance(part.get(TARGET), str):
            yield f"{key} has no {TARGET}, which names its class: choose {group.group}=NAME, or give it."
        elif NAME in part and not _is_option(part[NAME], group.group, folders):
            yield f"{key}.{NAME} is {part[NAME]!r}, but it is given by {group.group}=NAME alone: leave it out."
        elif part != (own := resolved_part(part.get(NAME), group.group, own_folders())) or not _is_of_torch(own):
            yield from _class_problems(key, part, group)


def _is_of_torch(own: Mapping[str, Any]) -> bool:
    """A class of PyTorch's that a file of hpcmm's own names is right, and to read it takes as long as all the rest."""
    return str(own.get(TARGET)).startswith("torch.")


def build_part(part: Any, group: PartGroup, **given: Any) -> Any:
    """The object that ``part`` describes, with the parameters of its file and those ``given`` by the workload.

    Raises HpcmmError if the class cannot be imported, is not a subclass of the group's base, or refuses its parameters.
    """
    part = resolved_part(part, group.group, own_folders())
    if not isinstance(part, Mapping):
        raise HpcmmError(
            f"{group.group}={part} is not known; valid: {', '.join(options_of(group.group, own_folders()))}."
        )
    base, found = import_class(group.base), import_class(str(part[TARGET]))
    if not issubclass(found, base):
        raise HpcmmError(f"{part[TARGET]} is not a {base.__name__}, which each {group.group} must be.")
    parameters = {name: value for name, value in part.items() if name not in (TARGET, NAME)}
    try:
        return found(**given, **parameters)
    except TypeError as error:
        raise HpcmmError(f"{part[TARGET]} does not take these parameters: {error}.") from error
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise cannot_be_made(part, group, error) from error


def cannot_be_made(part: Any, group: PartGroup, error: Exception) -> HpcmmError:
    """What to raise if a part's class ended with ``error``."""
    says_why = isinstance(error, (ValueError, ArithmeticError))  # another kind is rarely meant for who set the values
    reason = " ".join(str(error).split()) if says_why else own_error(error)
    return HpcmmError(f"{group.group}={part_name(part)} cannot be made: {reason}")


def import_class(target: str) -> type:
    """The class ``package.module.Class``. Raises HpcmmError, in one sentence, if there is none."""
    module, _, name = target.rpartition(".")
    if not all(each.isidentifier() for each in target.split(".")) or not module:
        raise HpcmmError(f"{target[:_LONGEST_NAME]} cannot be imported: write package.module.Class.")
    guard_imports()
    ask_for_module(module)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and (why := why_not_found(str(error.name))) is not None:
            raise HpcmmError(why) from error
        if isinstance(error, ModuleNotFoundError) and not f"{target}.".startswith(f"{error.name}."):
            raise HpcmmError(f"{target} cannot be imported: its module failed with {own_error(error)}.") from error
        raise HpcmmError(
            f"{target} cannot be imported ({error}): start hpcmm in the folder that holds its "
            "package, or set PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise HpcmmError(f"{target} cannot be imported: {error}.") from error
    except (Exception, SystemExit) as error:  # whatever the module's own code raises when it runs
        raise HpcmmError(f"{target} cannot be imported: its module failed with {own_error(error)}.") from error
    if not isinstance(found, type):
        raise HpcmmError(f"{target} is not a class.")
    return found


def own_error(error: BaseException) -> str:
    """An exception of the user's own code: its class, its words, and the last place in a file that it came from."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError in {error.filename}, line {error.lineno}: {error.msg}"
    places = traceback.extract_tb(error.__traceback__)
    place = f" in {places[-1].filename}, line {places[-1].lineno}" if places else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())}"


def _value(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def class_attribute(part: Mapping[str, Any], name: str) -> Any:
    """A constant of the part's class, or of its nearest base that has it, from the source; None if there is none."""
    source = class_source(str(part.get(TARGET)))
    return None if source is None else source.attributes.get(name)


def _why_unknown(target: str, group: PartGroup) -> str:
    """Why nothing is known of a class from its source."""
    module = target.rpartition(".")[0]
    if target.partition(".")[0] == "torch" and not is_read_of_torch(module):  # none of its classes is any group's
        return f"that is not a {group.base.rpartition('.')[2]} ({group.base})."
    if (why := why_not_found(module)) is not None:
        return why
    if (problem := syntax_problem(module)) is not None:
        return f"{problem}."
    if module and importlib.util.find_spec(package := module.partition(".")[0]) is None:
        return f"there is no package {package}: install it, start hpcmm in the folder that holds it, or set PYTHONPATH."
    return (
        "there is no such class: write package.module.Class, and start hpcmm in the folder that holds the package, or "
        "set PYTHONPATH."
    )


def _class_problems(key: str, part: Mapping[str, Any], group: PartGroup) -> Iterator[str]:
    target = str(part[TARGET])
    source = class_source(target)
    if source is None:
        yield f"{key}.{TARGET} is {target!r}, but {_why_unknown(target, group)}"
        return
    if target == group.base:
        yield f"{key}.{TARGET} is {target!r}, which only says what a {group.group} is: name a subclass of it."
        return
    if source.is_whole and group.base not in source.bases:
        yield f"{key}.{TARGET} is {target!r}, which is not a {group.base.rpartition('.')[2]} ({group.base})."
        return
    own = {name: value for name, value in part.items() if name not in (TARGET, NAME)}
    settable = [name for name in source.parameters if name not in group.given]
    for name, value in own.items():
        if name in group.given:
            yield f"{key}.{name} cannot be given: the workload sets it."
        elif name not in source.parameters:
            if not source.takes_any:
                known = ", ".join(settable) or "none"
                yield f"{key}.{name} is not a parameter of {target.rpartition('.')[2]}; its parameters: {known}."
        elif isinstance(value, str) and "${" in value:
            yield f"{key}.{name} is {value!r}: choose the part as {group.group}=NAME, for only so is this filled in."
        elif isinstance(value, float) and math.isnan(value):
            yield f"{key}.{name} is {value}, which is no number: give one, or leave it out."
        elif not (value is None and source.parameters[name].nullable) and not fits(
            source.parameters[name].annotation, value
        ):
            wanted = described(source.parameters[name].annotation or ast.Constant(None))
            yield f"{key}.{name} is {value!r}, but {target.rpartition('.')[2]} takes {wanted}."
    for name in settable:
        if source.parameters[name].required and name not in own and name not in group.offered:
            yield f"{key}.{name} is not given, but {target.rpartition('.')[2]} needs it."
