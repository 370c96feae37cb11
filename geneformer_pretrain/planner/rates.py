"""Constants of the model of a step's time: few, fitted to the measured runs (tests/unit/planner/test_measured.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Rates as shares of a GPU's datasheet, bytes moved, and delays.

    Attributes
    ----------
    matrix_bf16, matrix_fp8
        Shares of the peak that matrix products with weights reach.
    attention_hopper, attention_elsewhere
        Shares of the BF16 peak that attention reaches: this project's kernels on Hopper, FlashAttention elsewhere (not
        measured).
    passes_width, passes_inner
        Passes over activations of widths H and F, forward and backward, per layer.
    passes_fp8_width, passes_fp8_inner
        The same for casts to FP8 of Transformer Engine.
    passes_kernels_width
        The same for FP8 of PyTorch layers; stands also for products of Triton that are slower than cuBLAS'.
    passes_logits
        Passes over the logits of the masked tokens.
    update_bytes, update_bandwidth
        Bytes a parameter that AdamW, the gradient norm and casts move, and their share of the memory's bandwidth.
    step_seconds
        Launches, gaps between kernels and small kernels of a step.
    eager_layer_seconds, graph_layer_seconds
        Time in which the host launches forward and backward of a layer one kernel after the other, or as a graph.
    sharded_layer_seconds
        Launching the collectives of a sharded layer.
    link_share, network_share
        Shares of the bandwidths between GPUs and between nodes that collectives reach; the second is not measured.
    hop_seconds
        Delay of a ring's message from one node to the next; not measured.
    slowing
        Time that a collective beside the compute adds, as a share of its own: both want multiprocessors and memory.
    hiding
        Share of the compute beside which collectives can run.
    """

    matrix_bf16: float = 0.69
    matrix_fp8: float = 0.70
    attention_hopper: float = 0.23
    attention_elsewhere: float = 0.30
    passes_width: float = 13.5
    passes_inner: float = 3.4
    passes_fp8_width: float = 28
    passes_fp8_inner: float = 14
    passes_kernels_width: float = 62
    passes_logits: float = 8
    update_bytes: float = 38
    update_bandwidth: float = 0.85
    step_seconds: float = 1e-3
    eager_layer_seconds: float = 4e-3
    graph_layer_seconds: float = 1e-3
    sharded_layer_seconds: float = 0.3e-3
    link_share: float = 0.2
    network_share: float = 0.7
    hop_seconds: float = 10e-6
    slowing: float = 0.35
    hiding: float = 0.9


FITTED = Rates()
