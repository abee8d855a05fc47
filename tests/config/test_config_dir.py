"""Folders of config groups beside hpcmm's own: where they are searched, and who else can write them.

What lies there says what the user's jobs run.
"""

import os
import tempfile
from pathlib import Path

import another_user
import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import load
from hpcmm.config.space import groups_help, space_of, with_config_dirs
from hpcmm.config.sweep import Point
from hpcmm.doctor.__main__ import main as doctor
from hpcmm.errors import HpcmmError
from hpcmm.launch.__main__ import main as launch
from hpcmm.launch.plan import plan
from hpcmm.launch.write import write

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


def cluster_file(folder: Path, name: str, nodes: int) -> Path:
    """A folder of config groups with one cluster, which is known again by its nodes."""
    file = folder / "cluster" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"name: {name}\nexecutor: slurm\nnodes: {nodes}\n")
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    """A folder of each kind, with a cluster of its own name, and ``mysite`` in all of them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    found = {name: tmp_path / name for name in ("option", "key", "variable", "second")}
    found["home"] = tmp_path / "xdg" / "hpcmm" / "conf"
    for number, (name, folder) in enumerate(found.items(), 1):
        cluster_file(cluster_file(folder, "mysite", number), name, number)
    monkeypatch.setenv("HPCMM_CONFIG_DIR", f"{found['variable']}::{found['second']}")
    return found


def nodes_of(*words: str) -> int:
    return compose_run(["task=script", "task.path=x.py", *with_config_dirs(words)]).cluster.nodes


def test_a_cluster_is_found_in_each_place(places):
    words = [f"launch.config_dir={places['key']}", f"--config-dir={places['option']}"]
    assert [nodes_of(f"cluster={name}", *words) for name in places] == [1, 2, 3, 4, 5]


def test_the_place_that_is_nearest_to_the_command_counts(places, monkeypatch):
    key = f"launch.config_dir={places['key']}"
    assert nodes_of("cluster=mysite", key, "--config-dir", str(places["option"])) == 1
    assert nodes_of("cluster=mysite", key) == 2
    assert nodes_of("cluster=mysite") == 3
    monkeypatch.setenv("HPCMM_CONFIG_DIR", f"/nowhere:{places['second']}")
    assert nodes_of("cluster=mysite") == 4
    monkeypatch.delenv("HPCMM_CONFIG_DIR")
    assert nodes_of("cluster=mysite") == 5


def test_a_home_without_xdg_config_home_is_searched(places, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster_file(tmp_path / ".config" / "hpcmm" / "conf", "of_the_home", 7)
    assert nodes_of("cluster=of_the_home") == 7


@pytest.mark.parametrize("name", ["with space", "it's", "back\\slash", "trailing\\", "a=b", "{curly}", "$HOME", "ü"])
def test_a_folder_of_the_option_may_have_any_name(tmp_path, name):
    cluster_file(tmp_path / name, "lab", 3)
    assert nodes_of("cluster=lab", "--config-dir", str(tmp_path / name)) == 3


def test_several_options_and_several_folders_in_one_are_searched(places):
    both = f"{places['option']}:{places['key']}"
    assert nodes_of("cluster=key", "--config-dir", both) == 2
    assert nodes_of("cluster=key", f"--config-dir={places['option']}", "--config-dir", str(places["key"])) == 2


def test_what_comes_after_two_dashes_is_a_scripts_own():
    words = ["cluster=local", "--", "train.py", "--config-dir", "theirs"]
    assert with_config_dirs(words) == words


@pytest.mark.parametrize("words", [["--config-dir"], ["--config-dir="], ["--config-dir", "--", "x"]])
def test_the_option_without_a_folder_is_refused(words):
    with pytest.raises(HpcmmError, match="--config-dir needs a folder"):
        with_config_dirs(words)


def test_a_name_that_is_nowhere_lists_all_places(places, monkeypatch, tmp_path):
    monkeypatch.setenv("HPCMM_CONFIG_DIR", f"{places['variable']}:{tmp_path / 'gone'}")
    with pytest.raises(HpcmmError, match=r"cluster=nosite is not an option .* choose one of a30, ") as caught:
        nodes_of("cluster=nosite", "--config-dir", str(places["option"]))
    searched = str(caught.value).partition("Searched: ")[2]
    assert "conf (hpcmm's own), " in searched
    assert f"{places['option']}, {places['variable']}, {tmp_path / 'gone'} (not there), {places['home']}." in searched


@pytest.mark.parametrize("place", ["variable", "home"])
def test_a_file_of_every_place_that_everybody_could_change_is_refused(conf, monkeypatch, place):
    folder = {"variable": conf, "home": conf / "hpcmm" / "conf"}[place]
    cluster_file(folder, "lab", 1)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(conf))
    if place == "variable":
        monkeypatch.setenv("HPCMM_CONFIG_DIR", str(conf))
    assert nodes_of("cluster=lab") == 1
    (folder / "cluster" / "lab.yaml").chmod(0o666)
    given = {"variable": "HPCMM_CONFIG_DIR has", "home": "Your configuration folder is"}[place]
    with pytest.raises(HpcmmError, match=rf"^{given} {folder}, but .*lab.yaml can be written by everybody"):
        nodes_of("cluster=lab")


def test_a_file_that_an_earlier_place_hides_is_not_asked_for(conf, monkeypatch):
    monkeypatch.setenv("HPCMM_CONFIG_DIR", f"{cluster_file(conf / 'a', 'lab', 3)}:{cluster_file(conf / 'b', 'lab', 4)}")
    (conf / "b" / "cluster" / "lab.yaml").chmod(0o666)
    assert nodes_of("cluster=lab") == 3


def test_a_name_of_hpcmms_own_is_refused_in_every_place(places):
    cluster_file(places["home"], "slurm", 1)
    with pytest.raises(HpcmmError, match=r"hpcmm has a cluster/slurm\.yaml of its own"):
        nodes_of("cluster=mysite")


def test_help_lists_the_clusters_of_every_place(places, capsys):
    assert launch(["--config-dir", str(places["option"]), "--help"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("  cluster="))
    assert {"local,", "mysite,", "option,", "variable"} <= set(line.split())
    assert f"{places['home']}" in shown
    with pytest.raises(SystemExit):
        doctor(["--help"])
    assert "mysite" in capsys.readouterr().out


def test_a_run_needs_none_of_the_places_any_more(places, tmp_path, monkeypatch):
    words = ["task=function", "task.target=os:getcwd", "cluster=home", f"runs_root={tmp_path}", "launch.snapshot=false"]
    planned = plan([Point((), compose_run(words))], words)
    write(planned)
    for folder in places.values():
        (folder / "cluster" / "home.yaml").unlink(missing_ok=True)
    monkeypatch.delenv("HPCMM_CONFIG_DIR")
    assert load(planned.run.config).cluster.nodes == 5
