"""What the toolkit asks of a workload on a rank: the half with torch, which :func:`hpcmm.train.loop.train` drives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcmm.errors import HpcmmError

if TYPE_CHECKING:
    import deepspeed

    from hpcmm.train.structure import Structure


class Training(ABC):
    """Model, data and loss of a workload, as one rank sees them. A new workload subclasses it.

    The toolkit makes one object a rank, after the rank has joined the process group, by
    :meth:`hpcmm.config.workload.Workload.training`, and then calls, on every rank in the same order::

        __init__(config, device)               once
        parameter_groups()                     once; the toolkit builds the DeepSpeed engine around `model`
        merge_rank_state(), evaluate()         before the first step, unless the run goes on from a checkpoint
        batches()                              once
        next(batches), loss()                  train.gradient_accumulation_steps times a step; the toolkit does the rest
        merge_rank_state()                     before each checkpoint
        finish()                               after the last step of this job, also if it was asked to stop early
        merge_rank_state(), evaluate()         after the last step of the run

    All ranks make each of these calls together, so each may be collective (``torch.distributed``): then every rank has
    to take part, also one whose own data needs nothing.

    What makes a run repeat bit for bit is the workload's share: weights that depend on ``train.seed`` alone, a
    :meth:`batches` that depends on its arguments and ``train.seed`` alone (:mod:`hpcmm.train.sampling` helps), and
    data loaders with a ``generator`` of their own. The toolkit saves the global random states of Python, NumPy and
    PyTorch with every checkpoint.
    """

    model: nn.Module
    """On the rank's device, float32; ``requires_grad`` says which parameters train. DeepSpeed converts it to
    ``parallel.precision``. The names of its parameters are the keys of the run's checkpoints, so they must stay."""

    @abstractmethod
    def __init__(self, config: Any, device: torch.device) -> None:
        """Set :attr:`model`, and find the data. ``config``: an object of the workload's schema. ``device``: the rank's.

        If ``train.init_from`` names a run, :func:`hpcmm.train.checkpoint.start_from` gives the model its weights.
        Raises HpcmmError for values and files that cannot be used.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trained parameters as ``torch.optim`` takes them: ``params``, and what differs from the defaults
        of ``train``, such as ``lr``. Each trained parameter belongs to one group. The schedule multiplies each rate.

        Default: all trained parameters in one group.
        """
        return [{"params": trained_parameters(self.model)}]

    @abstractmethod
    def batches(self, rank: int, world_size: int, first: int) -> Iterator[Any]:
        """This rank's micro-batches of ``train.micro_batch_size`` examples, without end.

        ``rank`` of ``world_size``: of the mesh's data axis. Ranks that share a model have the same number.
        ``first``: the number of the first micro-batch, counted from 0 over the whole run; above 0 in a run that goes
        on from a checkpoint. The ranks' micro-batches of one number should be disjoint. The toolkit only hands a batch
        to :meth:`loss`, so its type is the workload's own.
        """

    @abstractmethod
    def loss(self, engine: deepspeed.DeepSpeedEngine, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, a scalar with gradients, and its named parts for the metrics, scalars without.

        ``engine`` wraps ``model`` and is called in its place: ``engine(inputs)``. The toolkit averages gradients over
        the ranks, and over the micro-batches of a step, or over what :meth:`tokens` counts. Every rank must run through
        the model equally often: under ZeRO stage 3 each run is a collective.
        """

    def tokens(self, batch: Any) -> int | None:  # noqa: ARG002
        """Of how many terms, such as labelled tokens, :meth:`loss` is the sum for this micro-batch.

        The toolkit then divides by the terms of the whole global batch, so that each counts the same, whichever rank
        and micro-batch it is in. None, the default: the loss is a mean, and each micro-batch counts the same.
        """
        return None

    def lengths(self, batch: Any) -> Sequence[int] | None:  # noqa: ARG002
        """Tokens of each example of this micro-batch, whatever they stand for: for tokens and operations a second.

        None, the default: it has no tokens.
        """
        return None

    def structure(self) -> Structure | None:
        """How :attr:`model` is a chain that a mesh can cut along other axes than ``data``; None: it is none.

        ``Workload.axes`` says the same before the job.
        """
        return None

    def checkpoint_activations(self) -> None:
        """Let the model's layers compute their activations again in the backward pass, before the engine is built.

        Default: those of the structure's network. Raises HpcmmError if there is none.
        """
        structure = self.structure()
        if structure is None:
            raise HpcmmError(
                f"parallel.activation_checkpointing is true, but {type(self).__name__} does not say which layers it is "
                "for: leave it out."
            )
        structure.checkpoint_activations()

    def evaluate(
        self,
        engine: deepspeed.DeepSpeedEngine,  # noqa: ARG002 -- for those who override it
        rank: int,  # noqa: ARG002
        world_size: int,  # noqa: ARG002
        *,
        final: bool,  # noqa: ARG002
    ) -> dict[str, float]:
        """Scores of the model on held-out data, by name; rank 0's count, the others may return an empty mapping.

        Asked for with ``train.evaluate``: before training, and after it with ``final``, when scores that take long may
        be added. Leaves ``engine`` in training mode. The scores become ``NAME_before`` and ``NAME_after`` of
        ``metrics/evaluation.json``. Default: no scores.
        """
        return {}

    def merge_rank_state(self) -> None:
        """Make the same on all ranks what each keeps for itself in ``model``'s buffers; only rank 0's are saved.

        All ranks call it before a checkpoint and before scores. Default: :func:`merge_batch_statistics`.
        """
        merge_batch_statistics(self.model)

    def finish(self, rank: int, world_size: int) -> None:  # noqa: B027 -- a hook, not a duty
        """The last call of training: what is to be logged at its end. Default: nothing."""


def gathered(value: Any, rank: int, world_size: int) -> list[Any]:
    """What each rank of the data axis has found, in their order, on all ranks, which call this together.

    ``rank`` of ``world_size``: as :meth:`Training.evaluate` gets them. ``value`` must be something that pickle takes.
    Of ranks that share a model, which have the same number, the first counts.
    """
    found: list[tuple[int, Any]] = [(0, None)] * dist.get_world_size()
    dist.all_gather_object(found, (rank, value))
    by_rank = dict(reversed(found))
    return [by_rank[each] for each in range(world_size)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those with ``requires_grad``, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_batch_statistics(model: nn.Module) -> None:
    """Put each batch normalisation's running statistics of all ranks together, the same on each afterwards.

    A rank's statistics are of its own samples, and only rank 0's reach the checkpoint. Of R ranks with mean m_r and
    variance v_r the merged mean is mean(m_r), and the variance mean(v_r) + mean(m_r^2) - mean(m_r)^2, that of their
    samples together. A collective: every rank has to call it. Free for models without trained batch normalisation.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.weight.requires_grad
    ]
    if not norms or dist.get_world_size() == 1:
        return
    # A pipeline's later stages have none of them, but take part in the sum.
    here = not any(norm.weight.is_meta for norm in norms)
    device = next(each.device for each in model.parameters() if not each.is_meta)
    sizes = [norm.num_features for norm in norms]
    sums = torch.zeros(2 * sum(sizes) + 1, device=device)
    if here:
        means = torch.cat([_statistic(norm.running_mean) for norm in norms])
        variances = torch.cat([_statistic(norm.running_var) for norm in norms])
        sums = torch.cat([means, variances + means.square(), sums.new_ones(1)])
    dist.all_reduce(sums)
    if not here:
        return
    moments = (sums[:-1] / sums[-1]).view(2, -1)
    new_means = torch.split(moments[0], sizes)
    new_variances = torch.split(moments[1] - moments[0].square(), sizes)
    for norm, mean, variance in zip(norms, new_means, new_variances, strict=True):
        _statistic(norm.running_mean).copy_(mean)
        _statistic(norm.running_var).copy_(variance)


def _statistic(buffer: torch.Tensor | None) -> torch.Tensor:
    assert buffer is not None  # track_running_stats says so
    return buffer
