"""Loss on held-out cells: the same cells each time, with the same tokens hidden."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from geneformer_pretrain.data.batch import Batch, build_batches
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError


class Validation:
    """The first packs of the held-out corpus, shared among the ranks.

    Parameters
    ----------
    data
        The held-out corpus, in the shape of the training data.
    world
        This process among all.
    """

    def __init__(self, data: DataSource, world: World) -> None:
        self.data, self.world, self.corpus = data, world, data.corpus

    def num_packs(self, stream: PackStream) -> int:
        """Packs that a validation reads."""
        return min(self.data.config.data.validation_packs, stream.plan(0).num_packs)

    def check(self) -> None:
        """Build this rank's packs once: a bad token should not wait for the last step.

        Raises
        ------
        ConfigError
            A cell that cannot be used.
        """
        stream, builder = self.data.stream(), self.data.builder()
        packs = range(self.world.rank, self.num_packs(stream), self.world.size)
        try:
            for _ in build_batches(builder, stream, packs):
                pass
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"data.validation_path: {error}") from error

    def mean_loss(self, forward: Callable[[Iterator[Batch]], tuple[Tensor, Tensor]]) -> float | None:
        """Mean cross-entropy over the masked tokens; None if there are none. Collective.

        A rank that has fewer packs than others runs its last one again and leaves it out of the sum, since sharding
        engines need all ranks in each forward.

        Parameters
        ----------
        forward
            Sum of cross-entropies and number of masked tokens of the next micro-batch.
        """
        stream, builder = self.data.stream(), self.data.builder()
        packs = self.num_packs(stream)
        totals = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for first in range(0, packs, self.world.size):
            mine = first + self.world.rank
            loss_sum, masked = forward(build_batches(builder, stream, [min(mine, packs - 1)]))
            if mine < packs:
                totals += torch.stack([loss_sum.double(), masked.double()])
        dist.all_reduce(totals)
        loss_sum, masked = totals.tolist()
        return loss_sum / masked if masked else None
