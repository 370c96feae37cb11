"""Choice of the kernels that exist twice: for all machines in PyTorch, and for BF16 on GPUs in Triton."""

import torch

from geneformer_pretrain.config.schema import Config, Kernel
from geneformer_pretrain.errors import ConfigError
from modeling_bert_te import Attention, FlashAttention, FusedKernels

CAPABILITY = (9, 0)
"""Compute capability from which GPUs have the copy engine that Triton's kernels need."""
SMALLER_SHARED_MEMORY = (11, 0)
"""Compute capability from which a multiprocessor has no room for a block of the fused kernels' products."""
MAX_WIDTH, MAX_VOCABULARY = 4096, 2**16
"""Largest hidden size and vocabulary of the fused kernels: a row has to fit into the registers of one program."""
OFFSETS = 2**31
"""Elements of a tensor that the kernels' 32-bit offsets tell apart."""
WIDTH_MULTIPLE = 8
"""Of which the fused kernels need the widths of a layer: the copy engine knows rows of whole 16 bytes."""


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


def general_obstacles(
    config: Config, device: torch.device, compute_dtype: torch.dtype, elements_per_token: int
) -> list[str]:
    """What keeps Triton's kernels from running on this machine, or on micro-batches of this size."""
    if device.type != "cuda":
        return ["needs a GPU"]
    obstacles = []
    tokens, most = config.model.micro_batch_size * config.model.seq_length, (OFFSETS - 1) // elements_per_token
    if tokens > most:
        obstacles.append(f"knows micro-batches up to {most:,} tokens, not {tokens:,}")
    if compute_dtype != torch.bfloat16:
        obstacles.append("needs training.compute_dtype=bfloat16")
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        obstacles.append(f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")
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
    obstacles = general_obstacles(config, device, compute_dtype, 3 * config.model.hidden_size)
    if head_size not in (16, 32, 64, 128):
        obstacles.append(f"knows head sizes 16, 32, 64 and 128, not {head_size}")
    # With heads of 128 the kernels run but spill registers.
    tuned = is_hopper(device) and head_size <= 64
    if takes_triton("model.attention_kernel", config.model.attention_kernel, obstacles, tuned):
        from geneformer_pretrain.kernels.adapters import TritonAttention

        return TritonAttention()
    return FlashAttention()


def choose_fused(config: Config, device: torch.device, compute_dtype: torch.dtype) -> FusedKernels | None:
    """What `model.fused_kernels` asks for, or what is expected to be faster; None for PyTorch's operations.

    Raises
    ------
    ConfigError
        Triton's kernels asked for where they do not run.
    """
    obstacles = general_obstacles(config, device, compute_dtype, config.model.hidden_size)
    for name, most in (("hidden_size", MAX_WIDTH), ("vocab_size", MAX_VOCABULARY)):
        value = getattr(config.model, name)
        if value > most:
            obstacles.append(f"knows model.{name} up to {most:,}, not {value:,}")
    if not obstacles and torch.cuda.get_device_capability(device) >= SMALLER_SHARED_MEMORY:
        obstacles.append("needs the shared memory of compute capability 9 or 10")
    for name in ("hidden_size", "intermediate_size"):
        value = getattr(config.model, name)
        if value % WIDTH_MULTIPLE:
            obstacles.append(f"knows multiples of {WIDTH_MULTIPLE} as model.{name}, not {value:,}")
    if takes_triton("model.fused_kernels", config.model.fused_kernels, obstacles, is_hopper(device)):
        from geneformer_pretrain.kernels.adapters import TritonFused

        return TritonFused()
    return None
