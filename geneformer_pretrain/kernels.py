"""Choice of the kernels that exist twice: for all machines in PyTorch, and for BF16 on GPUs in Triton."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from modeling_bert_te import Attention, FlashAttention, FusedKernels, LinearReLU

from .config import Config, ConfigError, Kernel

if TYPE_CHECKING:
    from torch import Tensor


MAX_WIDTH, MAX_VOCABULARY = 4096, 2**16
"""Largest hidden size and vocabulary of the fused kernels: a row has to fit into the registers of one program."""


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
        return self.kernels.packed_attention(qkv, plan, draw_seed(qkv.device), dropout)[0]


class TritonFused:
    """The Triton kernels of `triton_norm` and `triton_linear`.

    Parameters
    ----------
    in_place
        Whether linear layers may add gradients of residual connections in place. Not under sharding engines: what
        FSDP2's hooks hand to layers are views, which the compiler then takes to be modified.
    """

    def __init__(self, in_place: bool) -> None:
        from . import triton_linear, triton_norm

        self.in_place = in_place

        self.norm, self.linears = triton_norm, triton_linear

    def residual_norm(
        self,
        x: "Tensor",
        b: "Tensor | None",
        residual: "Tensor",
        weight: "Tensor",
        bias: "Tensor",
        eps: float,
        dropout: float,
    ) -> "Tensor":
        """See `modeling_bert_te.FusedKernels`; the seed of dropout is drawn as for attention."""
        return self.norm.residual_norm(x, b, residual, weight, bias, draw_seed(x.device), eps, dropout)[0]

    def linear(self, x: "Tensor", weight: "Tensor", bias: "Tensor", relu: bool) -> "tuple[Tensor, Tensor]":
        """See `modeling_bert_te.FusedKernels`."""
        if not self.in_place:
            return LinearReLU.apply(x, weight, bias) if relu else F.linear(x, weight, bias), x
        return self.linears.LinearBesideResidual.apply(x, weight, bias, relu)

    def linear_cross_entropy(self, x: "Tensor", weight: "Tensor", bias: "Tensor", labels: "Tensor") -> "Tensor":
        """See `modeling_bert_te.FusedKernels`."""
        return self.linears.linear_cross_entropy(x, weight, bias, labels)


def draw_seed(device: torch.device) -> "Tensor":
    """A seed for a kernel, from the device's default generator: int64 [1]."""
    return torch.randint(2**31, (1,), device=device)


def takes_triton(key: str, choice: Kernel, obstacles: list[str], tuned: bool) -> bool:
    """Whether a choice means Triton's kernels.

    Parameters
    ----------
    key
        Of the choice in the configuration.
    obstacles
        What keeps them from running, in words that follow the key and its value.
    tuned
        Whether they are expected to be faster.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    if choice is Kernel.triton and obstacles:
        raise ConfigError(f"{key}=triton {obstacles[0]}; set {key}=torch.")
    return choice is Kernel.triton or (choice is Kernel.auto and tuned and not obstacles)


def machine_obstacles(device: torch.device, compute_dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """What keeps Triton's kernels, which need this compute capability, from running on this machine."""
    if device.type != "cuda":
        return ["needs a GPU"]
    obstacles = []
    if compute_dtype != torch.bfloat16:
        obstacles.append("needs training.compute_dtype=bfloat16")
    if torch.cuda.get_device_capability(device) < capability:
        obstacles.append(f"needs compute capability {capability[0]}.{capability[1]}")
    return obstacles


def is_hopper(device: torch.device) -> bool:
    """Whether this is the kind of GPU that the kernels were tuned on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def choose_attention(config: Config, device: torch.device, compute_dtype: torch.dtype) -> Attention:
    """The attention that `model.attention_kernel` asks for, or the one expected to be faster.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    head_size = config.model.hidden_size // config.model.num_attention_heads
    obstacles = machine_obstacles(device, compute_dtype, (9, 0))  # without Hopper's copy engine they crawl
    if head_size not in (16, 32, 64, 128):
        obstacles.append(f"knows head sizes 16, 32, 64 and 128, not {head_size}")
    # With heads of 128 the kernels run but spill registers.
    tuned = is_hopper(device) and head_size <= 64
    if takes_triton("model.attention_kernel", config.model.attention_kernel, obstacles, tuned):
        return TritonAttention()
    return FlashAttention()


def choose_fused(config: Config, device: torch.device, compute_dtype: torch.dtype) -> FusedKernels | None:
    """What `model.fused_kernels` asks for, or what is expected to be faster; None for PyTorch's operations.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    obstacles = machine_obstacles(device, compute_dtype, (8, 0))
    for name, most in (("hidden_size", MAX_WIDTH), ("vocab_size", MAX_VOCABULARY)):
        value = getattr(config.model, name)
        if value > most:
            obstacles.append(f"knows model.{name} up to {most:,}, not {value:,}")
    if takes_triton("model.fused_kernels", config.model.fused_kernels, obstacles, is_hopper(device)):
        return TritonFused(in_place=not (config.training.use_fsdp2 or config.training.use_nvfsdp))
    return None
