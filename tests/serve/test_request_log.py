"""The log of requests: private, one line a request, bounded, and shared by several servers."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpcmm.errors import HpcmmError
from hpcmm.serve.service import RequestLog


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_only_the_owner_can_read_it(tmp_path):
    path = tmp_path / "serving" / "requests.jsonl"
    RequestLog(path).write(file="a.png")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert lines(path)[0]["file"] == "a.png"
    assert lines(path)[0]["time"].endswith("Z")


def test_a_hostile_name_stays_within_its_line(tmp_path):
    path = tmp_path / "requests.jsonl"
    name = 'a\n{"file": "forged"}\r\x1b[2J\u2028"\\' + "x" * 5000
    RequestLog(path).write(file=name, question="\ud800")
    assert len(path.read_text().splitlines()) == 1
    assert lines(path)[0]["file"] == name[:400]
    assert "\x1b" not in path.read_text()


def test_it_does_not_grow_without_end(tmp_path):
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path, limit_bytes=2000)
    for number in range(200):
        log.write(number=number)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["requests.jsonl", "requests.jsonl.1"]
    assert all(file.stat().st_size < 2100 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    last = lines(path) or lines(path.with_name("requests.jsonl.1"))
    assert last[-1]["number"] == 199


def test_two_servers_at_once_lose_no_line_but_old_ones(tmp_path):
    path = tmp_path / "requests.jsonl"
    logs = [RequestLog(path, limit_bytes=1_000_000) for _ in range(4)]

    def write(number):
        logs[number % 4].write(number=number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(400)))
    assert sorted(line["number"] for line in lines(path)) == list(range(400))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HpcmmError, match="cannot be written"):
        RequestLog(tmp_path / "file" / "requests.jsonl")


def test_a_link_to_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "requests.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HpcmmError, match="cannot be written"):
        RequestLog(tmp_path / "requests.jsonl")


def test_a_disk_that_fills_up_takes_nobody_s_answer(tmp_path, capsys):
    path = tmp_path / "serving" / "requests.jsonl"
    log = RequestLog(path)
    path.unlink()
    path.parent.rmdir()
    log.write(number=1)
    log.write(number=2)
    assert capsys.readouterr().err.count("cannot be written") == 1
