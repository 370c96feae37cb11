"""Loss on held-out cells: the same cells each time, with the same tokens masked."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from geneformer_pretrain.data.batch import Batch, build_batches
from geneformer_pretrain.data.dataset import DataSource
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

    Attributes
    ----------
    num_packs
        Packs that a validation reads.
    """

    def __init__(self, data: DataSource, world: World) -> None:
        self.data, self.world, self.corpus = data, world, data.corpus
        self.stream, self.builder = data.stream(), data.builder()
        self.num_packs = min(data.config.data.validation_packs, self.stream.plan(0).num_packs)

    def check(self) -> None:
        """Build this rank's packs once: a bad token should not wait for the last step.

        Raises
        ------
        ConfigError
            A cell that cannot be used.
        """
        packs = range(self.world.rank, self.num_packs, self.world.size)
        try:
            for _ in build_batches(self.builder, self.stream, packs):
                pass
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"data.validation_path: {error}") from error

    def evaluate(self, forward: Callable[[Iterator[Batch]], tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Compute the mean cross-entropy over the masked tokens, and its exponential; collective.

        A rank that has fewer packs than others runs its last one again and leaves it out of the sum, since sharding
        engines need all ranks in each forward.

        Parameters
        ----------
        forward
            Returns the sum of cross-entropies and the number of masked tokens of the next micro-batch.

        Returns
        -------
        dict
            `validation_loss` and `validation_perplexity`; empty if no token is masked.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for first in range(0, self.num_packs, self.world.size):
            mine = first + self.world.rank
            batches = build_batches(self.builder, self.stream, [min(mine, self.num_packs - 1)])
            loss_sum, masked = forward(batches)
            if mine < self.num_packs:
                totals += torch.stack([loss_sum.double(), masked.double()])
        dist.all_reduce(totals)
        loss_sum, masked = totals.tolist()
        if not masked:
            return {}
        loss = loss_sum / masked
        return {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
