"""Time the attention kernels alone: forward and backward over packed cells of lognormal lengths.

    python benchmarks/attention.py                                   # 4, 12 and 40 heads, with and without dropout
    python benchmarks/attention.py --heads 4 --sweep keys            # block shapes of one of the Triton kernels

TFLOP/s count the matrix products that the mathematics needs: two forward and four backward for each pair of tokens
of a cell, not what a kernel computes again. A sweep times all Triton kernels together with one kernel's shape
changed, beside the shape in use; shapes that do not compile or do not fit are named. Kernels back to back on random
data run into the GPU's power limit, those of a training step do not: let profile_step.py have the last word.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.planner.lengths import simulated
from modeling_bert_te import FlashAttention

HEAD_SIZE = 64
KERNELS = {"forward": "FORWARD", "keys": "BACKWARD_KEYS", "queries": "BACKWARD_QUERIES"}


def pack(num_tokens: int) -> Tensor:
    """int32 cu_seqlens of cells that fill `num_tokens`, the last one cut."""
    ends = torch.from_numpy(simulated("lognormal", 2048).draw(num_tokens // 200).cumsum()).clamp(max=num_tokens)
    return torch.nn.functional.pad(ends.unique(), (1, 0)).int().cuda()


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of one call by device events, after as many calls to warm up.

    The host runs ahead of the device, so that what it spends on a call is not counted.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats + 1)]
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairwise(events[repeats:]))


def measure(attend: Callable[[Tensor], Tensor], qkv: Tensor, repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv)
    grad = torch.randn_like(out)
    forward = median_ms(lambda: attend(qkv), repeats)
    backward = median_ms(lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True), repeats)
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", type=int, default=[4, 12, 40])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.02])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", choices=KERNELS, help="try other block shapes of this kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible here")
    from geneformer_pretrain.kernels import attention as triton_attention

    cu_seqlens = pack(args.tokens)
    lengths = cu_seqlens.diff().double()
    seed = torch.tensor([1], device="cuda")
    tiles = triton_attention.tile_list(cu_seqlens, args.tokens)
    flash = FlashAttention()
    prepared = flash.prepare(cu_seqlens, 2048, args.tokens)
    print(f"{torch.cuda.get_device_name()}, {args.tokens} tokens in {len(lengths)} cells, heads of {HEAD_SIZE}, BF16")
    print(f"{'kernel':58} {'heads':>5} {'dropout':>7} {'forward':>19} {'backward':>19}")

    def line(name: str, heads: int, dropout: float, attend: Callable[[Tensor], Tensor]) -> None:
        qkv = torch.randn(args.tokens, 3, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        flops = 4 * lengths.square().sum().item() * heads * HEAD_SIZE
        try:
            times = measure(attend, qkv, args.repeats)
        except Exception as error:  # Triton's errors of a shape that cannot be built have no common class.
            if args.sweep is None:
                raise
            print(f"{name:58} {heads:5} {dropout:7.2f} {type(error).__name__}: {str(error).splitlines()[0][:60]}")
            return
        rates = [flops / ms / 1e9 for ms in (times[0], times[1] / 2)]
        cells = [f"{ms:7.3f} ms {rate:4.0f} TF/s" for ms, rate in zip(times, rates, strict=True)]
        print(f"{name:58} {heads:5} {dropout:7.2f} {cells[0]:>19} {cells[1]:>19}", flush=True)

    for heads, dropout in itertools.product(args.heads, args.dropout):

        def triton(qkv: Tensor, dropout: float = dropout) -> Tensor:
            return triton_attention.packed_attention(qkv, None, tiles, seed, dropout)[0]

        if args.sweep is None:
            line("PyTorch's FlashAttention", heads, dropout, lambda qkv, p=dropout: flash(qkv, prepared, p))
            line("Triton", heads, dropout, triton)
            continue
        name = KERNELS[args.sweep]
        in_use = getattr(triton_attention, name)
        own, other = ("BLOCK_N", "BLOCK_M") if args.sweep == "keys" else ("BLOCK_M", "BLOCK_N")
        shapes = [
            {own: rows, other: block, "num_warps": rows // 16, "num_stages": stages} | registers
            for rows, block, stages in itertools.product((64, 128), (32, 64, 128), (2, 3))
            for registers in ({}, {"maxnreg": 128}, {"maxnreg": 168})
        ]
        for shape in [in_use, *shapes]:
            setattr(triton_attention, name, shape)
            line(f"{args.sweep} " + " ".join(f"{k}={v}" for k, v in shape.items()), heads, dropout, triton)
        setattr(triton_attention, name, in_use)


if __name__ == "__main__":
    main()
