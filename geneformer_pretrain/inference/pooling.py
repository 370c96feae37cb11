"""Means over the genes of each cell, and comparisons of a perturbed cell's genes with the original's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.inference.packs import NO_GENE, Parts


class Comparison(NamedTuple):
    """A perturbed cell beside its original, FP32; NaN where no gene is compared."""

    gene_similarity: Tensor
    """[N], mean over compared genes of the cosine between a gene's vectors."""
    cell_similarity: Tensor
    """[N], cosine between the means of the compared genes' vectors."""
    mean: Tensor
    """[N, H], mean vector of all genes of the perturbed cell."""


def mean_of_genes(hidden: Tensor, parts: Parts) -> Tensor:
    """Mean vector of each cell's genes: [T, H] -> FP32 [N, H]."""
    sums, counts = _sums(hidden, parts, None)
    return sums[:, 0] / counts[:, :1]


def first_token(hidden: Tensor, parts: Parts) -> Tensor:
    """Vector of each cell's first token: [T, H] -> FP32 [N, H]."""
    return hidden[parts.cu_seqlens[:-1].clamp(max=len(hidden) - 1)].float()


def compare(hidden: Tensor, parts: Parts, store: Tensor) -> Comparison:
    """Compare each gene with a row of `store`: [T, H], [R, H]."""
    sums, counts = _sums(hidden, parts, store)
    genes, compared, cosines = counts.unbind(1)
    cell_similarity = torch.where(compared > 0, F.cosine_similarity(sums[:, 1], sums[:, 2]), torch.nan)
    return Comparison(cosines / compared, cell_similarity, sums[:, 0] / genes[:, None])


def _sums(hidden: Tensor, parts: Parts, store: Tensor | None) -> tuple[Tensor, Tensor]:
    if hidden.is_cuda:
        from geneformer_pretrain.inference.kernels import sums_by_cell

        return sums_by_cell(hidden, parts.rows, parts.cu_seqlens, store)
    return sums_by_cell_in_torch(hidden, parts.rows, parts.cu_seqlens, store)


def sums_by_cell_in_torch(
    hidden: Tensor, rows: Tensor, cu_seqlens: Tensor, store: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`kernels.sums_by_cell` by PyTorch's operations."""
    cells = len(cu_seqlens) - 1
    cell = torch.repeat_interleave(torch.arange(cells, device=hidden.device), cu_seqlens.diff())

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(cells, *x.shape[1:]).index_add_(0, cell, x)

    hidden = hidden.float()
    is_gene = (rows > NO_GENE).float()
    if store is None:
        zeros = torch.zeros_like(is_gene)
        return total(hidden * is_gene[:, None])[:, None], total(torch.stack([is_gene, zeros, zeros], 1))
    compared = (rows >= 0).float()
    other = store[rows.clamp(min=0)].float() * compared[:, None]
    cosines = F.cosine_similarity(hidden, other) * compared
    sums = torch.stack([hidden * is_gene[:, None], hidden * compared[:, None], other], 1)
    return total(sums), total(torch.stack([is_gene, compared, cosines], 1))
