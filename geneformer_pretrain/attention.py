"""Choice of the self-attention kernel."""

from typing import TYPE_CHECKING

import torch

from modeling_bert_te import Attention, FlashAttention

from .config import AttentionKernel, Config, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class TritonAttention:
    """The Triton kernels of `triton_attention`."""

    def __init__(self) -> None:
        from . import triton_attention  # Triton is not there on every platform

        self.kernels = triton_attention

    def plan(self, cu_seqlens: "Tensor", max_seqlen: int, num_tokens: int) -> "Tensor":
        """The list of tiles."""
        return self.kernels.tile_list(cu_seqlens, num_tokens)

    def __call__(self, qkv: "Tensor", plan: "Tensor", dropout: float) -> "Tensor":
        """[T, 3, A, D] -> [T, A, D]; the seed of dropout is drawn from the device's default generator."""
        seed = torch.randint(2**31, (1,), device=qkv.device)
        return self.kernels.packed_attention(qkv, plan, seed, dropout)[0]


def choose_attention(config: Config, device: torch.device, compute_dtype: torch.dtype) -> Attention:
    """The kernel that the configuration asks for, or the one expected to be faster.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    head_size = config.model.hidden_size // config.model.num_attention_heads
    kernel = config.model.attention_kernel
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    obstacle = None
    if device.type != "cuda":
        obstacle = "needs a GPU"
    elif compute_dtype != torch.bfloat16:
        obstacle = "needs training.compute_dtype=bfloat16"
    elif capability < (8, 0):
        obstacle = "needs compute capability 8.0"
    elif head_size not in (16, 32, 64, 128):
        obstacle = f"knows head sizes 16, 32, 64 and 128, not {head_size}"
    if kernel is AttentionKernel.triton and obstacle is not None:
        raise ConfigError(f"model.attention_kernel=triton {obstacle}; set model.attention_kernel=torch.")
    # Elsewhere than on Hopper, and with heads of 128, the kernels run but spill registers.
    shines = obstacle is None and capability[0] == 9 and head_size <= 64
    if kernel is AttentionKernel.triton or (kernel is AttentionKernel.auto and shines):
        return TritonAttention()
    return FlashAttention()
