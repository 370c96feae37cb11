"""Forward passes over packed cells: built in a thread, pooled on the device, copied back without waiting.

Packs have few shapes, so that kernels are chosen, compiled and recorded once. Launches of a pack hide behind the
kernels of the one before; the host never waits for the device except for results that are some packs old.
"""

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from geneformer_pretrain.console import say
from geneformer_pretrain.errors import require
from geneformer_pretrain.inference.graphs import ForwardGraphs
from geneformer_pretrain.inference.model import Model
from geneformer_pretrain.inference.packs import (
    ALIGNMENT,
    NOT_COMPARED,
    TOKENS_PER_CELL,
    Head,
    Pack,
    Parts,
    Shape,
    fill_with_cells,
    new_buffer,
    plan_packs,
)
from modeling_bert_te import BertLayer

T = TypeVar("T")

ELEMENTS = 2**26
"""Elements of a pack's hidden states, tokens times width, that fill a GPU."""

MAX_ELEMENTS = 2**31 - 1
"""Most elements of a pack's queries, keys and values, which kernels number in 32 bits."""

CPU_TOKENS = 8192
"""Tokens of a pack on a CPU, whose hidden states fit its caches."""

SHARES = (1, 4, 16)
"""A pack has the token budget, a quarter or a sixteenth of it, whichever is enough."""

IN_FLIGHT = 6
"""Packs that the device has to do while the host waits for an earlier one: 50 ms with small models, in which threads
that read and write may hold Python's lock."""

AHEAD = 8
"""Packs that are built ahead."""

WINDOW_PACKS = 64
"""Packs that are made together from neighbouring cells."""

FILL = 0.999
"""Share of these packs' tokens that cells can be found for."""

COMPILE_FROM = 1e17
"""Floating-point operations of a job, ten minutes or so, from which compiling saves more time than it takes."""


@dataclass(frozen=True)
class _Running:
    pack: Pack
    result: Tensor
    ready: Any


