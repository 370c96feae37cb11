"""Loss on held-out cells: the same cells each time, with the same tokens masked."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor

from geneformer_pretrain.data.batch import Batch, PackedBatch, build_batches
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.data.held_out import cell_groups, gene_frequencies, unigram_loss
from geneformer_pretrain.data.masking import IGNORED_LABEL
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.training.step import Beat, TrainStep, next_batch

ROWS = 1024
"""Rows of logits that are compared with their labels at a time: their FP32 copies take 100 MB in Geneformer V1."""


class Validation:
    """Packs of the held-out corpus, shared among the ranks.

    Which cells are read and which of their tokens are masked depends neither on the run's seed nor, with
    `data.validation_cells`, on the shape of the packs.

    Parameters
    ----------
    data
        The held-out cells, in the shape of the training data.
    world
        This process among all.

    Attributes
    ----------
    num_packs, num_cells
        Packs that a validation reads, and their cells.
    fingerprint
        Identifies the cells that are read and their masks: losses of runs with the same one can be compared.
    unigram_loss
        Loss of a model that knows the genes' frequencies in the training corpus and no context, on the same masked
        tokens; None before `measure_unigram`, or if no token is masked.
    """

    def __init__(self, data: DataSource, world: World) -> None:
        self.data, self.world, self.corpus = data, world, data.corpus
        self.stream, self.builder = data.stream(), data.builder()
        settings, plan = data.config.data, self.stream.plan(0)
        self.key = "data.path" if settings.validation_path is None else "data.validation_path"
        most = plan.num_packs if settings.validation_cells is not None else settings.validation_packs
        self.num_packs = min(most, plan.num_packs)
        self.num_cells = int(plan.pack_start[self.num_packs])
        self.is_read = np.zeros(self.corpus.num_cells, np.bool_)
        self.is_read[plan.cells[: self.num_cells]] = True
        rule = self.corpus.fingerprint, self.builder.mask_rule, data.shape.seq_length
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(rule).encode() + self.is_read.tobytes())
        self.group_names: list[str] = []
        self.groups: np.ndarray | None = None
        self.label_counts = np.zeros(data.config.model.vocab_size, np.int64)
        self.unigram_loss: float | None = None

    def check(self) -> None:
        """Build this rank's packs once, as a bad token should not wait for the last step, and read the cells' groups.

        Raises
        ------
        ConfigError
            A cell that cannot be used, or a column that is not there.
        """
        packs = range(self.world.rank, self.num_packs, self.world.size)
        try:
            for batch in build_batches(self.builder, self.stream, packs):
                labels = batch.parts.labels if isinstance(batch, PackedBatch) else batch.labels
                masked = labels[labels != IGNORED_LABEL].numpy()
                self.label_counts += np.bincount(masked, minlength=len(self.label_counts))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{self.key}: {error}") from error
        column = self.data.config.data.validation_column
        if column is not None:
            try:
                self.group_names, self.groups = cell_groups(self.corpus, column, self.is_read)
            except DataError as error:
                raise ConfigError(f"data.validation_column: {error}") from error

    def measure_unigram(self, training: DataSource, ranks: Ranks) -> None:
        """Compute `unigram_loss`, from the counts of `check`; collective."""
        counts = torch.from_numpy(self.label_counts).to(self.world.device)
        dist.all_reduce(counts)
        labels = counts.cpu().numpy()
        if labels.any():
            self.unigram_loss = ranks.run_on_all_ranks(
                lambda: unigram_loss(labels, gene_frequencies(training)) if self.world.is_main else None, ConfigError
            )[0]

    @torch.no_grad()
    def evaluate(self, step: TrainStep, beat: Beat) -> dict[str, float]:
        """Compute means over the masked tokens, without dropout; collective.

        A rank that has fewer packs than others runs its last one again and leaves it out of the sum, since sharding
        engines need all ranks in each forward. Sums stay on the device until the end.

        Parameters
        ----------
        step
            Of the model to evaluate, which trains on afterwards.
        beat
            Called with the name of the phase before each micro-batch.

        Returns
        -------
        dict
            `validation_loss` (cross-entropy in nats), `validation_perplexity` (its exponential),
            `validation_accuracy` (share of masked tokens whose logit is the largest), `validation_unigram_loss` and
            `validation_masked_tokens`; with `data.validation_column` also `validation_loss/VALUE` and
            `validation_accuracy/VALUE`. Empty if no token is masked.
        """
        step.engine.model.eval()
        totals = torch.zeros(1 + len(self.group_names), 3, dtype=torch.float64, device=self.world.device)
        for first in range(0, self.num_packs, self.world.size):
            mine = first + self.world.rank
            batches = build_batches(self.builder, self.stream, [min(mine, self.num_packs - 1)])
            beat("validating")
            batch = next_batch(batches, self.key)
            scores, cells = score(step, batch)
            if mine < self.num_packs:
                totals[0] += scores.sum(0)
                if self.groups is not None:
                    rows = torch.from_numpy(1 + self.groups[batch.cells].astype(np.int64))
                    totals.index_add_(0, rows.to(self.world.device, non_blocking=True)[cells], scores)
        step.engine.model.train()
        step.engine.reshard()
        dist.all_reduce(totals)
        return self._means(totals.tolist())

    def _means(self, totals: list[list[float]]) -> dict[str, float]:
        (loss_sum, correct, masked), *by_group = totals
        if not masked:
            return {}
        loss = loss_sum / masked
        found = {
            "validation_loss": loss,
            "validation_perplexity": math.exp(min(loss, 700.0)),
            "validation_accuracy": correct / masked,
            "validation_masked_tokens": int(masked),
        }
        if self.unigram_loss is not None:
            found["validation_unigram_loss"] = self.unigram_loss
        for name, (loss_sum, correct, masked) in zip(self.group_names, by_group, strict=True):
            if masked:
                found[f"validation_loss/{name}"] = loss_sum / masked
                found[f"validation_accuracy/{name}"] = correct / masked
        return found


def score(step: TrainStep, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predict the tokens of one micro-batch.

    Returns
    -------
    scores : Tensor
        FP64 [K, 3] on the device: cross-entropy, 1 where the largest logit is the label's, 1 where there is a label.
        All are 0 where there is none.
    cells : Tensor
        int64 [K], the place of each token's cell among those of the batch.
    """
    sent = batch.to(step.world.device, non_blocking=True)
    with step.precision.forward():
        if isinstance(sent, PackedBatch):
            parts, used = sent.parts, sent.num_masked
            index, labels = parts.masked_index[:used], parts.labels[:used].long()
            (logits,) = step.engine.forward_module(
                input_ids=parts.input_ids,
                position_ids=parts.position_ids,
                cu_seqlens=parts.cu_seqlens,
                max_seqlen=sent.max_seqlen,
                masked_index=index,
                return_dict=False,
            )
            cells = torch.searchsorted(parts.cu_seqlens, index, right=True) - 1
        else:
            (logits,) = step.engine.forward_module(
                input_ids=sent.input_ids, attention_mask=sent.attention_mask, return_dict=False
            )
            logits, labels = logits.flatten(0, 1), sent.labels.flatten()
            cells = torch.arange(len(labels), device=labels.device) // sent.labels.shape[1]
    return torch.cat([*_scores(logits, labels)]).double(), cells


def _scores(logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
    for some, expected in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        losses = F.cross_entropy(some.float(), expected, ignore_index=IGNORED_LABEL, reduction="none")
        yield torch.stack([losses, (some.argmax(-1) == expected).float(), (expected != IGNORED_LABEL).float()], dim=1)
