"""The Triton kernels of inference, run by Triton's interpreter, against PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import torch
from torch.testing import assert_close
from geneformer_pretrain.inference.kernels import InferenceFused, sums_by_cell
from geneformer_pretrain.inference.pooling import sums_by_cell_in_torch
from modeling_bert_te import BertConfig, BertEmbeddings

torch.manual_seed(0)
for width in (64, 300):
    lengths = torch.tensor([1, 300, 128, 0, 129, 42, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    hidden = torch.randn(600, width)
    rows = torch.randint(-2, 50, (600,), dtype=torch.int32)
    store = torch.randn(50, width)
    for other in (None, store):
        found = sums_by_cell(hidden, rows, cu_seqlens, other)
        expected = sums_by_cell_in_torch(hidden, rows, cu_seqlens, other)
        columns = slice(0, 1) if other is None else slice(0, 3)
        assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
        assert_close(found[1][:, columns], expected[1][:, columns], atol=1e-5, rtol=1e-5)
    x, residual = torch.randn(37, width), torch.randn(37, width)
    b, weight, bias = torch.randn(3, width)
    for of_linear in (b, None):
        found = InferenceFused().residual_norm(x, of_linear, residual, weight, bias, 1e-12, 0.0)
        total = residual + x + (0 if of_linear is None else of_linear)
        assert_close(found, torch.nn.functional.layer_norm(total, (width,), weight, bias, 1e-12))
    config = BertConfig(vocab_size=70, hidden_size=width, num_attention_heads=4, max_position_embeddings=40)
    tables = BertEmbeddings(config).eval()
    for parameter in tables.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.randint(0, 70, (37,), dtype=torch.int32)
    positions = torch.randint(0, 40, (37,), dtype=torch.int32)
    with torch.no_grad():
        assert_close(InferenceFused().embed(tables, ids, positions), tables(ids, positions, None))
print("equal")
"""


def test_kernels_agree_with_pytorch():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