class Runner:
    """Runs packs through the lower layers of a model.

    Parameters
    ----------
    model
        The model on its device.
    layer
        Hidden state to give to the heads, counted as `hidden_states` does: 0 is the embeddings, -1 the last layer's.
        Layers above it are not computed.
    longest
        Longest cell.
    tokens
        Token budget of a pack; chosen by the device if not given.
    compiled
        Compile the layers for packs of the full budget, on a GPU where they do not run by this project's kernels.

    Raises
    ------
    ConfigError
        A budget beyond what kernels can address.

    Attributes
    ----------
    tokens_done, waited
        Tokens that went through, and seconds of waiting for packs, since `warm_up`.
    """

    def __init__(
        self, model: Model, layer: int, *, longest: int, tokens: int | None = None, compiled: bool = False
    ) -> None:
        self.model, self.device, self.longest = model, model.device, longest
        self.num_layers = model.num_layers_below(layer)
        self.on_gpu = self.device.type == "cuda"
        self.least_tokens = -(-longest // ALIGNMENT) * ALIGNMENT
        if tokens is None:
            tokens = 2 ** int(np.log2(ELEMENTS / model.hidden_size)) if self.on_gpu else CPU_TOKENS
        self.tokens = max(-(-tokens // ALIGNMENT) * ALIGNMENT, self.least_tokens)
        most = MAX_ELEMENTS // (3 * model.hidden_size) // ALIGNMENT * ALIGNMENT
        require(self.tokens <= most, f"--pack-tokens {tokens}: choose at most {most:,} for this model.")
        self.compiled_tokens = self.tokens if compiled and self.on_gpu and model.fused is None else 0
        self._layers = [cast(BertLayer, layer) for layer in model.bert.encoder["layer"].children()][: self.num_layers]
        self._eager = [layer.compute for layer in self._layers]
        self._compiled = self._eager
        if self.compiled_tokens:
            self._compiled = [torch.compile(layer.compute, dynamic=False) for layer in self._layers]
        self._copies = torch.cuda.Stream(self.device) if self.on_gpu else None
        self._graphs = ForwardGraphs(self.hidden) if model.has_own_attention else None
        self.in_flight = IN_FLIGHT
        self.tokens_done, self.waited = 0, 0.0

    @property
    def window(self) -> int:
        """Tokens of neighbouring cells whose packs are made together, so that few gaps are left."""
        return int(WINDOW_PACKS * FILL * self.tokens)

    def plan(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, Shape]]:
        """Distribute cells over packs: their indices, int64, and the shape of the pack.

        Parameters
        ----------
        lengths
            int [n], tokens of each cell.
        """
        budget = self.tokens
        sizes = [max(-(-budget // share // ALIGNMENT) * ALIGNMENT, self.least_tokens) for share in SHARES]
        rooms = TOKENS_PER_CELL[:1] if self.compiled_tokens else TOKENS_PER_CELL  # each shape is compiled for itself
        shapes = [Shape.of(size, self.longest, room) for size in sizes for room in rooms]
        order, ends = plan_packs(lengths.astype(np.int64), budget, shapes[0].max_cells)
        start = 0
        for end in ends.tolist():
            chosen = order[start:end]
            tokens = int(lengths[chosen].sum())
            yield chosen, [s for s in shapes if s.tokens >= tokens and s.max_cells >= len(chosen)][-1]
            start = end

    @torch.no_grad()
    def run(self, packs: Iterable[Pack]) -> Iterator[tuple[Pack, np.ndarray]]:
        """Run packs in order and give each with the rows of its cells, as its head returns them.

        If the device runs out of memory, the token budget is halved, packs that are larger are cut, and the work goes
        on; with half as many packs in flight, if some were.

        Raises
        ------
        torch.OutOfMemoryError
            Even the longest cell alone does not fit.
        """
        running: deque[_Running] = deque()
        waiting: deque[Pack] = deque()
        with Ahead(packs, AHEAD) as built:
            source = iter(built)
            while True:
                if not waiting:
                    began = perf_counter()
                    following = next(source, None)
                    self.waited += perf_counter() - began
                    if following is None:
                        break
                    waiting.append(following)
                pack = waiting.popleft()
                if pack.shape.tokens > self.tokens:
                    waiting.extendleft(reversed(pack.cut(Shape.of(self.tokens, self.longest))))
                    continue
                try:
                    running.append(self._start(pack))
                except torch.OutOfMemoryError:
                    if self.tokens == self.least_tokens and not running and not self._has_others(pack):
                        raise
                    waiting.appendleft(pack)
                else:
                    if len(running) > self.in_flight:
                        yield self._finish(running.popleft())
                    continue
                # Outside of the except clause, whose traceback holds on to tensors.
                if running:
                    self.in_flight //= 2
                while running:
                    yield self._finish(running.popleft())
                self._halve(pack)
            while running:
                yield self._finish(running.popleft())

    def _halve(self, pack: Pack) -> None:
        # A small pack may have failed for the memory that recordings of large ones hold.
        size = self.tokens if self._has_others(pack) else pack.shape.tokens
        tokens = max(size // 2 // ALIGNMENT * ALIGNMENT, self.least_tokens)
        if tokens < self.tokens:
            say(f"Out of memory with packs of {size:,} tokens; going on with {tokens:,}.", error=True)
        self.tokens = tokens
        if self._graphs is not None:
            self._graphs.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _has_others(self, pack: Pack) -> bool:
        return self._graphs is not None and self._graphs.has_others(pack.shape)

    def _start(self, pack: Pack) -> _Running:
        """Queue a pack's work on the device."""
        if self._copies is None:
            parts = pack.trimmed(pack.shape.split(pack.buffer))
            result = pack.head(pack, self.hidden(parts), parts)
            return _Running(pack, result[: pack.num_cells], None)
        with torch.cuda.stream(self._copies):
            buffer = pack.buffer.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream()
        current.wait_stream(self._copies)
        buffer.record_stream(current)
        if self._graphs is None:
            parts = pack.shape.split(buffer)
            hidden = self.hidden(parts)
        else:
            parts, hidden = self._graphs.run(pack.shape, buffer)
        result = pack.head(pack, hidden, parts)[: pack.num_cells]
        target = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        target.copy_(result, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Running(pack, target, ready)

    def _finish(self, running: _Running) -> tuple[Pack, np.ndarray]:
        if running.ready is not None:
            running.ready.synchronize()
        self.tokens_done += running.pack.num_tokens
        return running.pack, running.result.numpy()

    def hidden(self, parts: Parts) -> Tensor:
        """Hidden states of a pack on the device, [T, H] in the compute dtype."""
        bert = self.model.bert
        layers = self._compiled if len(parts.input_ids) == self.compiled_tokens else self._eager
        plan = bert.attention.prepare(parts.cu_seqlens, self.longest, len(parts.input_ids))
        x = self.model.embed(parts.input_ids, parts.position_ids)
        for layer in layers:
            x = layer(x, plan)
        return x

    def pack_of(
        self,
        chosen: np.ndarray,
        shape: Shape,
        tokens: np.ndarray,
        offsets: np.ndarray,
        head: Head,
        owner: Any,
        *,
        row_of_cell: np.ndarray | None = None,
        items: np.ndarray | None = None,
    ) -> Pack:
        """Pack whole cells; see `packs.copy_cells`.

        Parameters
        ----------
        chosen
            int64, cells of the pack.
        row_of_cell
            int32, the row that the genes of a cell get; NOT_COMPARED if not given.
        items
            Places of the results in `owner`, by cell; the cells' own numbers if not given.
        """
        if row_of_cell is None:
            row_of_cell = np.full(len(offsets) - 1, NOT_COMPARED, np.int32)
        buffer = new_buffer(shape, pinned=self.on_gpu)
        parts = [part.numpy() for part in shape.split(buffer)]
        count = fill_with_cells(parts, shape, tokens, offsets, chosen, self.model.is_special, row_of_cell)
        return Pack(buffer, shape, len(chosen), count, head, owner, chosen if items is None else items[chosen])

    def warm_up(self, head: Head, length: int) -> None:
        """Pay for what happens once, on a GPU: compile, record and run a pack of cells of `length` random genes."""
        if self.on_gpu:
            for _ in self.run([self._random_pack(head, length)]):
                pass
        self.tokens_done, self.waited = 0, 0.0

    def measure(self, head: Head, length: int, seconds: float) -> float:
        """Tokens per second on cells of `length` random genes: of as many packs as take at least so many seconds."""
        self.warm_up(head, length)
        packs, spent = [self._random_pack(head, length)], 0.0
        while spent < seconds:
            began = perf_counter()
            self.tokens_done = 0
            for _ in self.run(packs):
                pass
            spent = perf_counter() - began
            packs *= 2
        rate = self.tokens_done / spent
        self.tokens_done, self.waited = 0, 0.0
        return rate

    def _random_pack(self, head: Head, length: int) -> Pack:
        lengths = np.full(max(1, self.tokens // length), length)
        offsets = np.concatenate([[0], lengths.cumsum()])
        special = int(self.model.is_special.sum())
        genes = np.arange(offsets[-1], dtype=np.int32) % (self.model.vocab_size - special) + special
        chosen, shape = next(self.plan(lengths))
        rows = np.zeros(len(lengths), np.int32)
        return self.pack_of(chosen, shape, genes, offsets, head, None, row_of_cell=rows)


def windows(lengths: np.ndarray, budget: int) -> Iterator[slice]:
    """Cut cells into runs of at most `budget` tokens, or of one cell.

    Parameters
    ----------
    lengths
        int [n], tokens of each cell.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    first, done = 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, done + budget, side="right")))
        yield slice(first, last)
        first, done = last, int(ends[last - 1])


class Ahead(Iterable[T]):
    """Iterates in a thread of its own, a few items ahead."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._stop = Event()
        self._thread = Thread(target=self._fill, args=(items,), daemon=True)

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, None))
        except BaseException as error:  # raised again where the items are used
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    def __enter__(self) -> "Ahead[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while True:  # makes room for a thread that waits for it
            try:
                self._queue.get_nowait()
            except Empty:
                break
        self._thread.join()
