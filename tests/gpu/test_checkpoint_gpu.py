"""Copies of a GPU's tensors in host memory."""

import pytest
import torch

from geneformer_pretrain.checkpoint.host import HostBuffers
from geneformer_pretrain.checkpoint.shards import Shards, TensorInfo

pytestmark = pytest.mark.gpu


def test_copies_are_equal_and_pinned_and_given_back() -> None:
    """The same memory is pinned again afterwards, which fails where it still is."""
    for size in (3_000_001, 50_000_000, 3_000_001):
        host = HostBuffers()
        for seed in (1, 2):
            torch.manual_seed(seed)
            values = torch.randn(size, device="cuda")
            matrix = torch.randn(129, 65, device="cuda", dtype=torch.bfloat16).t()
            count = torch.tensor(seed, device="cuda")
            on_host = torch.arange(7.0)
            tensors = {"values": values, "matrix": matrix, "count": count, "on_host": on_host}
            shards = {
                name: Shards(TensorInfo(tuple(tensor.shape), tensor.dtype), {(0,) * tensor.ndim: tensor})
                for name, tensor in tensors.items()
            }
            copied = {name: next(iter(copy.pieces.values())) for name, copy in host.copy(shards, borrow=True).items()}
            for name, tensor in tensors.items():
                assert torch.equal(copied[name], tensor.cpu())
                assert copied[name].is_pinned() == (name != "on_host")
        memory = host._region.untyped_storage()  # outlives the buffers
        del host, copied
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes(), 0))
        torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))
