"""A run's config.yaml that is damaged, or no file at all, is one sentence, at once."""

import os
import shutil

import pytest

from hpcmm.config.compose import compose_run
from hpcmm.config.config_file import dump, load
from hpcmm.config.untyped_config import MAX_BYTES, VERSION, read_untyped_config
from hpcmm.errors import HpcmmError

NESTED = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x]\n" + "".join(f"{outer}: &{outer} [{','.join([f'*{inner}'] * 9)}]\n" for inner, outer in NESTED)


@pytest.fixture
def frozen(tmp_path):
    """A whole one, below a folder that keeps the code."""
    path = tmp_path / "config.yaml"
    dump(compose_run(["cluster=local"]), path)
    path.chmod(0o644)
    (tmp_path / "code" / "hpcmm" / "hpcmm").mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it holds no keys"),
        (b"42\n", "it holds no keys"),
        (b"- a\n", "it holds no keys"),
        (b"name: \xff\n", "codec can't decode"),
        (b"name: x\nname: y\n", "line 2: found duplicate key name"),
        (b"name: [\n", "line 2: .*expected"),
        (b"[" * 5000, "than expected"),
        (BOMB.encode(), "it has YAML aliases"),
        (b"a: 1" + b":59" * 50_000, "a number of too many digits"),
        (b"a: [" + b"[]," * 150_000 + b"]", "than expected"),
        (b"a: !!float ''", "a value that cannot be understood"),
        (b"#" * (MAX_BYTES + 1), "it is larger than"),
    ],
    ids=["empty", "number", "list", "bytes", "twice", "cut", "deep", "aliases", "base 60", "many", "tag", "huge"],
)
@pytest.mark.timeout(60)
def test_a_damaged_file_is_told_as_such_and_not_as_another_version_s(frozen, content, said):
    frozen.write_bytes(content)
    with pytest.raises(HpcmmError, match=rf"config.yaml is damaged \(.*{said}.*\): put back what") as refused:
        load(frozen)
    assert "PYTHONPATH" not in str(refused.value)
    assert read_untyped_config(frozen) in ({}, {"name": "y"})


def test_of_an_older_configuration_s_variables_only_those_that_find_the_cluster_are_kept(frozen):
    text = frozen.read_text()
    assert "submit_environment: {}" in text
    given = "submit_environment: {SLURM_CONF: /site/slurm.conf, PATH: /x, LD_PRELOAD: /x.so}"
    frozen.write_text(text.replace("submit_environment: {}", given))
    assert load(frozen).cluster.submit_environment == {"SLURM_CONF": "/site/slurm.conf"}


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(frozen):
    frozen.unlink()
    os.mkfifo(frozen)
    with pytest.raises(HpcmmError, match=r"cannot be read \(it is not a file\): is this a run directory"):
        load(frozen)
    assert read_untyped_config(frozen) == {}
    frozen.unlink()
    frozen.symlink_to(frozen.name)
    with pytest.raises(HpcmmError, match="symbolic links"):
        load(frozen)
    frozen.unlink()
    with pytest.raises(HpcmmError, match="No such file"):
        load(frozen)


def test_a_terminal_obeys_no_key_and_a_long_one_is_cut(frozen):
    for key in ('"\\e[2J"', "k" * 900):
        text = frozen.read_text()
        frozen.write_text(f"{text}\n? {key}\n: 1\n")
        with pytest.raises(HpcmmError, match="not a configuration of this version") as refused:
            load(frozen)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 1000
        frozen.write_text(text)


def test_a_whole_one_is_read(frozen):
    shutil.rmtree(frozen.parent / "code")
    assert load(frozen) == compose_run(["cluster=local"])


def test_the_first_line_says_the_version(frozen):
    assert frozen.read_text().splitlines()[0] == f"version: {VERSION}"
    assert "version" not in read_untyped_config(frozen)


def test_a_file_without_a_version_is_of_the_first_and_both_are_read(frozen):
    today = load(frozen), read_untyped_config(frozen)
    text = frozen.read_text().split("\n", 1)[1]
    frozen.write_text(text)
    assert (load(frozen), read_untyped_config(frozen)) == today
    frozen.write_text(f"version: 1\n{text}")
    assert (load(frozen), read_untyped_config(frozen)) == today


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (str(VERSION + 1), f"it is of version {VERSION + 1}, and this hpcmm reads up to version {VERSION}"),
        ("'\\e[2J'", "which is no version"),
        ("true", "its version is True, which is no version"),
        ("0", "its version is 0, which is no version"),
        ("[1, 2]", r"its version is \[1, 2\], which is no version"),
    ],
)
def test_a_later_version_is_refused_and_told_with_the_code_that_reads_it(frozen, version, said):
    frozen.write_text(f"version: {version}\n" + frozen.read_text().split("\n", 1)[1])
    with pytest.raises(
        HpcmmError, match=rf"not a configuration of this version of hpcmm: .*{said}.*PYTHONPATH"
    ) as refused:
        load(frozen)
    assert str(refused.value).isprintable()
    assert read_untyped_config(frozen)["cluster"]["executor"] == "local"


def test_a_run_with_an_optimizer_of_pytorch_can_be_read_where_others_write(frozen):
    frozen.chmod(0o666)
    assert load(frozen).optimizer["_target_"] == "torch.optim.AdamW"
    frozen.write_text(frozen.read_text(encoding="utf-8").replace("torch.optim.AdamW", "mine.Fast"), encoding="utf-8")
    with pytest.raises(HpcmmError, match=r"names mine\.Fast, which is not hpcmm's, and .* can be written by another"):
        load(frozen)
