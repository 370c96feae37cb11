"""Choice of the kernels that exist twice: for all machines in PyTorch, and for BF16 on GPUs in Triton."""

from typing import TYPE_CHECKING

import torch

from modeling_bert_te import Attention, FlashAttention, ResidualNorm

from .config import Config, ConfigError, Kernel

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
        return self.kernels.packed_attention(qkv, plan, draw_seed(qkv.device), dropout)[0]


class TritonResidualNorm:
    """The Triton kernels of `triton_norm`."""

    def __init__(self) -> None:
        from . import triton_norm

        self.kernels = triton_norm

    def __call__(
        self, x: "Tensor", residual: "Tensor", weight: "Tensor", bias: "Tensor", eps: float, dropout: float
    ) -> "Tensor":
        """[T, H], [T, H], [H], [H] -> [T, H]; the seed is drawn as for attention."""
        return self.kernels.residual_norm(x, residual, weight, bias, draw_seed(x.device), eps, dropout)[0]


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


def machine_obstacles(device: torch.device, compute_dtype: torch.dtype) -> list[str]:
    """What keeps Triton's kernels from running on this machine."""
    if device.type != "cuda":
        return ["needs a GPU"]
    obstacles = []
    if compute_dtype != torch.bfloat16:
        obstacles.append("needs training.compute_dtype=bfloat16")
    if torch.cuda.get_device_capability(device) < (8, 0):
        obstacles.append("needs compute capability 8.0")
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
    obstacles = machine_obstacles(device, compute_dtype)
    if head_size not in (16, 32, 64, 128):
        obstacles.append(f"knows head sizes 16, 32, 64 and 128, not {head_size}")
    # Elsewhere than on Hopper, and with heads of 128, the kernels run but spill registers.
    tuned = is_hopper(device) and head_size <= 64
    if takes_triton("model.attention_kernel", config.model.attention_kernel, obstacles, tuned):
        return TritonAttention()
    return FlashAttention()


def choose_residual_norm(config: Config, device: torch.device, compute_dtype: torch.dtype) -> ResidualNorm | None:
    """What `model.norm_kernel` asks for, or what is expected to be faster; None for PyTorch's operations.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    obstacles = machine_obstacles(device, compute_dtype)
    if config.model.hidden_size > 4096:
        obstacles.append(f"knows model.hidden_size up to 4,096, not {config.model.hidden_size}")
    # Rows shorter than these are summed up faster by what the compiler makes.
    tuned = is_hopper(device) and config.model.hidden_size >= 768
    if takes_triton("model.norm_kernel", config.model.norm_kernel, obstacles, tuned):
        return TritonResidualNorm()
    return None
