"""FP8 of PyTorch layers on a GPU: kernels against PyTorch's casts and float64, the model against stock BERT."""

import pytest
import torch

from modeling_bert_te import BertForMaskedLM
from tests.gpu.test_model_gpu import assert_fp8_is_near_stock, gradients, our_model, pack, relative_error, stock_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def bits(x):
    return x.view(torch.uint8)


def rounded(x, dtype):
    largest = torch.finfo(dtype).max
    return x.float().clamp(-largest, largest).to(dtype)


@pytest.mark.parametrize("shape", [(1168, 256), (4096, 776)])
@pytest.mark.parametrize("is_gradient", [False, True])
def test_casts_are_bitwise_those_of_pytorch(shape, is_gradient):
    from geneformer_pretrain.kernels.fp8 import fp8_cast

    x = (100 * torch.randn(shape, device="cuda")).bfloat16()
    x[7, 3] = 3e6  # saturates
    scales, maxima = torch.tensor([1.0, 0.7], device="cuda"), torch.tensor([0.0, 5.0], device="cuda")
    rows, columns = fp8_cast(x, scales, maxima, 1, is_gradient, True)
    assert torch.equal(bits(rows), bits(rounded(0.7 * x.float(), E5M2 if is_gradient else E4M3)))
    assert torch.equal(bits(columns), bits(rows).t())
    assert maxima.tolist() == [0.0, x[7, 3].float().item()]


@pytest.mark.parametrize(("rows", "inner", "width"), [(1168, 256, 512), (2048, 768, 3072), (144, 2560, 1040)])
def test_products_with_epilogues(rows, inner, width):
    """Sums on the matrix units have 14 bits: a value may round to the FP8 number beside the right one."""
    from geneformer_pretrain.kernels.fp8 import fp8_expand, fp8_product_where_positive

    a, b = torch.randn(rows, inner, device="cuda").to(E4M3), torch.randn(width, inner, device="cuda").to(E4M3)
    bias = torch.randn(width, device="cuda").bfloat16()
    inverse_a, inverse_b = torch.tensor([0.1], device="cuda"), torch.tensor([0.5], device="cuda")
    scales, maxima = torch.tensor([1.0, 8.0], device="cuda"), torch.zeros(2, device="cuda")
    hidden, transposed = fp8_expand(a, b, inverse_a, inverse_b, bias, scales, maxima, 1, True)
    expected = (a.double() @ b.double().t() * 0.05 + bias.double()).relu()
    assert maxima[1].item() == pytest.approx(expected.max().item(), rel=1e-3)
    assert relative_error(hidden.float(), rounded(8 * expected, E4M3).float()) < 0.01
    assert torch.equal(bits(transposed), bits(hidden).t())

    grad = torch.randn(rows, inner, device="cuda").to(E5M2)
    maxima.zero_()
    found, transposed_grad, partial = fp8_product_where_positive(
        grad, b, inverse_a, inverse_b, transposed, scales, maxima, 1
    )
    expected = grad.double() @ b.double().t() * 0.05 * (hidden.double() > 0)
    assert maxima[1].item() == pytest.approx(expected.abs().max().item(), rel=2e-3)
    assert relative_error(found.float(), rounded(8 * expected, E5M2).float()) < 0.02
    assert torch.equal(bits(transposed_grad), bits(found).t())
    assert relative_error(partial.sum(0), expected.sum(0)) < 2e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_is_near_float32_stock(compiled):
    from geneformer_pretrain.kernels.adapters import TritonAttention, TritonFp8, TritonFused
    from geneformer_pretrain.kernels.fp8_scaling import DelayedScaling

    stock = stock_model()
    model: BertForMaskedLM = our_model(stock, compiled)
    layers = list(model.bert.encoder["layer"].children())
    scaling = DelayedScaling(len(layers), torch.device("cuda"))
    model.set_attention(TritonAttention())
    model.set_fused_kernels(TritonFused())
    for number, layer in enumerate(layers):
        layer.set_fused_kernels(TritonFp8(scaling.layer(number)))
    packed, padded = pack([1024, 900, 1, 700, 31], seed=5)
    for _ in range(2):  # the first finds the scales
        model.zero_grad()
        output = model(**packed)
        output.loss.backward()
        scaling.update()
    assert_fp8_is_near_stock(output, gradients(model), stock, padded)
