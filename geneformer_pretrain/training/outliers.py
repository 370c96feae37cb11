"""Skips updates whose gradient norm lies far above its recent history, without the host ever waiting for the device."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

HISTORY = 100
"""Steps that the running mean is about, and steps without a skip after the option was switched on."""

MIN_DEVIATION = 0.1
"""Smallest standard deviation of the log norm that counts: a norm that hardly ever changes is no reason to skip."""

MAX_IN_A_ROW = 5
"""Updates skipped in a row at most; the next one is made whatever its norm, with clipped gradients."""


class NormHistory:
    """Running mean and variance of the logarithm of the gradient norm.

    With x the log of a norm and n the norms before it, w = 1 / min(n + 1, 100):

        limit    = mean + k max(sqrt(variance), 0.1)
        x'       = x, for n >= 100 cut to at most `limit`, and to as much below the mean
        mean     = mean + w (x' - mean)
        variance = (1 - w) (variance + w (x' - mean)^2), with the mean before

    An update is skipped if n >= 100 and x > limit, unless the last 5 were. The norm of a skipped step enters as
    `limit`, so that the history follows a norm that stays high, within some tens of steps. Norms that are zero or not
    finite do not enter.

    Parameters
    ----------
    factor
        k, in standard deviations.
    device
        Of the gradients.
    saved
        Earlier content of `state`, to go on from.

    Attributes
    ----------
    state
        FP64 [4] on the device, the same on all ranks: norms seen, mean, variance, and how many updates in a row, the
        last one included, were skipped.
    """

    def __init__(self, factor: float, device: torch.device, saved: Sequence[float] | None = None) -> None:
        self.factor = factor
        self.state = torch.tensor(saved or (0.0, 0.0, 0.0, 0.0), dtype=torch.float64, device=device)

    def is_outlier(self, norm: Tensor) -> Tensor:
        """Decide whether the update of this step is skipped, and add its norm to the history; collective.

        Parameters
        ----------
        norm
            FP32 scalar on the device. Ranks' own may differ by rounding, so rank 0 decides for all.

        Returns
        -------
        Bool scalar on the device.
        """
        seen, mean, variance, in_a_row = self.state.unbind()
        usable, known = torch.isfinite(norm) & (norm > 0), seen >= HISTORY
        log_norm = norm.double().log()
        reach = self.factor * variance.sqrt().clamp(min=MIN_DEVIATION)
        skip = usable & known & (log_norm > mean + reach) & (in_a_row < MAX_IN_A_ROW)
        difference = log_norm - mean
        difference = torch.where(known, torch.minimum(torch.maximum(difference, -reach), reach), difference)
        weight = 1.0 / (seen + 1.0).clamp(max=HISTORY)
        after = [
            seen + 1.0,
            mean + weight * difference,
            (1.0 - weight) * (variance + weight * difference.square()),
            torch.where(skip, in_a_row + 1.0, 0.0),
        ]
        decided = torch.cat([torch.where(usable, torch.stack(after), self.state), skip.double()[None]])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(decided, src=0)
        self.state = decided[:4]
        return decided[4] > 0
