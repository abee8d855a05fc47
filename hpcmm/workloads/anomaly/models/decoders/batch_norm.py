"""Batch normalisation that stays exact in a network of 16-bit numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Float32BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics are computed and kept in float32, whatever the network's number format.

    ``module.bfloat16()``, which DeepSpeed calls, would turn the running statistics into bfloat16 too. Its 8 bits of
    mantissa cannot hold a running mean that moves by less than 1/256 of itself, so the statistics would freeze, and
    ``num_batches_tracked`` would stop at 256. The statistics are of the rank's own images; they are averaged over ranks
    before the model is scored or saved.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32BatchNorm2d:
        """As ``nn.Module``, but buffers follow to another device only, not to another number format."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        normalised = nn.functional.batch_norm(
            inputs.float(),
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training,
            self.momentum or 0.1,
            self.eps,
        )
        return normalised.to(inputs.dtype)
