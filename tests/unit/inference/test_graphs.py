"""Recording of forward passes, where CUDA fails."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from geneformer_pretrain.inference.graphs import ForwardGraphs
from geneformer_pretrain.inference.packs import Shape


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA error: out of memory", torch.OutOfMemoryError),
        ("CUDA error: an illegal memory access was encountered", torch.AcceleratorError),
    ],
)
def test_lack_of_memory_for_a_graph_is_lack_of_memory(monkeypatch, message, kind):
    @contextmanager
    def fail(graph, **options):
        yield
        raise torch.AcceleratorError(message)

    monkeypatch.setattr(torch.cuda, "graph", fail)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    shape = Shape.of(128, 64)
    graphs = ForwardGraphs(lambda parts: parts.input_ids)
    with pytest.raises(kind, match=message):
        graphs.run(shape, torch.zeros(shape.buffer_size, dtype=torch.int32))
    assert not graphs.has_others(Shape.of(256, 64)), "a recording that failed is not used"
