"""What of a project is copied, what is linked, what is left out: by git, without git, and by ``launch.include``."""

from __future__ import annotations

import ast
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import another_user
import pytest

from hpcmm.config.class_source import syntax_tree
from hpcmm.errors import HpcmmError
from hpcmm.files import is_secret
from hpcmm.launch.project_files import (
    files_of,
    marked_root,
    passed_over,
    project_root,
    revision,
)

NO_RUNS = Path("/nowhere/runs")
TOKEN = "hf_" + "a1B2" * 9
SERVICE_ACCOUNT = '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----"}'


def git(folder: Path, *arguments: str) -> None:
    settings = ("user.name=a", "user.email=a@b", "protocol.file.allow=always")
    given = [word for setting in settings for word in ("-c", setting)]
    subprocess.run(["git", *given, "-C", str(folder), *arguments], check=True, capture_output=True)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a script, and a home elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "project"
    write(
        folder, {"train.py": "", "lib/helper.py": "", ".gitignore": "assets/\n_version.py\n*.so\n*.bin\nlocal.yaml\n"}
    )
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    git(folder, "init", "-q")
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-qm", "all")


def sorted_out(project: Path, *include: str, script: str = "train.py", here: Path | None = None) -> dict[str, set[str]]:
    """The names of what is copied, linked and secret."""
    files = files_of(project, [project / script], include, here or project, NO_RUNS)
    return {
        kind: {str(path.relative_to(project)) for path in getattr(files, kind)}
        for kind in ("copied", "linked", "secret")
    }


# What git ignores.


def test_ignored_code_is_copied_and_all_else_that_is_ignored_is_linked(project: Path):
    write(
        project, {"lib/_version.py": "", "lib/fast.so": "", "assets/vocab.txt": "", "lib/w.bin": "", "local.yaml": ""}
    )
    found = sorted_out(project)
    assert {"lib/_version.py", "lib/fast.so"} <= found["copied"]
    assert found["linked"] == {"assets", "lib/w.bin", "local.yaml"}


def test_ignored_code_that_is_named_like_a_secret_is_linked_and_so_it_is_not_copied(project: Path):
    write(project, {".gitignore": "secrets.py\n", "lib/secrets.py": "KEY = 1"})
    assert sorted_out(project)["linked"] == {"lib/secrets.py"}


def test_caches_environments_and_hidden_folders_are_neither_copied_nor_linked(project: Path):
    ignored = {
        "lib/__pycache__/a.pyc": "", "venv/pyvenv.cfg": "", "venv/lib/site.py": "", ".cache/x.txt": "",
        "node_modules/a/b.json": "", "x.egg-info/PKG-INFO": "", "conda/conda-meta/history": "", ".idea/x.xml": "",
    }  # fmt: skip
    write(project, ignored | {".gitignore": "__pycache__\n/venv\n.cache\nnode_modules\n*.egg-info\nconda\n.idea\n"})
    write(project, {"other-venv/pyvenv.cfg": "", "other-venv/.gitignore": "*", "other-venv/lib/x.py": ""})
    write(project, {"plain-venv/pyvenv.cfg": "", "plain-venv/lib/x.py": ""})
    found = sorted_out(project)
    assert found["linked"] == set()
    assert found["copied"] == {"train.py", "lib/helper.py", ".gitignore"}


def test_an_ignored_script_is_copied_with_the_code_beside_it(project: Path):
    write(
        project, {".gitignore": "scratch/\n", "scratch/train.py": "", "scratch/near.py": "", "scratch/data/a.txt": ""}
    )
    found = sorted_out(project, script="scratch/train.py")
    assert {"scratch/train.py", "scratch/near.py"} <= found["copied"]
    assert found["linked"] == {"scratch/data"}


# launch.include


def test_included_files_are_copied_though_git_ignores_them_and_what_lies_beside_is_linked(project: Path):
    write(project, {"assets/vocab.txt": "", "assets/deep/a.yaml": "", "assets/deep/b.yaml": "", "assets/big.pt": ""})
    found = sorted_out(project, "assets/vocab.txt", "assets/*/a.yaml")
    assert {"assets/vocab.txt", "assets/deep/a.yaml"} <= found["copied"]
    assert found["linked"] == {"assets/big.pt", "assets/deep/b.yaml"}


