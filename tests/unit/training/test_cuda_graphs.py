"""Which runs record their micro-batches, and what is replayed; GPUs are only pretended here."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.world import World, distributed_world
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model.resolve import use_cuda_graphs
from geneformer_pretrain.training.cuda_graphs import ALIGNMENT, MicroBatchGraphs, flat_buffer

pytestmark = pytest.mark.process


def takes(choice, *overrides, device="cuda", size=1, compiled=True, nodes=1):
    config = load_config("10m", [f"training.cuda_graphs={choice}", *overrides])
    return use_cuda_graphs(config, World(0, 0, size, torch.device(device), nodes), compiled)


def test_the_gpus_of_one_node_take_graphs_unless_told_otherwise():
    assert takes("null")
    assert takes("true")
    assert not takes("false")
    assert takes("null", size=8)
    assert not takes("null", size=16, nodes=2)  # gradients are to be reduced during the backward
    assert takes("true", size=16, nodes=2)
    assert not takes("null", "model.hidden_size=2560", "model.num_attention_heads=40")  # nothing to gain
    assert takes("true", "model.hidden_size=2560", "model.num_attention_heads=40")


def test_all_ranks_count_the_same_nodes(monkeypatch):
    """Also where nodes have different numbers of GPUs; a process without torchrun is one node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with distributed_world() as world:
        assert world.nodes == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    with distributed_world() as world:
        assert world.nodes == 3


@pytest.mark.parametrize(
    ("overrides", "machine", "need"),
    [
        ([], {"device": "cpu"}, "a GPU"),
        ([], {"compiled": False}, "training.compile=true"),
        (["training.use_fsdp2=true"], {}, "training.use_fsdp2=false"),
        (["training.use_nvfsdp=true"], {}, "training.use_nvfsdp=false"),
        (["model.use_te_layers=true"], {}, "model.use_te_layers=false"),
        (["training.recompute_every_n_layers=2"], {}, "training.recompute_every_n_layers=0"),
        (["training.compute_dtype=float32"], {}, "BF16"),
    ],
)
def test_what_cannot_be_recorded_is_refused_or_left_out(overrides, machine, need):
    assert not takes("null", *overrides, **machine)
    with pytest.raises(ConfigError, match=f"training.cuda_graphs=true needs .*{need}.*training.cuda_graphs=null"):
        takes("true", *overrides, **machine)


class Graph:
    """Stands for a CUDA graph: operations that replay into the memory that they had."""

    def __init__(self):
        self.operations = []

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self):
        for function, arguments, named, outputs in self.operations:
            again = function(*arguments, **named)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        outputs = function(*arguments, **(named or {}))
        self.graph.operations.append((function, arguments, named or {}, outputs))
        return outputs


@dataclass
class Batch:
    buffer: torch.Tensor

    def to(self, device):
        return Batch(self.buffer.clone())


class Stream:
    def wait_stream(self, other):
        pass


def network_with_pretended_graphs(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    @contextmanager
    def record(graph, pool, capture_error_mode):
        before = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
        with Recorder(graph):
            yield
        for parameter, gradient in zip(network.parameters(), before, strict=True):
            if gradient is not None:  # A recorded operation has not been executed.
                parameter.grad.copy_(gradient)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return network


@pytest.fixture
def network(monkeypatch):
    return network_with_pretended_graphs(monkeypatch)


def gradients_of_two_steps(rank, size):
    """Of two micro-batches each, for a rank of several; and what they should be, found by one rank alone."""
    with pytest.MonkeyPatch.context() as patch:
        network = network_with_pretended_graphs(patch).eval()  # dropout belongs to the rank

        def loss(batch):
            return network(batch.buffer).square().sum(), torch.ones(())

        graphs = MicroBatchGraphs(loss, network.parameters(), accumulates=True, reduces=size > 1)
        generator, seen, expected = torch.Generator().manual_seed(5), [], []
        for _ in range(2):
            batches = [Batch(torch.randn(4, 8, generator=generator)) for _ in range(2 * size)]
            for micro, batch in enumerate(batches[rank::size]):
                graphs.run(batch, 0, micro == 1)
            seen += [parameter.grad.clone() for parameter in network.parameters()]
            together = loss(Batch(torch.cat([batch.buffer for batch in batches])))[0]
            expected += torch.autograd.grad(together, list(network.parameters()))
            torch.optim.SGD(network.parameters()).zero_grad(set_to_none=True)
        return seen, expected


def test_gradients_are_summed_over_ranks_once_a_step(run_workers):
    for seen, expected in run_workers(gradients_of_two_steps, 2):
        torch.testing.assert_close(seen, expected)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_common_buffer_has_a_place_for_each_tensor(shapes):
    tensors = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    buffer, views = flat_buffer(tensors)
    for view, tensor in zip(views, tensors, strict=True):
        assert view.storage_offset() % ALIGNMENT == 0
        view.copy_(tensor.detach())
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor)
    assert buffer.count_nonzero() == sum(tensor.numel() for tensor in tensors)


def test_replayed_micro_batches_train_as_others_do(network):
    """Three steps of three micro-batches, with dropout: losses, gradients and weights are the same."""
    start = [parameter.detach().clone() for parameter in network.parameters()]
    calls = []

    def loss(batch):
        calls.append(batch)
        return network(batch.buffer).square().sum(), (batch.buffer > 0).sum()

    def eager(batch, seed, is_last):
        torch.manual_seed(seed)
        loss_sum, masked = loss(batch)
        loss_sum.backward()
        return loss_sum, masked

    def train(micro_batch):
        generator, seen = torch.Generator().manual_seed(5), []
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        for step in range(3):
            for micro in range(3):
                batch = Batch(torch.randn(4, 8, generator=generator))
                seen += [value.item() for value in micro_batch(batch, 10 * step + micro, micro == 2)]
            seen += [parameter.grad.clone() for parameter in network.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [*seen, *(parameter.detach().clone() for parameter in network.parameters())]

    expected = train(eager)
    calls.clear()
    found = train(MicroBatchGraphs(loss, network.parameters(), accumulates=True, reduces=False).run)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert len(calls) == 4  # two to warm up, one that writes gradients, one that adds to them


def test_what_cannot_be_recorded_names_the_key(network):
    def loss(batch):
        if calls.append(batch) or len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return network(batch.buffer).sum(), torch.ones(())

    calls = []
    graphs = MicroBatchGraphs(loss, network.parameters(), accumulates=False, reduces=False)
    with pytest.raises(ConfigError, match=r"not permitted.*training\.cuda_graphs=false"):
        graphs.run(Batch(torch.randn(4, 8)), 0, True)
