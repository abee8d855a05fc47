"""Files that are whole under their final name, and files of others read with care: regular ones, of a bounded size."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from stat import S_ISREG, S_IWGRP, S_IWOTH
from typing import IO, Any, Union

from hpcmm.text import visible

Content = Union[str, Callable[[IO[bytes]], None]]
"""A file's text, or what writes its bytes."""

MOST_BYTES = 1 << 20
"""Of a small file; a longer one is damage."""

MOST_NAMES = 1 << 18
"""Of a folder's that are looked at; more are another user's trap."""

_WHOLE_RANGE = ["0", "0", str(2**32 - 1)]

_TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def write_whole(path: Path, content: Content, mode: int | None = None) -> None:
    """Write so that ``path`` never exists half-written. ``mode``: its permissions (None: as the umask wants them).

    Raises OSError, with an earlier file left as it was and nothing beside it.
    """
    write_together(path.parent, {path.name: content}, mode)


def write_together(folder: Path, contents: Mapping[str, Content], mode: int | None = None) -> None:
    """Write every file beside its final name, then rename all. Raises OSError with nothing new left behind."""
    for name in contents:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} there is a folder")
    partials: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            partial = folder / f".{name}.{secrets.token_hex(4)}"
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode or 0o666)
            partials[partial] = folder / name
            with os.fdopen(descriptor, "wb") as file:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                if isinstance(content, str):
                    file.write(content.encode("utf-8", errors="replace"))
                else:
                    content(file)
        for partial, path in partials.items():
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: object, indent: int | None = 2) -> None:
    """``values`` as a JSON file that is whole. Raises OSError."""
    write_whole(path, json.dumps(values, indent=indent) + "\n")


@dataclass(frozen=True)
class Opened:
    """A regular file that is open to read, and who else could have written what it holds."""

    file: IO[bytes]
    writer: Path | None
    """The first of its folder, the folders between and the file that another user than this one and root owns, or
    could write; None if there is none."""


def open_checked(path: Path, *, within: Path | None = None) -> Opened:
    """Open a file of the folder ``within`` (None: the one it lies in) to read, and check what was opened.

    What lies there may be another user's trap. So no link is followed below ``within``, everything below it must belong
    to the owner of ``within`` or to root, and only a regular file is opened: a pipe would make the reader wait. All of
    this is asked of what is open, so that nothing can be put in its place between the check and the reading.

    Raises OSError, also if ``path`` does not lie in ``within``.
    """
    folder, writer = _open_folder(path.parent, path.parent if within is None else within)
    try:
        try:
            descriptor = os.open(path.name, _TO_READ, dir_fd=folder.descriptor)
        except OSError as error:
            raise (
                OSError(errno.ELOOP, "no symbolic links are followed here") if error.errno == errno.ELOOP else error
            ) from error
    finally:
        os.close(folder.descriptor)
    try:
        facts = os.fstat(descriptor)
        if not S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        folder.check_owner(facts)
    except OSError:
        os.close(descriptor)
        raise
    return Opened(os.fdopen(descriptor, "rb"), writer or (path if others_write(facts) else None))


def open_regular(path: Path, *, within: Path | None = None) -> IO[bytes]:
    """Open to read, as :func:`open_checked` does. Raises OSError."""
    return open_checked(path, within=within).file


def names_in(folder: Path, *, within: Path | None = None, most: int = MOST_NAMES) -> list[str]:
    """The names in a folder, at most so many of them; none if it cannot be read. Links as in :func:`open_checked`."""
    try:
        opened, _ = _open_folder(folder, folder if within is None else within, os.O_RDONLY)
    except OSError:
        return []
    try:
        with os.scandir(opened.descriptor) as entries:
            return [entry.name for entry in islice(entries, most)]
    except OSError:
        return []
    finally:
        os.close(opened.descriptor)


def is_regular(path: Path) -> bool:
    """Whether a file is there, and no link to one; False also if that cannot be seen."""
    try:
        return S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_text(path: Path, most_bytes: int = MOST_BYTES, *, within: Path | None = None) -> str:
    """All of a small file, opened as by :func:`open_checked`.

    Raises OSError, or ValueError for a file that is larger or holds no UTF-8.
    """
    return read_checked(path, most_bytes, within=within)[0]