def test_an_included_folder_is_copied_whole(project: Path):
    write(project, {"assets/vocab.txt": "", "assets/deep/a.yaml": ""})
    found = sorted_out(project, "assets")
    assert {"assets/vocab.txt", "assets/deep/a.yaml"} <= found["copied"]
    assert found["linked"] == set()


def test_an_included_path_counts_from_the_working_directory_and_then_from_the_project(project: Path):
    write(project, {"lib/w.bin": "", "assets/a.txt": ""})
    assert {"lib/w.bin", "assets/a.txt"} <= sorted_out(project, "w.bin", "assets/a.txt", here=project / "lib")["copied"]
    assert "lib/w.bin" in sorted_out(project, str(project / "lib" / "w.bin"))["copied"]


@pytest.mark.parametrize("entry", ["none.txt", "no*ne", "../", "/etc/hostname", "**/none", "a" * 5000])
def test_an_included_path_that_is_not_there_or_not_of_the_project_is_refused(project: Path, entry: str):
    with pytest.raises(HpcmmError, match=r"launch\.include names .*(is not there in [^ ]+|where it lies)\.$"):
        sorted_out(project, entry)


def test_credentials_come_in_by_their_very_path_alone(project: Path):
    write(project, {".gitignore": ".env\nkeys/\n", ".env": "A=1", "keys/id_rsa": "", "keys/a.txt": ""})
    assert sorted_out(project, "*", "keys", "**/id_*")["secret"] == {".env", "keys/id_rsa"}
    assert {".env", "keys/id_rsa"} <= sorted_out(project, ".env", "keys/id_rsa")["copied"]


def test_credentials_that_a_pattern_names_are_not_linked_either(project: Path):
    write(project, {".gitignore": "*.json\nassets/\n", "robot.json": SERVICE_ACCOUNT, "a.json": "{}"})
    write(project, {"assets/robot.json": SERVICE_ACCOUNT, "assets/in/a.bin": ""})
    found = sorted_out(project, "*", "assets/*.json")
    assert found["secret"] == {"robot.json", "assets/robot.json"}
    assert found["linked"] == set()
    assert {"a.json", "assets/in/a.bin"} <= found["copied"]
    found = sorted_out(project, "assets/*.json")
    assert found["secret"] == {"assets/robot.json"}
    assert found["linked"] == {"robot.json", "a.json", "assets/in"}


def test_an_included_link_that_leads_nowhere_or_what_is_no_file_is_refused(project: Path):
    write(project, {"big/a.txt": ""})
    (project / "big" / "dang").symlink_to("none")
    os.mkfifo(project / "big" / "pipe")
    with pytest.raises(
        HpcmmError, match=r"^launch\.include names big/dang, but .*dang is a link to none, which is not"
    ):
        sorted_out(project, "big/dang")
    with pytest.raises(HpcmmError, match=r"^launch\.include names big/pipe, but .*pipe is no file or folder: leave"):
        sorted_out(project, "big/pipe")
    assert "big/a.txt" in sorted_out(project, "big/*")["copied"]


def test_an_included_link_to_a_folder_is_copied_as_a_link(project: Path, tmp_path: Path):
    write(project, {".gitignore": "set\n"})
    (tmp_path / "elsewhere").mkdir()
    (project / "set").symlink_to(tmp_path / "elsewhere")
    assert "set" in sorted_out(project, "set")["copied"]


# Folders that programs fill.


def test_a_folder_that_git_keeps_by_a_placeholder_alone_is_linked(project: Path):
    write(
        project, {"data/raw/.gitkeep": "", "data/out/.gitignore": "*\n!.gitignore\n", "logs/.keep": "", "log/a.py": ""}
    )
    write(
        project, {"log/.gitkeep": "", ".cache/.gitkeep": "", "models/README.md": "", "docs/README.md": "", "docs/a": ""}
    )
    (project / "empty" / "in").mkdir(parents=True)
    commit(project)
    write(project, {"data/out/a.bin": "", "data/out/b/c.bin": ""})
    found = sorted_out(project)
    assert found["linked"] == {"data", "logs", "models", "empty"}
    assert found["copied"] == {
        "train.py", "lib/helper.py", ".gitignore", "log/a.py", "log/.gitkeep", ".cache/.gitkeep",
        "docs/README.md", "docs/a",
    }  # fmt: skip


