"""Another user's module in a shared folder never stands for one of the user's own."""

import importlib
import os
import py_compile
import sys
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.config import class_source
from hpcmm.config.parts import import_class
from hpcmm.errors import HpcmmError
from hpcmm.launch.snapshot import _modules
from hpcmm.resources import keep_compiled_code_to_oneself, require_own_module

pytestmark = pytest.mark.timeout(60)
OWN = "class Mine:\n    pass\n"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch):
    """A folder in which others can make files; it is searched for modules."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        folder = Path(made)
        folder.chmod(0o1777)
        (folder / "my_own_module.py").write_text(OWN)
        monkeypatch.syspath_prepend(made)
        yield folder
        class_source._spec_on.cache_clear()
        for name in [name for name in sys.modules if name.startswith("my_own_module")]:
            del sys.modules[name]


def plant(path: Path, text: str = "raise SystemExit('code of another user')\n") -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    another_user.give(path if path.parent.stat().st_mode & 0o1000 else path.parent)
    importlib.invalidate_caches()


@pytest.mark.parametrize("mode", [0o1777, 0o1775, 0o3775, 0o777])
@pytest.mark.parametrize("name", ["my_own_module/__init__.py", "my_own_module.abi3.so"])
def test_a_package_that_another_user_puts_before_the_users_module_is_refused(shared, name, mode):
    plant(shared / name)
    shared.chmod(mode)
    said = rf"{shared / Path(name).parts[0]} belongs to user {another_user.UID}, so it is not imported as your code"
    with pytest.raises(HpcmmError, match=said):
        import_class("my_own_module.Mine")
    with pytest.raises(HpcmmError, match=said):
        list(_modules(["my_own_module:main"], [shared]))


def test_a_module_that_the_users_own_one_imports_is_not_another_users(shared):
    (shared / "my_own_module.py").write_text(f"import my_own_module_parts\n{OWN}")
    (shared / "my_own_module_parts.py").write_text("")
    plant(shared / "my_own_module_parts" / "__init__.py")
    with pytest.raises(HpcmmError, match=r"my_own_module_parts belongs to user"):
        import_class("my_own_module.Mine")


def test_a_compiled_copy_that_another_user_made_is_not_run(shared):
    source, cache = shared / "my_own_module.py", shared / "__pycache__"
    other = shared / "other.py"
    other.write_text("class Mine:\n    is_planted = True\n")
    cache.mkdir()
    planted = cache / Path(importlib.util.cache_from_source(str(source))).name
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(other), cfile=str(planted), invalidation_mode=mode)
    another_user.give(cache)
    importlib.invalidate_caches()
    assert not hasattr(import_class("my_own_module.Mine"), "is_planted")


def test_one_s_own_modules_and_a_colleagues_whole_folder_are_imported(shared):
    assert list(_modules(["my_own_module:main"], [shared])) == [shared / "my_own_module.py"]
    assert import_class("my_own_module.Mine").__name__ == "Mine"
    shared.chmod(0o755)
    another_user.give(shared)
    require_own_module("my_own_module", shared)


def test_a_group_that_could_exchange_the_users_own_module_is_trusted_with_it(shared):
    shared.chmod(0o2775)
    another_user.give(shared / "my_own_module.py")
    require_own_module("my_own_module", shared)
    assert import_class("my_own_module.Mine").__name__ == "Mine"


def test_the_package_is_what_python_would_import(shared):
    (shared / "my_own_module").mkdir()
    assert list(_modules(["my_own_module:main"], [shared])) == [shared / "my_own_module.py"]
    (shared / "my_own_module" / "__init__.py").write_text(OWN)
    assert list(_modules(["my_own_module:main"], [shared])) == [shared / "my_own_module" / "__init__.py"]


def hide_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As its owner can, who takes it away and puts it back all the time."""
    lstat = Path.lstat

    def flicker(path: Path):
        if path.name != name or not os.path.lexists(path):
            return lstat(path)
        path.rename(path.with_name(".hidden"))
        try:
            return lstat(path)
        finally:
            path.with_name(".hidden").rename(path)

    monkeypatch.setattr(Path, "lstat", flicker)


@pytest.mark.parametrize("way", ["open/hop", "open/hop/deep", "own/hop/deep"])
def test_a_link_that_another_user_can_lead_elsewhere_is_followed_to_no_module(shared, way):
    (shared / "own").symlink_to("open")
    (shared / "open").mkdir()
    (shared / "open").chmod(0o1777)
    (shared / "end").mkdir(mode=0o755)
    (shared / "end" / "deep").mkdir(mode=0o755)
    for folder in (shared / "end", shared / "end" / "deep"):
        (folder / "__init__.py").write_text(OWN)
    (shared / "my_own_module").symlink_to(way)
    (shared / "open" / "hop").symlink_to("../end")
    importlib.invalidate_caches()
    assert import_class("my_own_module.Mine").__name__ == "Mine"
    del sys.modules["my_own_module"]
    another_user.give(shared / "open" / "hop")
    with pytest.raises(HpcmmError, match="open/hop belongs to user"):
        import_class("my_own_module.Mine")


