"""A run's checkpoints: the ranks save and load them together, and anybody reads the trained weights out of one."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from hpcmm.errors import HpcmmError
from hpcmm.files import other_writer, read_text
from hpcmm.runs.ownership import real_and_trusted
from hpcmm.runs.run_dir import RunDir, checkpoint_name, newest_checkpoint, note_newest_checkpoint, steps_of_checkpoint
from hpcmm.train.weights import add_carried, keep_carried, mark_carried, read_weights, write_weights
from hpcmm.worker.environment import RankEnvironment

if TYPE_CHECKING:
    from hpcmm.train.engine import Engine
Model = TypeVar("Model", bound=nn.Module)


def random_state() -> dict[str, Any]:
    """Python's, NumPy's, PyTorch's and each GPU's, in types that ``torch.load(weights_only=True)`` accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where :func:`random_state` was called."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


log = logging.getLogger("hpcmm.train")

_NOT_READ = "{}, and reading a checkpoint runs code from it: take it over (chown, chmod go-w) if you trust it."
_MANIFEST = "manifest.json"
_NONE_LEFT = -1


class Checkpoints:
    """A run's checkpoints, as one rank sees them. All ranks call each method together."""

    def __init__(self, run: RunDir, rank_env: RankEnvironment, keep: int) -> None:
        """``keep``: how many of the newest are left when one more has been saved."""
        self._run = run
        self._folder = run.checkpoints
        self._rank_env = rank_env
        self._keep = keep

    def keep_carried(self, model: nn.Module) -> None:
        """Keep what ``model`` has of another run and does not train, for that is in no other file of this run.

        Call it before the engine is built. Raises HpcmmError if there is no room.
        """
        with self._said_clearly(self._folder / ".none", 0):
            keep_carried(model, self._folder, writes=self._rank_env.rank == 0)

    def save(self, engine: Engine, steps_done: int, state: dict[str, Any]) -> None:
        """Save what training needs to go on. The frozen encoders, which come from their own files, are left out.

        Raises HpcmmError if there is no room; the checkpoints before stay as they are.
        """
        partial = self._folder / f".{checkpoint_name(steps_done)}.part"
        with self._said_clearly(partial, steps_done):
            if self._rank_env.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            dist.barrier()
            torch.save(random_state(), self._random_state_file(partial))
            weights = engine.weights()
            if self._rank_env.rank == 0:
                write_weights(partial, weights)
                add_carried(self._folder, partial)
            engine.deepspeed.save_checkpoint(
                str(self._folder),
                tag=partial.name,
                client_state={"steps_done": steps_done, **state},
                save_latest=False,
                exclude_frozen_parameters=True,
            )  # ends with a barrier, so all parts are there
            if self._rank_env.rank == 0:
                self._publish(partial, steps_done)

    def load_newest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole, and return what was given to ``save``, with ``steps_done``.

        None if there is none. One that any rank finds damaged is put aside, with a warning that says what is wrong.
        """
        candidates = iter(self._newest_first() if self._rank_env.rank == 0 else ())
        while True:
            steps_done = _same_on_all(next(candidates, _NONE_LEFT), engine.device)
            if steps_done == _NONE_LEFT:
                return None
            folder = self._folder / checkpoint_name(steps_done)
            damage = self._damage(folder)
            if damage is not None:
                log.warning("checkpoint %s is damaged (%s): going on from the one before", folder, damage)
            if not _any_rank(damage is not None, engine.device):
                return self._load(engine, folder)
            if self._rank_env.rank == 0:
                shutil.rmtree(self._folder / f"damaged_{folder.name}", ignore_errors=True)
                folder.rename(self._folder / f"damaged_{folder.name}")

    def _load(self, engine: Engine, folder: Path) -> dict[str, Any]:
        state = engine.load(folder)
        restore_random_state(torch.load(self._random_state_file(folder), weights_only=True))
        return state

    def _publish(self, partial: Path, steps_done: int) -> None:
        sizes = {path.name: path.stat().st_size for path in partial.iterdir() if path.is_file()}
        (partial / _MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        final = self._folder / checkpoint_name(steps_done)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        note_newest_checkpoint(self._run, final.name)
        for old in self._newest_first()[self._keep :]:
            shutil.rmtree(self._folder / checkpoint_name(old), ignore_errors=True)

    def _newest_first(self) -> list[int]:
        steps = (steps_of_checkpoint(entry.name) for entry in self._folder.iterdir() if entry.is_dir())
        return sorted((each for each in steps if each is not None), reverse=True)

    def _random_state_file(self, folder: Path) -> Path:
        return folder / f"random_rank_{self._rank_env.rank:04d}.pt"

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files; the ranks share them out."""
        try:
            sizes: dict[str, int] = json.loads(read_text(folder / _MANIFEST, within=self._run.root))
        except (OSError, ValueError) as error:
            return f"{_MANIFEST}: {error}"
        for name, size in sorted(sizes.items())[self._rank_env.rank :: self._rank_env.world_size]:
            try:
                damage = _damage_of_file(folder / name, size)
            except OSError as error:
                damage = error.strerror
            if damage is not None:
                return f"{name}: {damage}"
        return None

    @contextlib.contextmanager
    def _said_clearly(self, partial: Path, steps_done: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_about_writing(error):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            free_mb = shutil.disk_usage(self._folder).free / 1e6
            raise HpcmmError(
                f"Rank {self._rank_env.rank} could not save the checkpoint after step {steps_done} in {self._folder} "
                f"({free_mb:.0f} MB are free there): make room, then submit the run's submission.sh again. Earlier "
                "checkpoints are whole, and training goes on from the last of them."
            ) from error


def _damage_of_file(path: Path, size: int) -> str | None:
    """Compares the size, and each record of PyTorch's zip container with its own CRC-32."""
    found = path.stat().st_size
    if found != size:
        return f"{found} bytes instead of {size}"
    if path.suffix != ".pt":
        return None
    try:
        with zipfile.ZipFile(path) as container:
            broken = container.testzip()
    except zipfile.BadZipFile as error:
        return str(error)
    return f"wrong checksum of {broken}" if broken else None


def _is_about_writing(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, SafetensorError):  # it tells an error of writing in words alone
        return "os error" in str(error) or "I/O error" in str(error)
    return "PytorchStreamWriter" in str(error) or "inline_container" in str(error)


def _same_on_all(number: int, device: torch.device) -> int:
    """Rank 0's number. Its view of the shared folder counts, for the others' may be older."""
    value = torch.tensor(number, dtype=torch.int64, device=device)
    dist.broadcast(value, src=0)
    return int(value)


def _any_rank(claim: bool, device: torch.device) -> bool:
    value = torch.tensor(int(claim), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def read_trained(run: RunDir) -> dict[str, Tensor]:
    """The trained parameters and the buffers of ``checkpoints/latest``, float32, on the CPU.

    Raises HpcmmError if there is no checkpoint, it cannot be read, or another user could have written it.
    """
    root, reason = real_and_trusted(run.root)
    if reason:
        raise HpcmmError(_NOT_READ.format(reason))
    run = RunDir(root)  # it stays the folder that was asked about
    try:
        tag = _latest(run)
        folders = (run.root, run.checkpoints, run.checkpoints / tag)
        _refuse_if_others_write(*folders, *sorted((run.checkpoints / tag).iterdir()))
        weights = read_weights(run.checkpoints / tag)
    except OSError as error:  # closed to this user, or just being removed
        raise HpcmmError(f"The checkpoint of {run.root} cannot be read: {error.strerror}: {error.filename}.") from error
    return weights if weights is not None else _of_deepspeed_files(run, tag)


def _of_deepspeed_files(run: RunDir, tag: str) -> dict[str, Tensor]:
    """What the pickles of a checkpoint hold that an older version saved."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: PLC0415 - takes seconds

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it reports on each of its files
            state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
                str(run.checkpoints), tag, exclude_frozen_parameters=True
            )
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise HpcmmError(f"The checkpoint {run.checkpoints / tag} cannot be loaded: {reason}") from error
    return state


def start_from(model: nn.Module, folder: str) -> None:
    """Give ``model`` what the run in ``folder`` trained, and what that run had from another. All else stays as it is.

    Of that, what this run does not train goes into its checkpoints as well.
    Raises HpcmmError if that run has no checkpoint, or trained something that ``model`` lacks.
    """
    run = RunDir(Path(folder))
    state = read_trained(run)
    own = model.state_dict()
    wrong = sorted(name for name, value in state.items() if name not in own or own[name].shape != value.shape)
    if wrong:
        raise HpcmmError(
            f"train.init_from={folder}: that run's {wrong[0]} does not fit this model: choose the same parts and "
            "sizes of the model."
        )
    model.load_state_dict(state, strict=False)
    mark_carried(value for name, value in model.named_parameters(remove_duplicate=False) if name in state)


def _latest(run: RunDir) -> str:
    try:
        tag = newest_checkpoint(run)
    except OSError as error:
        raise HpcmmError(
            f"{run.checkpoints} holds no finished checkpoint ({error.strerror}): has the run trained to its end?"
        ) from error
    if not tag or Path(tag).name != tag or not (run.checkpoints / tag).is_dir():
        raise HpcmmError(f"{run.newest_checkpoint} names {tag!r}, but there is no such checkpoint beside it.")
    return tag


def _refuse_if_others_write(*paths: Path) -> None:
    """A checkpoint is a pickle: whoever can write it can run code as its reader."""
    if (path := other_writer(*paths)) is not None:
        raise HpcmmError(_NOT_READ.format(f"{path} can be written by another user"))


def load_model(run: RunDir, build: Callable[[], Model]) -> Model:
    """What ``build`` makes, with the weights of ``checkpoints/latest``, in evaluation mode.

    A checkpoint holds what was trained alone: all other weights stay as ``build`` made them. It is called once the
    checkpoint has been read. Raises HpcmmError if there is no checkpoint, it does not fit the model, or another user
    could have written it.
    """
    state = read_trained(run)
    model = build()
    try:
        unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).split("\n")[:2][-1].strip()  # the first of several lines names the model's class alone
        raise HpcmmError(f"The checkpoint of {run.root} cannot be loaded: {reason}") from error
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lacking = sorted(trained & set(unknown.missing_keys))
    if lacking or unknown.unexpected_keys:
        names = lacking or unknown.unexpected_keys
        raise HpcmmError(f"The checkpoint of {run.root} is of another model: {names[0]} does not fit.")
    return model.eval()