def test_a_folder_to_fill_stays_one_once_a_program_has_filled_it(project: Path, tmp_path: Path):
    write(project, {"data/raw/.gitkeep": "", "conf/README.md": ""})
    commit(project)
    write(project, {"data/raw/new.txt": "", "data/raw/deep/a.npy": "", "data/b.bin": "", "conf/a.yaml": ""})
    (tmp_path / "elsewhere").mkdir()
    (project / "data" / "raw" / "imagenet").symlink_to(tmp_path / "elsewhere")
    (project / "data" / "raw" / "dangling").symlink_to(tmp_path / "none")
    found = sorted_out(project)
    assert found["linked"] == {"data"}
    assert found["copied"] == {"train.py", "lib/helper.py", ".gitignore", "conf/README.md", "conf/a.yaml"}


def test_a_folder_to_fill_with_code_or_credentials_or_what_is_asked_for_is_copied_in_part(project: Path):
    write(
        project, {"a/.gitkeep": "", "b/.gitkeep": "", "c/.gitkeep": "", "c/x.bin": "", "c/y.bin": "", "b/.env": "A=1"}
    )
    write(project, {"a/_version.py": "", "b/z.bin": "", ".gitignore": "*.bin\n_version.py\n"})
    found = sorted_out(project, "c/x.bin")
    assert {"a/_version.py", "b/.gitkeep", "c/x.bin"} <= found["copied"]
    assert found["linked"] == {"b/z.bin", "c/y.bin"}
    assert found["secret"] == {"b/.env"}


def test_a_script_below_runs_root_is_copied_and_nothing_else_there_is(project: Path):
    write(project, {"runs/old/code/again.py": "", "runs/old/near.py": ""})
    files = files_of(project, [project / "runs/old/code/again.py"], [], project, project / "runs")
    names = {str(path.relative_to(project)) for path in files.copied | files.linked}
    assert {name for name in names if name.startswith("runs")} == {"runs/old/code/again.py"}


# Credentials.


@pytest.mark.parametrize(
    "name",
    [
        ".env", ".env.local", ".env-prod", ".env_prod", "prod.env", ".envrc", ".env.bak", ".env~", "conf/.ENV",
        "my-sa.json", "service_account.json", "service-account-prod.json", "client_secret_1.json", "credentials",
        "aws-credentials.json", "secrets.yaml", "secret.txt", "token", "hf_token", ".token", "wandb.token",
        "hf_token.txt", "token.json", ".huggingface/token", "wandb/settings", ".netrc", "_netrc", "kubeconfig",
        "dev.kubeconfig", ".kube/config", ".aws/credentials", ".aws/config", ".docker/config.json", "a.kdbx", "a.jks",
        "a.ppk", "a.pem", "a.key", "id_rsa", "id_ed25519_sk", "id_rsa.old", "id_rsa_cluster", ".pypirc", ".npmrc",
        "api_key.txt", "wandb_api_key", "kaggle.json", "line\nbreak.env",
    ],
)  # fmt: skip
def test_credentials_are_known_by_their_names(tmp_path: Path, name: str):
    assert is_secret(tmp_path, name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.py", "token_utils.py", "tokens.txt", "environment.yml", "key_points.py", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "credentials.py", "secrets.py",
        "id_mapping.py", "id_rsa.pub", "env.py", "environments/prod.yaml", "keys.py", "monkey.py", "passwords.py",
        "sa.py", "visa.json", "cls_token.txt", "keyboard.txt", "config.json", "settings.yaml", "wandb/config.yaml",
    ],
)  # fmt: skip
def test_ordinary_files_are_not_taken_for_credentials(tmp_path: Path, name: str):
    write(tmp_path, {name: "name: value\nvocab_token = 7\n"})
    assert not is_secret(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("anything.json", SERVICE_ACCOUNT), ("cluster_login", "-----BEGIN OPENSSH PRIVATE KEY-----\nx"),
        ("notes.txt", f"use {TOKEN}"), ("vars", "export WANDB_API_KEY=0123456789abcdef0123"),
        ("site.yaml", "id: AKIAABCDEFGHIJKLMNOP"), ("x.cfg", "AWS_SECRET_ACCESS_KEY = 'abcdefghijklmnop0123'"),
    ],
)  # fmt: skip
def test_small_texts_that_hold_keys_are_credentials(tmp_path: Path, name: str, text: str):
    write(tmp_path, {name: text})
    assert is_secret(tmp_path, name)


