"""Stock BERT of transformers, sorted and padded: what embedding and perturbation take without this project.

In FP32 as the Geneformer tools run it: `BertForMaskedLM` with all hidden states, its head included. With BF16 autocast
as well as it can be made to run: one autocast context, so that weights are cast once; batches that lie on the device
before the clock starts; lengths in multiples of 64 and every shape run once before, as libraries prepare kernels for
each new shape; the better of PyTorch's attention kernels and of two batch sizes. Results are copied to the host once,
at the end.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.inference_tools.inputs import SIZES

FP32, BF16, ENCODER = "FP32", "BF16 autocast", "BF16 autocast, no head"

BACKENDS = {"PyTorch's choice": None, "efficient": SDPBackend.EFFICIENT_ATTENTION}
"""Attention kernels."""

ANY = "PyTorch's choice"

BUDGETS = (131_072, 262_144)
"""Padded tokens of a batch."""

MULTIPLE = 64

DELETIONS = 100
"""Perturbed copies of a batch, as the tools' forward_batch_size."""


class Stock:
    """Stock BERT on a device.

    Parameters
    ----------
    folder
        Of the model.
    kind
        FP32, BF16 or ENCODER.
    """

    def __init__(self, folder: Path, kind: str, device: torch.device) -> None:
        self.kind, self.device = kind, device
        model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
        self._model: Any = model.bert if kind == ENCODER else model

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Second-to-last hidden state, [B, L, H]."""
        output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        state: Tensor = output.hidden_states[-2]
        return state

    def context(self, backend: str) -> AbstractContextManager[object]:
        """No gradients, autocast, and a choice of attention kernels."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.kind != FP32))
        if (kernel := BACKENDS[backend]) is not None:
            stack.enter_context(sdpa_kernel(kernel))
        return stack

    def seconds(self, work: Callable[[], list[Tensor]], backend: str) -> tuple[float, float]:
        """Duration of some work, once cold and once warm; infinite if it does not fit into memory."""
        durations = []
        with self.context(backend):
            for _ in range(2):
                self._settle()
                began = time.perf_counter()
                try:
                    torch.cat([result.float() for result in work()]).cpu()
                except torch.OutOfMemoryError:
                    return float("inf"), float("inf")
                durations.append(time.perf_counter() - began)
        return durations[0], durations[1]

    def _settle(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def padded(cells: Sequence[np.ndarray], budget: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of at most so many padded tokens from cells sorted by length, long ones first: ids and mask."""
    batches, first = [], 0
    while first < len(cells):
        length = -(-len(cells[first]) // MULTIPLE) * MULTIPLE
        some = cells[first : first + max(1, budget // length)]
        ids = torch.zeros(len(some), length, dtype=torch.int64)
        for row, cell in zip(ids, some, strict=True):
            row[: len(cell)] = torch.from_numpy(cell.astype(np.int64))
        batches.append((ids.to(device), (ids != 0).long().to(device)))
        first += len(some)
    return batches


def measure_embedding(folder: Path, cells: Sequence[np.ndarray], kind: str, device: torch.device) -> dict[str, Any]:
    """Tokens per second of mean embeddings; kernels and batch size are chosen on a quarter of the batches."""
    stock = Stock(folder, kind, device)
    cells = sorted(cells, key=len, reverse=True)

    def work(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        means = []
        for ids, mask in batches:
            hidden = stock.hidden(ids, mask)
            means.append((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
        return means

    tried: dict[str, float] = {}
    best, best_rate = (ANY, BUDGETS[0]), 0.0
    for budget in BUDGETS if device.type == "cuda" else (8192,):
        batches = padded(cells, budget, device)[::4]
        tokens = sum(int(mask.sum()) for _, mask in batches)
        for backend in BACKENDS if device.type == "cuda" and kind != FP32 else (ANY,):
            rate = tokens / stock.seconds(lambda batches=batches: work(batches), backend)[1]  # type: ignore[misc]
            tried[f"{backend}, {budget:,}"] = rate
            if rate > best_rate:
                best, best_rate = (backend, budget), rate
    backend, budget = best
    batches = padded(cells, budget, device)
    cold, warm = stock.seconds(lambda: work(batches), backend)
    tokens = sum(map(len, cells))
    return {
        "tokens_per_second": tokens / warm,
        "cells_per_second": len(cells) / warm,
        "tokens_per_second_cold": tokens / cold,
        "attention": backend,
        "padded_tokens_of_a_batch": budget,
        "tried": tried,
    }


def measure_deletion(
    folder: Path, name: str, lengths: Sequence[int], kind: str, device: torch.device
) -> dict[str, Any]:
    """Tokens per second of one batch of deletions for cells of some lengths, each standing for as much of the work.

    As the tools do it: copies of one cell that lack one gene each, the original once more for each batch, and the mean
    cosine of each gene's vector before and after.
    """
    stock = Stock(folder, kind, device)
    special = len(SIZES[name].special)
    added = int("<cls>" in SIZES[name].special)
    rates, sizes = [], []
    for length in lengths:
        cell = torch.arange(length, device=device) % (SIZES[name].vocab_size - special) + special
        size = min(DELETIONS if device.type == "cuda" else 2, length - 2 * added)
        warm = float("inf")
        while warm == float("inf") and size:
            places = torch.arange(length, device=device)
            removed = torch.linspace(added, length - 1 - added, size, device=device).long()
            kept = torch.stack([places[places != place] for place in removed])

            def work(kept: Tensor = kept, cell: Tensor = cell) -> list[Tensor]:
                before = stock.hidden(cell[None], None)[0]
                after = stock.hidden(cell[kept], None)
                return [torch.cosine_similarity(after, before[kept], dim=2).mean(1)]

            backends = BACKENDS if device.type == "cuda" and kind != FP32 else (ANY,)
            warm = min(stock.seconds(work, backend)[1] for backend in backends)
            if warm == float("inf"):
                gc.collect()
                torch.cuda.empty_cache()
                size //= 2
        rates.append(size * (length - 1) / warm)
        sizes.append(size)
    harmonic = len(rates) / sum(1 / rate for rate in rates)
    return {"tokens_per_second": harmonic, "lengths": list(lengths), "batches": sizes, "rates": rates}
