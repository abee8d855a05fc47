"""A folder of config groups that others can write says what the user's jobs run, so it is asked who can."""

import os
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.space import groups_help, space_of
from hpcmm.errors import HpcmmError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def conf():
    """A folder of config groups that other users can enter."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        (Path(made) / "cluster").mkdir(mode=0o755)
        (Path(made) / "cluster" / "lab.yaml").write_text("defaults: [local]\nsetup: ['true']\n")
        yield Path(made)


def compose(conf: Path, cluster: str = "lab") -> None:
    compose_run(["task=script", "task.path=x.py", f"cluster={cluster}", f"launch.config_dir={conf}"])


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o666])
@pytest.mark.parametrize("name", ["", "cluster", "cluster/lab.yaml"])
def test_a_chosen_file_that_everybody_could_change_is_refused(conf, name, mode):
    (conf / name).chmod(mode | 0o111)
    said = rf"^launch\.config_dir is {conf}, but {conf / name} can be written by everybody, .* \(chmod o-w\)"
    with pytest.raises(HpcmmError, match=said):
        compose(conf)
    compose(conf, "local")  # nothing of the folder is chosen


def test_who_else_could_change_a_chosen_file_is_said_in_one_line(conf, capsys):
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's files")
    compose(conf)
    assert capsys.readouterr().err == ""
    os.chown(conf / "cluster", 0, another_user.UID)
    (conf / "cluster").chmod(0o775)
    (conf / "cluster" / "lab.yaml").chmod(0o664)
    compose(conf)
    said = f"{conf / 'cluster'} can be written by its group, so others could change what this run does."
    assert capsys.readouterr().err == f"hpcmm: launch.config_dir is {conf}; {said}\n"


def test_a_colleagues_folder_is_used_and_named(conf, capsys):
    another_user.give(conf)
    compose(conf)
    assert f"{conf} belongs to user {another_user.UID}, so others could" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["setup: [\n", "a: b: c\n", "a: \x01\n", "a: !!python/name:os.system x\n"])
def test_the_file_that_is_damaged_is_the_one_that_is_named(conf, content):
    (conf / "cluster" / "a.yaml").write_bytes(b"\xff")
    (conf / "cluster" / "y.yaml").write_text(content)
    with pytest.raises(HpcmmError, match=rf"^{conf / 'cluster' / 'y.yaml'} cannot be read: "):
        compose(conf, "y")


def test_help_shows_no_control_characters_of_file_names(conf):
    (conf / "cluster" / "red\x1b[31m.yaml").write_text("")
    said = groups_help(space_of([f"launch.config_dir={conf}"]))
    assert "\x1b" not in said
    assert "red\\x1b[31m" in said
