"""Micro-batches of one rank, built ahead by background threads."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Self

import torch

from geneformer_pretrain.data.batch import Batch, BatchBuilder
from geneformer_pretrain.data.stream import PackStream


class Loader:
    """Iterator over the micro-batches of one rank, in order, built ahead by background threads.

    An exception in a thread is raised where its batch would have come.

    Parameters
    ----------
    builder, stream
        Builds micro-batches; finds the cells of a pack.
    packs
        Numbers of the packs to deliver.
    num_workers
        Background threads; 0 builds in the calling thread.
    prefetch
        Most batches built or being built ahead of the consumer; by default twice the number of threads.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        stream: PackStream,
        packs: Iterable[int],
        num_workers: int = 0,
        prefetch: int | None = None,
    ) -> None:
        self._builder, self._stream = builder, stream
        self._packs = iter(packs)
        self._prefetch = prefetch or 2 * num_workers
        self._pending: deque[Future[Batch]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        if num_workers:
            # A new thread would start out on device 0 and could open a context there.
            device = torch.cuda.current_device() if builder.pin_memory else None
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
        self._packs = iter(())
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