def read_checked(path: Path, most_bytes: int = MOST_BYTES, *, within: Path | None = None) -> tuple[str, Path | None]:
    """As :func:`read_text`, and beside it :attr:`Opened.writer`."""
    opened = open_checked(path, within=within)
    with opened.file as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return content.decode("utf-8"), opened.writer


def read_followed(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The first ``most_bytes`` of a regular file, or of one that a link leads to; a pipe is not waited for.

    For files of the user's own and installed ones, whoever owns them. Raises OSError.
    """
    with open_followed(path) as file:
        return file.read(most_bytes)


def open_followed(path: Path) -> IO[bytes]:
    """Open to read, as :func:`read_followed` does. Raises OSError."""
    descriptor = os.open(path, _TO_READ & ~os.O_NOFOLLOW)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_tail(path: Path, most_bytes: int, *, within: Path | None = None) -> str:
    """The end of a file, opened as by :func:`open_checked`; empty if it cannot be read."""
    try:
        with open_regular(path, within=within) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            return file.read(most_bytes).decode(errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class _Folder:
    descriptor: int
    owner: int
    """Of the folder where the walk began."""

    def check_owner(self, facts: os.stat_result) -> None:
        if facts.st_uid not in {self.owner, 0}:
            raise OSError(errno.EPERM, "it belongs to another user than its folder")


def _open_folder(path: Path, within: Path, access: int = os.O_PATH) -> tuple[_Folder, Path | None]:
    """Open ``path``, which is ``within`` or lies below it, step by step; and :attr:`Opened.writer` so far."""
    try:
        names = path.relative_to(within).parts
    except ValueError:
        names = ("..",)
    if ".." in names:
        raise OSError(errno.EINVAL, f"it does not lie in {within}")
    descriptor = os.open(within, (os.O_PATH if names else access) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        folder = _Folder(descriptor, facts.st_uid)
        writer = within if others_write(facts) else None
        for depth, name in enumerate(names, 1):
            flags = (access if depth == len(names) else os.O_PATH) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            above, descriptor = descriptor, os.open(name, flags, dir_fd=descriptor)
            os.close(above)
            folder = replace(folder, descriptor=descriptor)
            facts = os.fstat(descriptor)
            folder.check_owner(facts)
            writer = writer or (within.joinpath(*names[:depth]) if others_write(facts) else None)
    except OSError:
        os.close(descriptor)
        raise
    return folder, writer


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in ``text``, such as a line of a file; None if it is none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def read_json_object(path: Path, most_bytes: int = MOST_BYTES, *, within: Path | None = None) -> dict[str, Any]:
    """The JSON object in a small file, opened as by :func:`open_checked`; empty if there is none."""
    try:
        return json_object(read_text(path, most_bytes, within=within)) or {}
    except (OSError, ValueError):
        return {}


def other_writer(*paths: Path) -> Path | None:
    """The first of ``paths`` that another user than this one and root owns, or could write; None if there is none.

    Raises OSError if one is not there.
    """
    return next((path for path in paths if others_write(path.stat())), None)


def others_write(facts: os.stat_result) -> bool:
    """Whether another user than this one and root owns a file or folder, or could write it."""
    return facts.st_uid not in {os.geteuid(), 0} or facts.st_mode & (S_IWGRP | S_IWOTH) != 0


def is_known_owner(uid: int) -> bool:
    """Whether what this user owns is this user's own, root's, or of nobody that is known in this container.

    The last may be anybody: root made what lies where others cannot write, but not what lies where they can.
    """
    return uid in trusted_above() or _has_no_name_here(uid)


def trusted_above() -> set[int]:
    """Who may own a folder above a run: root, this user, and who became root by sudo, in a folder of their own."""
    sudo = os.environ.get("SUDO_UID", "")
    return {0, os.geteuid()} | ({int(sudo)} if os.geteuid() == 0 and sudo.isdecimal() else set())


def _has_no_name_here(uid: int) -> bool:
    """Whether this stands for the users that a container's user namespace does not know, root among them."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
        mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False
    return uid == overflow and mapped != _WHOLE_RANGE


def name_of(uid: int) -> str:
    """A user's name; the number if there is none."""
    import pwd  # noqa: PLC0415 -- seldom needed, and may ask a server

    try:
        return visible(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return str(uid)


def group_can_write(folder: Path, facts: os.stat_result) -> bool:
    """Whether others can by the rights of the group, in which those of an access control list show as well."""
    if not facts.st_mode & S_IWGRP:
        return False
    return access_list(folder) != b"" or not _is_group_of_one(facts.st_gid, os.geteuid())


def access_list(path: Path) -> bytes:
    """The POSIX access control list in the kernel's form; empty if there is none beside the mode."""
    try:
        return os.getxattr(path, "system.posix_acl_access")
    except OSError:  # none, or a file system without them
        return b""


@cache  # a server may be asked, and a path has many folders of one group
def _is_group_of_one(gid: int, uid: int) -> bool:
    """Whether this is the group that many systems make for each user: of the same name, with no other member."""
    import grp  # noqa: PLC0415 -- as above
    import pwd  # noqa: PLC0415

    try:
        own, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except (KeyError, OverflowError):
        return False
    return own.pw_gid == gid and group.gr_name == own.pw_name and set(group.gr_mem) <= {own.pw_name}


def entries_of(folder: Path, most: int | None = None) -> list[Path]:
    """What lies in a folder, ``most`` of it; nothing if it is closed to us, and so to the job."""
    try:
        return list(islice(folder.iterdir(), most))
    except OSError:
        return []


def resolved(path: Path) -> Path:
    """The path without links; as it is if these cannot be followed, such as while another user exchanges them."""
    try:
        return Path(os.path.realpath(path))
    except OSError:
        return path


def is_folder_here(path: Path) -> bool:
    """Whether it is a folder, and no link to one. False for what is closed to us."""
    try:
        return path.is_dir() and not path.is_symlink()
    except OSError:
        return False


def is_file_here(path: Path, *, unknown: bool = False) -> bool:
    """Whether it is a file or a link to one; ``unknown`` for what is closed to us."""
    try:
        return path.is_file()
    except OSError:
        return unknown


# Kinds of files, and credentials among them. The patterns are compiled when they are first used, for that takes a tenth
# of a dry run.

CODE = frozenset({".py", ".pyi", ".so", ".pyd", ".cu", ".cuh", ".c", ".cc", ".cpp", ".h", ".hpp", ".sh"})
"""How the names of code end."""
SETTINGS = frozenset({".txt", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".md", ".j2", ".jinja"})
"""How the names of small texts end that programs read."""

_DATA = r"(json|ya?ml|toml|ini|cfg|conf|txt|csv|xml)"
_ISSUER = r"(hf|hugging_?face|wandb|github|gh|gitlab|api|auth|access|refresh|bearer|slack|openai|aws|azure|gcp|jwt)"
_SECRET_NAME = (
    r"\.env([._-].*)?|.+\.env|\.envrc"
    r"|[._]netrc|\.pypirc|\.git-credentials|\.pgpass|\.my\.cnf|\.npmrc|\.htpasswd|\.boto|\.s3cfg|\.docker(cfg|configjson)"
    r"|\.vault[._-]?token|kaggle\.json|\.?rclone\.conf|(.*[._-])?kubeconfig(\.ya?ml)?|krb5cc.*"
    r"|id_(rsa|dsa|ecdsa|ed25519|xmss)(?!.*\.pub)([._-].*)?"
    r"|.+\.(pem|key|p8|p12|pfx|kdbx?|jks|keystore|ppk|keytab|ovpn|token|kubeconfig)"
    rf"|(.*[._-])?(credentials?|secrets?|api[._-]?keys?|passwords?|passwd)(\.{_DATA})?"
    r"|(.*[._-])?sa\.json|(.*[._-])?service[._-]?account.*\.json|client_secrets?.*\.json"
    rf"|(.*[._-])?token|({_ISSUER}[._-])*token\.{_DATA}"
)
_CREDENTIAL_PATH = (
    r"(.*/)?(wandb/settings|\.docker/config\.json|\.(aws|kube|ssh|gnupg|azure|huggingface)/.*"
    r"|gcloud/.*|gh/hosts\.ya?ml)"
)
_SAVED = r"(~|\.(bak|old|orig|save|swp))+$"
"""What editors append to the name of a file that they keep."""
_SECRET_TEXT = (
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY"
    rb'|"private_key(_id)?"\s*:\s*"[^"]|"(client_secret|refresh_token)"\s*:\s*"[^"]|"type"\s*:\s*"service_account"'
    rb"|\bhf_[A-Za-z0-9]{30}|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{30}|\bglpat-[\w-]{20}|\bxox[baprs]-[\w-]{20}"
    rb"|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bwandb_v1_\w{20}"
    # What is given to a name that ends like a key's, in the notation of any language.
    rb"|(?i:((?<!public)(?<!public.)(?<!cache.)keys?|tokens?|secrets?|passw(or)?ds?)"
    rb"([_-]?(prod(uction)?|dev|test|staging|live|\d+))?[\"'\\\])]*(,?\s{1,40}[\"']?value[\"']?)?"
    rb"\s{0,9}[:=>]{1,2}[\s\[>|-]{0,20}|\bbearer\s{1,9}|\b(?=sk-[\w-]{20}))[bfru]?[\"'\\]*(?P<value>[\w+/.=~-]{12,})"
)
_MARKS = (
    *(
        b"-----begin ",
        b'"private_key',
        b'"client_secret',
        b'"refresh_token',
        b'"type"',
        b"hf_",
        b"ghp_",
        b"gho_",
        b"ghu_",
    ),
    *(b"ghs_", b"ghr_", b"github_pat_", b"glpat-", b"xox", b"akia", b"asia", b"aiza", b"wandb_v1_"),
    *(b"key", b"token", b"secret", b"passw", b"bearer", b"sk-"),
)
"""How these begin, in lower case. To look for one after the other is many times as fast as for the pattern."""
_READ_FOR_SECRETS = SETTINGS | {"", ".xml", ".properties", ".asc", ".crt", ".cert", ".ipynb", ".tfvars"}
_SECRET_TEXT_BYTES = 10**6


def is_secret(root: Path, name: str) -> bool:
    """Whether ``name`` below ``root`` looks like credentials: by its name, or a text by how it begins."""
    if has_secret_name(Path(name).name) or re.fullmatch(_CREDENTIAL_PATH, name.lower(), re.DOTALL):
        return True
    file = root / re.sub(_SAVED, "", name.lower())
    if file.suffix not in _READ_FOR_SECRETS:
        return False
    try:
        text = read_followed(root / name, _SECRET_TEXT_BYTES).replace(b"\0", b"")  # so that UTF-16 reads as ASCII
    except OSError:  # closed to us, so it is not copied either
        return False
    return any(found["value"] is None or _is_random(found["value"]) for found in _secrets_in(text))


def _secrets_in(text: bytes) -> Iterator[re.Match[bytes]]:
    pattern, lower = re.compile(_SECRET_TEXT), text.lower()
    for mark in _MARKS:
        start = lower.find(mark)
        while start >= 0:
            if found := pattern.match(text, start):
                yield found
            start = lower.find(mark, start + 1)


def _is_random(value: bytes) -> bool:
    """Whether a value has a long run of letters and digits that no word or path has; or is a UUID."""
    if value.startswith((b"/", b"~", b".")):
        return False
    if re.match(rb"(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value):
        return True
    for run in re.findall(rb"[A-Za-z0-9]{12,}", value):
        words = re.findall(rb"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", run)
        is_mixed = not run.isdigit() and not run.isalpha()
        if len(set(run)) > 5 and (is_mixed or 3 * len(words) >= len(run)):
            return True
    return False


def has_secret_name(name: str) -> bool:
    """Whether a file of this name, without its folders, looks like credentials. The name may hold line breaks."""
    return re.fullmatch(_SECRET_NAME, re.sub(_SAVED, "", name.lower()), re.DOTALL) is not None
