"""GPU or CPU, and no complaint of a driver if there is no GPU to drive."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch

from hpcmm.config.compose import compose_run
from hpcmm.errors import HpcmmError
from hpcmm.worker import distributed
from hpcmm.worker.environment import RankEnvironment

COMPLAINT = "CUDA initialization: The NVIDIA driver on your system is too old"


def without_a_working_gpu() -> bool:
    warnings.warn(COMPLAINT, UserWarning, stacklevel=2)
    return False


@pytest.mark.parametrize(("devices", "complaints"), [(["nvidiactl"], 0), (["nvidiactl", "nvidia0"], 1)])
def test_only_where_there_is_a_gpu_its_driver_is_complained_of(
    devices: list[str], complaints: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in devices:
        (tmp_path / name).touch()
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", without_a_working_gpu)
    monkeypatch.setenv("DS_ACCELERATOR", "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert distributed.select_accelerator() == "cpu"
    assert len(caught) == complaints
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_rank_0_says_that_another_process_took_its_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with socket.create_server(("", 0)) as squatter:
        port = squatter.getsockname()[1]
        rank_env = RankEnvironment(0, 0, 2, 1, "42", "node1", "localhost", port)
        with pytest.raises(HpcmmError, match=rf"at localhost:{port} \(EADDRINUSE\).* another process on node1 took it"):
            distributed._rendezvous(rank_env, compose_run(["cluster=slurm"]), "gloo")
