"""Which runs record their micro-batches, on machines that are only pretended here."""

import pytest
import torch

from geneformer_pretrain.config import ConfigError, load_config
from geneformer_pretrain.cuda_graphs import takes_cuda_graphs
from geneformer_pretrain.distributed import World


def takes(choice, *overrides, device="cuda", size=1, compiled=True):
    config = load_config("10m", [f"training.cuda_graphs={choice}", *overrides])
    return takes_cuda_graphs(config, World(0, 0, size, torch.device(device)), compiled)


def test_one_gpu_takes_graphs_unless_told_otherwise():
    assert takes("null")
    assert takes("true")
    assert not takes("false")


@pytest.mark.parametrize(
    ("overrides", "machine", "need"),
    [
        ([], {"device": "cpu"}, "a GPU"),
        ([], {"compiled": False}, "training.compile=true"),
        ([], {"size": 2}, "one process"),
        (["training.use_fsdp2=true"], {}, "training.use_fsdp2=false"),
        (["training.use_nvfsdp=true"], {}, "training.use_nvfsdp=false"),
        (["model.use_te_layers=true"], {}, "model.use_te_layers=false"),
        (["training.recompute_every_n_layers=2"], {}, "training.recompute_every_n_layers=0"),
    ],
)
def test_what_cannot_be_recorded_is_refused_or_left_out(overrides, machine, need):
    assert not takes("null", *overrides, **machine)
    with pytest.raises(ConfigError, match=f"training.cuda_graphs=true needs .*{need}.*training.cuda_graphs=null"):
        takes("true", *overrides, **machine)