HEX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"
AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
UUID = "123e4567-e89b-12d3-a456-426614174000"
CELL = '{"cells": [{"cell_type": "code", "source": ["%s\\n"]}]}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s3.ini", f"[default]\naws_secret_access_key = {AWS}\n"), ("s3.cfg", f"aws_secret_access_key={AWS}"),
        ("wandb.yaml", f"wandb_key: {HEX}"), ("a.yaml", f"x:\n  - api_key: '{HEX}'"), ("a.yml", f"Token :   {HEX}"),
        ("a.toml", f'dbPassword = "{HEX[:12]}"'), ("a.json", f'{{"apiKey":"{UUID}"}}'), ("a.txt", f"API-KEY={HEX}"),
        ("a.json", f'{{"name": "WANDB_API_KEY", "value": "{HEX}"}}'), ("a.yaml", f"- name: TOKEN\n  value: {HEX}"),
        ("a.conf", f"client_secret = {HEX}"), ("a.md", f"export KEY={HEX}"), ("a.txt", f"key_prod: {HEX}"),
        ("a.yaml", f"api_keys:\n  - {HEX}"), ("a.txt", f"Authorization: Bearer {HEX}"),
        ("a.xml", f"<token>{HEX}</token>"),
        ("a.tfvars", f'secret = "{HEX}"'), ("a.txt", f"AccountKey={HEX}=="), ("a.yaml", f"api_key: >-\n  {HEX}"),
        ("a.ipynb", CELL % f"client = OpenAI('sk-proj-{HEX}')"), ("a.ipynb", CELL % f"wandb.login(key=\\\"{HEX}\\\")"),
        ("a.ipynb", CELL % f"os.environ[\\\"HF_KEY\\\"] = b\\\"{HEX}\\\""), ("a.ipynb", CELL % f"%env API_KEY={HEX}"),
        ("a.json", '{"pad": "' + "x" * 70_000 + '", ' + SERVICE_ACCOUNT[1:]),
    ],
)  # fmt: skip
def test_a_long_random_value_that_is_given_to_a_key_is_a_credential(tmp_path: Path, name: str, text: str):
    write(tmp_path, {name: text})
    assert is_secret(tmp_path, name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("text", [SERVICE_ACCOUNT, f"wandb_key: {HEX}", f"use {TOKEN}"])
def test_credentials_are_found_in_any_encoding(tmp_path: Path, encoding: str, text: str):
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert is_secret(tmp_path, "a.json")


@pytest.mark.parametrize(
    "text",
    [
        "pad_token: <pad>", "token_dropout: 0.1234567890123", "tokenizer: meta-llama/Llama-3.1-8B-Instruct",
        "TOKENIZER=meta-llama/Llama-3.1-8B-Instruct", f"tokenizer_revision: {HEX}", f"sha256: {HEX}{HEX[:24]}",
        "key_file: /scratch/project_465000123/a1b2c3d4e5f6g7h8/key", "ssh_key: /home/me/a1b2c3d4e5f6g7h8/id",
        "api_key: ${oc.env:KEY}", "api_key: ${oc.env:WANDB_API_KEY_0123456789abcdef}", "api_key: null", "api_key:",
        "password: ''", "api_key: YOUR_API_KEY_GOES_HERE", "api_key: xxxxxxxxxxxxxxxxxxxxxxxxxxxx", "secret: <secret>",
        "token: $TOKEN", "token: {{ token0123456789abcdef }}", "eos_token: <|end_of_text|>", "bos_token_id: 128000",
        "max_tokens: 1000000000000", "tokens: 15000000000000", "image_key: observation.images.top_camera_2",
        "sort_key: validation_accuracy_top1", "key: openai/clip-vit-base-patch32", "key: ./a1b2c3d4e5f6g7h8",
        f"public_key: {HEX}", f"cache_key: {HEX}", f"md5: {HEX[:32]}", f"commit: {HEX}",
        "monkey: chimpanzeesandgorillas",
        "keyboardlayout0123456789: x", "feature_key: observationImagesTopCamera", "key: fs.readFileSync",
        "token_type_ids: [0, 0, 1]", "cls_token: [unused12]", "key_dim: 123456789012",
        "secret_name: my-deployment-secret",
        '{"key": "layer.12.attention.self.query.weight"}', '{"vocab": {"key": 2536, "token": 1245, "secret": 2107}}',
        '{"merges": ["key =", "tok en", "sec ret"], "unk_token": "<unk>", "mask_token": "<extra_id_99>"}',
        '{"image/png": "' + "iVBORw0KGgoAAAANSUhEUgAAkey" * 40 + '="}', '<div class="sk-estimator-doc-link fitted">',
    ],
)  # fmt: skip
def test_settings_that_speak_of_keys_and_tokens_are_copied(tmp_path: Path, text: str):
    for name in ("a.yaml", "tokenizer.json", "a.ipynb", ".hidden", "a.md"):
        write(tmp_path, {name: text})
        assert not is_secret(tmp_path, name)


def test_code_that_holds_a_key_is_code(tmp_path: Path):
    write(tmp_path, {"train.py": f'TOKEN = "{TOKEN}"'})
    assert not is_secret(tmp_path, "train.py")


def test_new_credentials_are_left_out_and_committed_ones_are_copied(project: Path):
    write(project, {"old.pem": "1"})
    commit(project)
    write(project, {"new.pem": "1", "nested/data.json": SERVICE_ACCOUNT})
    found = sorted_out(project)
    assert found["secret"] == {"new.pem", "nested/data.json"}
    assert "old.pem" in found["copied"]


@pytest.mark.parametrize("hidden_by", [None, "--skip-worktree", "--assume-unchanged"])
def test_a_tracked_env_file_that_was_changed_is_left_out_also_when_git_is_told_not_to_look(
    project: Path, hidden_by: str | None
):
    write(project, {".env": "A=template"})
    commit(project)
    assert ".env" in sorted_out(project)["copied"]
    write(project, {".env": "A=secret"})
    if hidden_by:
        git(project, "update-index", hidden_by, ".env")
    found = sorted_out(project)
    assert found["secret"] == {".env"}
    assert ".env" not in found["copied"]


def test_the_patch_holds_changes_but_no_credentials(project: Path):
    write(project, {".env": "A=old", "notes.txt": "none"})
    commit(project)
    git(project, "config", "diff.noprefix", "true")
    write(project, {".env": "A=leaked", "train.py": "changed\n", "new-sa.json": "leaked", "notes.txt": TOKEN})
    git(project, "add", "-N", "new-sa.json")
    patch = revision(project).changes
    assert b"+changed" in patch
    assert b"+++ b/train.py" in patch
    assert b"leaked" not in patch
    assert TOKEN.encode() not in patch


def test_without_changes_but_of_credentials_the_patch_is_empty(project: Path):
    write(project, {".env": "A=old"})
    commit(project)
    write(project, {".env": "A=leaked"})
    assert revision(project).changes == b""


# Repositories of all kinds.


def test_submodules_and_new_repositories_within_are_copied_as_the_project_is(project: Path, tmp_path: Path):
    inner = tmp_path / "inner"
    write(inner, {"inner.py": "", ".gitignore": "data/\n"})
    commit(inner)
    git(project, "submodule", "--quiet", "add", str(inner), "sub")
    write(project, {"sub/new.py": "", "sub/.env": "A=1", "sub/data/a.txt": ""})
    write(project, {"clone/a.py": ""})
    git(project / "clone", "init", "-q")
    found = sorted_out(project)
    assert {"sub/inner.py", "sub/new.py", "clone/a.py"} <= found["copied"]
    assert found["linked"] == {"sub/data"}
    assert found["secret"] == {"sub/.env"}


def test_a_work_tree_whose_git_is_a_file_is_a_project(project: Path, tmp_path: Path):
    git(project, "worktree", "add", "-q", str(tmp_path / "tree"))
    assert project_root(tmp_path / "tree" / "lib") == tmp_path / "tree"
    assert "lib/helper.py" in sorted_out(tmp_path / "tree")["copied"]


def test_of_a_sparse_checkout_that_is_copied_which_is_there(project: Path):
    git(project, "sparse-checkout", "set", "--no-cone", "/train.py")
    assert not (project / "lib").exists()
    assert sorted_out(project)["copied"] == {"train.py"}


def test_a_repository_without_a_commit_is_a_project(tmp_path: Path):
    write(tmp_path, {"train.py": "", ".env": "A=1"})
    git(tmp_path, "init", "-q")
    assert sorted_out(tmp_path) == {"copied": {"train.py"}, "linked": set(), "secret": {".env"}}


def test_names_that_are_hard_to_write_are_copied(project: Path):
    for name in (b"with space.py", b"line\nbreak.py", b'quo"te.py', b"\xff\xfe.py", b"-n.py"):
        (project / os.fsdecode(name)).write_text("")
    copied = {os.fsencode(name) for name in sorted_out(project)["copied"]}
    assert {b"with space.py", b"line\nbreak.py", b'quo"te.py', b"\xff\xfe.py", b"-n.py"} <= copied


def test_pipes_and_sockets_are_left_alone(project: Path):
    write(project, {".gitignore": "pipe*\n"})
    for name in ("pipe", "new", "lib/pipe.py", "assets.json"):
        os.mkfifo(project / name)
    assert sorted_out(project)["copied"] == {"train.py", "lib/helper.py", ".gitignore"}


def test_nothing_is_copied_through_a_folder_that_has_become_a_link(project: Path, tmp_path: Path):
    write(tmp_path, {"outside/helper.py": "live"})
    (project / "lib" / "helper.py").unlink()
    (project / "lib").rmdir()
    (project / "lib").symlink_to(tmp_path / "outside")
    assert sorted_out(project)["copied"] == {"train.py", ".gitignore", "lib"}


# Without git.


def test_without_git_code_and_small_settings_are_copied_and_data_is_linked(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(
        tmp_path / "work",
        {
            "train.py": "", "config.yaml": "", "data.csv": "", "package/__init__.py": "", "package/words.txt": "",
            "space/inner/module.py": "", "images/a.png": "", ".hidden/a.py": "", ".env": "A=1",
            "a.json": SERVICE_ACCOUNT, "venv/pyvenv.cfg": "", "venv/a.py": "",
        },
    )  # fmt: skip
    assert sorted_out(tmp_path / "work") == {
        "copied": {"train.py", "config.yaml", "package/__init__.py", "package/words.txt", "space/inner/module.py"},
        "linked": {"data.csv", "images"},
        "secret": {".env", "a.json"},
    }


def test_without_git_folders_of_settings_are_copied_and_those_of_data_are_linked(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {
        "conf/config.yaml": "", "conf/model/big.yaml": "", "conf/.hidden": "", "conf/key.pem": "", "mylib/a.py": "",
        "mylib/conf/c.yaml": "", "mylib/prompts/a/b.txt": "", "templates/a.j2": "", "templates/a.txt": "",
    }  # fmt: skip
    data = {"logs/a.txt": "", "results/a.json": "", "mixed/a.yaml": "", "mixed/b.bin": "", "mylib/data/a.npy": ""}
    many = {f"many/{each}.yaml": "" for each in range(501)}
    write(tmp_path / "work", {"train.py": ""} | settings | data | many)
    (tmp_path / "work" / "to_fill").mkdir()
    found = sorted_out(tmp_path / "work")
    assert found == {
        "copied": {"train.py"} | settings.keys() - {"conf/key.pem", "conf/.hidden"},
        "linked": {"logs", "results", "mixed", "mylib/data", "many", "to_fill"},
        "secret": {"conf/key.pem"},
    }


def test_without_git_a_python_project_is_known_by_its_files(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "work", {"pyproject.toml": "", "scripts/train.py": "", "src/mine/__init__.py": ""})
    assert marked_root(tmp_path / "work" / "scripts") == tmp_path / "work"
    assert {"src/mine/__init__.py", "pyproject.toml"} <= sorted_out(tmp_path / "work", script="scripts/train.py")[
        "copied"
    ]


# Folders of other users.


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that all users can write, as /tmp, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="hpcmm-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        (Path(made) / "shared").mkdir()
        (Path(made) / "shared").chmod(0o1777)
        yield Path(made) / "shared"


def root_of(folder: Path) -> Path | None:
    return project_root(folder) or marked_root(folder)


@pytest.mark.parametrize("marker", ["pyproject.toml", "setup.py", "setup.cfg", ".git", ".git/HEAD"])
def test_a_marker_that_another_user_could_have_planted_above_makes_no_project(shared: Path, marker: str):
    write(shared, {"mine/proj/train.py": "", marker: ""})
    assert root_of(shared / "mine" / "proj") is None
    assert passed_over(shared / "mine" / "proj") == shared
    write(shared, {"mine/pyproject.toml": ""})
    assert root_of(shared / "mine" / "proj") == shared / "mine"
    assert passed_over(shared / "mine") is None


def test_nor_does_one_above_the_folder_that_others_can_write(shared: Path):
    write(shared.parent, {"pyproject.toml": "", "shared/mine/train.py": ""})
    assert root_of(shared.parent) == shared.parent
    assert root_of(shared / "mine") is None


def test_nor_does_one_in_a_folder_of_another_user(shared: Path):
    shared.chmod(0o755)
    write(shared, {"pyproject.toml": "", "mine/train.py": ""})
    assert root_of(shared / "mine") == shared
    another_user.give(shared / "pyproject.toml")
    os.chown(shared, another_user.UID, another_user.UID)
    assert root_of(shared / "mine") is None
    another_user.give(shared / "mine")  # who could exchange the script as well
    assert root_of(shared / "mine") == shared


def test_a_group_s_project_is_one_if_the_script_is_the_group_s_or_the_marker_one_s_own(shared: Path):
    if os.geteuid() != 0:
        pytest.skip("a group of one's own has no other members")
    write(shared, {"pyproject.toml": "", "scripts/train.py": ""})
    os.chown(shared, 0, another_user.UID)
    shared.chmod(0o2775)
    assert root_of(shared / "scripts") == shared
    another_user.give(shared / "pyproject.toml")
    assert root_of(shared / "scripts") is None
    os.chown(shared / "scripts", 0, another_user.UID)
    (shared / "scripts").chmod(0o2775)
    assert root_of(shared / "scripts") == shared
    assert root_of(shared) == shared


def test_in_a_folder_for_all_only_one_s_own_files_are_read_or_copied(shared: Path):
    uses = 'import mine, theirs, pipe, endless, linked, package\nopen("theirs.yaml")'
    write(shared, {"train.py": uses, "mine.py": "import hidden", "hidden.py": "", "pyproject.toml": ""})
    foreign = {"theirs.py": "import other", "theirs.yaml": "", "package/__init__.py": "", "other.py": ""}
    write(shared, foreign)
    os.mkfifo(shared / "pipe.py")
    (shared / "endless.py").symlink_to("/dev/zero")
    (shared / "linked.py").symlink_to("mine.py")
    assert root_of(shared) is None
    assert passed_over(shared) == shared
    for name in (*foreign, "package", "pipe.py", "endless.py", "linked.py"):
        another_user.give(shared / name)
    files = files_of(shared, [shared / "train.py"], [], shared, NO_RUNS)
    assert {path.name for path in files.copied} == {"train.py", "mine.py", "hidden.py"}
    assert not files.linked
    left_out = {"theirs.py", "theirs.yaml", "package", "pipe.py", "endless.py", "linked.py"}
    assert {path.name for path in files.foreign} == left_out


def test_what_is_no_file_is_not_parsed(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.py")
    for path in (tmp_path / "pipe.py", Path("/dev/zero"), tmp_path, tmp_path / "none.py"):
        assert not [*ast.iter_child_nodes(syntax_tree(path))]


def test_of_a_home_only_the_script_and_what_it_uses_is_copied(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(
        tmp_path,
        {
            "train.py": 'import near, far.deep\nopen("conf.yaml")\nopen("big/set.bin")', "near.py": "import second",
            "second.py": "", "far/__init__.py": "", "far/deep.py": "", "conf.yaml": "", "big/set.bin": "",
            "letter.txt": "", "unrelated.py": "", "other/a.py": "", "pyproject.toml": "",
        },
    )  # fmt: skip
    (tmp_path / ".git").mkdir()
    assert project_root(tmp_path) is None
    assert marked_root(tmp_path) is None
    assert sorted_out(tmp_path) == {
        "copied": {"train.py", "near.py", "second.py", "far/__init__.py", "far/deep.py", "conf.yaml"},
        "linked": {"big"},
        "secret": set(),
    }


def test_without_git_a_project_of_many_files_is_not_walked_to_its_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hpcmm.launch.project_files._MOST_ENTRIES", 50)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "work", {"train.py": ""} | {f"many{each}/{n}.py": "" for each in range(10) for n in range(30)})
    found = sorted_out(tmp_path / "work")
    assert "train.py" in found["copied"]
    assert len(found["copied"]) < 100
    assert found["linked"]


def test_an_included_path_that_is_not_there_names_each_folder_once(project: Path):
    (project / "lib").mkdir(exist_ok=True)
    with pytest.raises(HpcmmError) as raised:
        sorted_out(project, "none.txt")
    assert str(raised.value).endswith(f"which is not there in {project}.")
    with pytest.raises(HpcmmError) as raised:
        sorted_out(project, "none.txt", here=project / "lib")
    assert str(raised.value).endswith(f"which is not there in {project / 'lib'} or {project}.")