@pytest.mark.parametrize("name", ["my_own_module.abi3.so", "my_own_module_parts.py"])
def test_a_file_of_one_s_own_that_others_can_write_is_no_module_in_a_shared_folder(shared, name):
    """They may have made a hard link to it, and written what they like."""
    (shared / "my_own_module.py").write_text(f"import my_own_module_parts\n{OWN}")
    notes = shared / "notes.txt"
    notes.write_text("raise SystemExit('code of another user')\n")
    notes.chmod(0o664)
    (shared / name).hardlink_to(notes)
    importlib.invalidate_caches()
    with pytest.raises(
        HpcmmError, match=rf"{name} can be written by other users \(chmod go-w\), so it is not imported"
    ):
        import_class("my_own_module.Mine")


def test_in_a_container_s_namespace_a_package_of_nobody_that_is_known_may_be_anybody_s(shared, monkeypatch):
    monkeypatch.setattr("hpcmm.files._has_no_name_here", lambda uid: uid == another_user.UID)
    plant(shared / "my_own_module/__init__.py")
    with pytest.raises(HpcmmError, match="my_own_module belongs to user"):
        import_class("my_own_module.Mine")


def test_a_package_that_comes_and_goes_is_not_imported(shared, monkeypatch):
    plant(shared / "my_own_module/__init__.py")
    hide_while_it_is_looked_at(monkeypatch, "my_own_module")
    said = r"my_own_module comes and goes in a folder that others can write, so it is not imported as your code"
    with pytest.raises(HpcmmError, match=said):
        import_class("my_own_module.Mine")
    with pytest.raises(HpcmmError, match=said):
        list(_modules(["my_own_module:main"], [shared]))


def test_where_others_could_put_a_compiled_copy_at_once_none_is_read(shared):
    import_class("my_own_module.Mine")
    assert not (shared / "__pycache__").exists()
    assert sys.modules["my_own_module"].__spec__.loader.path == str(shared / "my_own_module.py")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files that all can write, as /tmp."""
    place = tmp_path / "tmp"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return place


def compiled_code(**environ: str) -> str:
    keep_compiled_code_to_oneself(environ)
    return environ["TORCHINDUCTOR_CACHE_DIR"]


def test_torch_s_compiled_code_lies_in_a_folder_of_one_s_own(place):
    own = place / f"hpcmm-{os.geteuid()}"
    assert [compiled_code(), compiled_code()] == [str(own / "torchinductor")] * 2
    assert own.stat().st_mode & 0o777 == 0o700
    assert compiled_code(TORCHINDUCTOR_CACHE_DIR="/mine") == "/mine"
    environ = {"TORCHINDUCTOR_CACHE_DIR": "/mine"}
    keep_compiled_code_to_oneself(environ)
    assert environ["QUACK_CACHE_DIR"] == str(own / "quack")


def test_what_a_launch_has_set_on_a_login_node_is_set_anew_on_a_node_whose_disk_is_another(place):
    environ: dict[str, str] = {}
    keep_compiled_code_to_oneself(environ)
    own = place / f"hpcmm-{os.geteuid()}"
    own.rmdir()
    own.mkdir()
    another_user.give(own)
    keep_compiled_code_to_oneself(environ)
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(place.parent / "home/.cache/hpcmm/torchinductor")
    environ["TORCHINDUCTOR_CACHE_DIR"] = "/mine"
    keep_compiled_code_to_oneself(environ)
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("kind", ["folder", "link", "file", "open to all", "exchangeable"])
def test_if_others_took_its_name_or_could_it_lies_in_the_home(place, kind):
    taken = place / f"hpcmm-{os.geteuid()}"
    (place / "theirs").mkdir()
    if kind == "link":
        taken.symlink_to(place / "theirs")
    elif kind == "file":
        taken.touch()
    else:
        taken.mkdir()
        taken.chmod(0o777 if kind == "open to all" else 0o700)
    if kind in {"folder", "link", "file"}:
        another_user.give(taken)
    if kind == "exchangeable":
        place.chmod(0o777)
    assert compiled_code() == str(place.parent / "home/.cache/hpcmm/torchinductor")


def test_who_imports_a_class_has_torch_look_there_alone(shared, place, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is forgotten afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    import_class("my_own_module.Mine")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place / f"hpcmm-{os.geteuid()}" / "torchinductor")
