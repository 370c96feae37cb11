"""The micro-batches of one rank, built ahead by background threads."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Self

import torch

from geneformer_pretrain.data.batch import Batch, BatchBuilder
from geneformer_pretrain.data.corpus import Corpus
from geneformer_pretrain.data.packing import PackShape
from geneformer_pretrain.data.stream import PackStream


class Loader:
    """The micro-batches of one rank, in order, built ahead by background threads.

    Optimizer step s consumes packs [s P, (s + 1) P) of the stream; its micro-batch m on rank r is pack
    s P + m world_size + r. An exception in a thread is raised where its batch would have come.

    Parameters
    ----------
    corpus, stream, shape
        Where the tokens are, which cells each pack holds, and the packs' shape.
    seed, mlm_probability, vocab_size, num_special_tokens, mask_token_id, pad_token_id, packing, pin_memory
        See ``BatchBuilder``.
    rank, world_size
        This process and their number.
    packs_per_step
        P, a multiple of ``world_size``.
    first_step, num_steps
        Steps to deliver: ``first_step .. first_step + num_steps - 1``.
    num_workers
        Background threads; 0 builds in the calling thread.
    prefetch
        Most batches built or being built ahead of the consumer; by default twice the number of threads.

    Raises
    ------
    ValueError
        If ``packs_per_step`` is not a multiple of ``world_size``.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: PackStream,
        shape: PackShape,
        *,
        seed: int,
        mlm_probability: float,
        vocab_size: int,
        num_special_tokens: int,
        mask_token_id: int,
        pad_token_id: int,
        packing: bool = True,
        rank: int = 0,
        world_size: int = 1,
        packs_per_step: int = 1,
        first_step: int = 0,
        num_steps: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int | None = None,
    ) -> None:
        if packs_per_step < 1 or packs_per_step % world_size:
            sizes = ", ".join(str(size) for size in range(1, packs_per_step + 1) if packs_per_step % size == 0)
            raise ValueError(
                f"{packs_per_step} packs per step cannot be shared evenly by {world_size} ranks; "
                f"world sizes that work: {sizes or 'none'}"
            )
        if num_workers < 0:
            raise ValueError(f"training.num_workers is {num_workers}; it must be 0 or more")
        if prefetch is not None and prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; it must be at least 1")
        self._builder = BatchBuilder(
            corpus,
            shape,
            seed=seed,
            mlm_probability=mlm_probability,
            vocab_size=vocab_size,
            num_special_tokens=num_special_tokens,
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            packing=packing,
            pin_memory=pin_memory,
        )
        self._stream = stream
        first_pack = first_step * packs_per_step + rank
        self._packs = iter(range(first_pack, (first_step + num_steps) * packs_per_step, world_size))
        self._prefetch = prefetch or 2 * num_workers
        self._pending: deque[Future[Batch]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        if num_workers:
            # A new thread would start out on device 0 and could open a context there.
            device = torch.cuda.current_device() if pin_memory else None
            self._executor = ThreadPoolExecutor(num_workers, "loader", _enter_device, (device,))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._executor is None:
            return self._build(next(self._packs))
        self._work_ahead(self._executor)
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft().result()
        # Once more, so that the threads are busy while the consumer is.
        self._work_ahead(self._executor)
        return batch

    def _work_ahead(self, executor: ThreadPoolExecutor) -> None:
        for pack in islice(self._packs, self._prefetch - len(self._pending)):
            self._pending.append(executor.submit(self._build, pack))

    def _build(self, pack: int) -> Batch:
        return self._builder.build(pack, *self._stream.locate(pack))

    def close(self) -> None:
        """Drop what was built ahead and end the threads."""
        self._packs = iter(range(0))
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _enter_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
