"""Loss on held-out cells: the same cells each time, with the same tokens masked."""

import math

import torch
import torch.distributed as dist

from geneformer_pretrain.data.batch import build_batches
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training.step import Beat, TrainStep, next_batch


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

    @torch.no_grad()
    def evaluate(self, step: TrainStep, beat: Beat) -> dict[str, float]:
        """Compute the mean cross-entropy over the masked tokens without dropout, and its exponential; collective.

        A rank that has fewer packs than others runs its last one again and leaves it out of the sum, since sharding
        engines need all ranks in each forward.

        Parameters
        ----------
        step
            Of the model to evaluate, which trains on afterwards.
        beat
            Called with the name of the phase before each micro-batch.

        Returns
        -------
        dict
            `validation_loss` and `validation_perplexity`; empty if no token is masked.
        """
        engine = step.engine
        engine.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for first in range(0, self.num_packs, self.world.size):
            mine = first + self.world.rank
            batches = build_batches(self.builder, self.stream, [min(mine, self.num_packs - 1)])
            beat("validating")
            loss_sum, masked = step.forward(next_batch(batches, "data.validation_path"))
            if mine < self.num_packs:
                totals += torch.stack([loss_sum.double(), masked.double()])
        engine.model.train()
        engine.reshard()
        dist.all_reduce(totals)
        loss_sum, masked = totals.tolist()
        if not masked:
            return {}
        loss = loss_sum / masked
        return {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
