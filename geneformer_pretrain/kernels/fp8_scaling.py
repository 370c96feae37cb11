"""Delayed scaling: each step's FP8 scales come from the largest magnitudes of the steps before.

The definitions are those of Transformer Engine's `DelayedScaling` with its defaults (but for infinite maxima), and so
is the state, so that a run may change between its layers and PyTorch's: a history of 1,024 maxima a tensor, newest
last, of which the largest is scaled to the largest FP8 number. Maxima are recorded by the kernels that cast, in a
step's micro-batches, and turn into scales once a step, over all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LINEARS = ("attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense")
"""The linear layers of an encoder layer, by the names of Transformer Engine's modules."""
QKV, PROJECTION, EXPAND, CONTRACT = range(len(LINEARS))

FORWARD_TENSORS, BACKWARD_TENSORS = 3, 2
"""Tensors of a linear layer that Transformer Engine has scales for: input, weight, output; gradients of output and
input. The last of each are never cast, here as there."""

LARGEST_FORWARD, LARGEST_GRADIENT = 448.0, 57344.0
"""Largest numbers of E4M3 and E5M2."""

HISTORY = 1024
"""Steps whose maxima count."""


def forward_slots(number: int) -> tuple[int, int]:
    """Return the places of a linear layer's input and weight among a layer's forward scales."""
    return FORWARD_TENSORS * number, FORWARD_TENSORS * number + 1


def backward_slot(number: int) -> int:
    """Return the place of a linear layer's output gradient among a layer's backward scales."""
    return BACKWARD_TENSORS * number


@dataclass(frozen=True)
class LayerScales:
    """Scales of one encoder layer, and the maxima of the step that is running.

    Forward and backward are apart, because a compiled backward may not change what the forward changed.

    Attributes
    ----------
    forward_scales, forward_maxima
        FP32 [12]: input, weight and output of each linear layer.
    backward_scales, backward_maxima
        FP32 [8]: gradients of output and input of each.
    """

    forward_scales: Tensor
    forward_maxima: Tensor
    backward_scales: Tensor
    backward_maxima: Tensor


class _Direction:
    """Scales, [L, 4 * n], histories, [L * 4, 1024, n], and maxima, [4 * n] for each layer, of one direction.

    Maxima are no views of one tensor: autograd would take a change of one for a change of all.
    """

    def __init__(self, num_layers: int, num_tensors: int, largest: float, device: torch.device) -> None:
        slots = len(LINEARS) * num_tensors
        self.largest = largest
        self.scales = torch.ones(num_layers, slots, device=device)
        self.maxima = [torch.zeros(slots, device=device) for _ in range(num_layers)]
        self.history = torch.zeros(num_layers * len(LINEARS), HISTORY, num_tensors, device=device)

    def update(self, maxima: Tensor) -> None:
        """Turn the maxima of a step, over all ranks, into scales; a tensor without any keeps its scale.

        Infinite maxima, of a step whose update is skipped, are not entered: they would hold the scale for 1,024 steps.
        """
        self.history[:, 0] = maxima.where(maxima.isfinite(), 0.0).view(len(self.history), -1)
        largest = self.history.amax(1).view_as(self.scales)
        scales = self.largest / largest
        usable = (largest > 0) & largest.isfinite() & scales.isfinite()
        self.scales.copy_(torch.where(usable, scales, self.scales))
        self.history.copy_(self.history.roll(-1, 1))
        self.history[:, 0] = 0
        torch._foreach_zero_(self.maxima)


class DelayedScaling:
    """Scales of all layers on one device."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.forward = _Direction(num_layers, FORWARD_TENSORS, LARGEST_FORWARD, device)
        self.backward = _Direction(num_layers, BACKWARD_TENSORS, LARGEST_GRADIENT, device)

    def layer(self, number: int) -> LayerScales:
        """Return the scales of one layer; later updates show in them."""
        forward, backward = self.forward, self.backward
        return LayerScales(
            forward.scales[number], forward.maxima[number], backward.scales[number], backward.maxima[number]
        )

    def update(self) -> None:
        """Turn the maxima of a step into scales; collective, and without a wait of the host."""
        maxima = torch.cat(self.forward.maxima + self.backward.maxima)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
        forward, backward = maxima.split([self.forward.scales.numel(), self.backward.scales.numel()])
        self.forward.update(forward)
        self.backward.update(backward)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield scales, [3] or [2], and histories, [1024, 3] or [1024, 2], by Transformer Engine's names."""
        for name, direction in (("scaling_fwd", self.forward), ("scaling_bwd", self.backward)):
            scales = direction.scales.view(len(direction.history), -1)
            for place, (scale, history) in enumerate(zip(scales, direction.history, strict=True)):
                layer, linear = divmod(place, len(LINEARS))
                prefix = f"bert.encoder.layer.{layer}.{LINEARS[linear]}.{name}"
                yield f"{prefix}.scale", scale
                yield f"{prefix}.amax_history", history
