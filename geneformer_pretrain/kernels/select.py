"""Choice of the kernels that exist twice: in PyTorch for all machines, and in Triton for BF16 on GPUs."""

import torch

from geneformer_pretrain.config.schema import Config, Kernel
from geneformer_pretrain.errors import ConfigError, require
from modeling_bert_te import Attention, FlashAttention, FusedKernels

MIN_CAPABILITY = (9, 0)
"""Compute capability from which GPUs have the copy engine (TMA) that Triton's kernels need."""
SMALLER_SHARED_MEMORY = (11, 0)
"""Compute capability from which a multiprocessor's shared memory is too small for the fused products' blocks."""
MAX_WIDTH, MAX_VOCABULARY = 4096, 2**16
"""Largest hidden size and vocabulary of the fused kernels: a row has to fit into the registers of one program."""
MAX_OFFSET = 2**31 - 1
"""Largest number of elements in a tensor: the kernels' offsets are 32-bit integers."""
WIDTH_MULTIPLE = 8
"""Layer widths must be multiples of this: TMA loads rows in units of 16 bytes."""
TRITON_HEAD_SIZES = (16, 32, 64, 128)
FLASH_HEAD_MULTIPLE, FLASH_MAX_HEAD_SIZE = 8, 256
"""Head sizes of PyTorch's FlashAttention are multiples of the first, up to the second."""


def use_triton(key: str, choice: Kernel, unsupported: list[str], tuned: bool) -> bool:
    """Return True if a choice in the configuration means Triton's kernels.

    Parameters
    ----------
    key
        Name of the choice in the configuration.
    unsupported
        Reasons why they cannot run, in words that follow the key and its value.
    tuned
        True if they are expected to be faster.

    Raises
    ------
    ConfigError
        Triton's kernels are asked for and cannot run.
    """
    if choice is Kernel.triton and unsupported:
        raise ConfigError(f"{key}=triton {unsupported[0]}; set {key}=torch.")
    return choice is Kernel.triton or (choice is Kernel.auto and tuned and not unsupported)


def unsupported_by_triton(
    config: Config, device: torch.device, compute_dtype: torch.dtype, elements_per_token: int
) -> list[str]:
    """Return the reasons why Triton's kernels cannot run on this machine, or on micro-batches of this size."""
    if device.type != "cuda":
        return ["needs a GPU"]
    unsupported = []
    tokens, most = config.model.micro_batch_size * config.model.seq_length, MAX_OFFSET // elements_per_token
    if tokens > most:
        unsupported.append(f"supports micro-batches up to {most:,} tokens, not {tokens:,}")
    if compute_dtype != torch.bfloat16:
        unsupported.append("needs training.compute_dtype=bfloat16")
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        unsupported.append(f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}")
    return unsupported


def is_hopper(device: torch.device) -> bool:
    """Return True on the kind of GPU that the kernels were tuned on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def require_head_size(config: Config, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Check that PyTorch's FlashAttention runs with the model's head size, where it would be used.

    Raises
    ------
    ConfigError
        It would fail in the first step, or be replaced by far slower code.
    """
    heads, width = config.model.num_attention_heads, config.model.hidden_size
    head_size = width // heads
    require(
        device.type != "cuda"
        or compute_dtype == torch.float32
        or (head_size % FLASH_HEAD_MULTIPLE == 0 and head_size <= FLASH_MAX_HEAD_SIZE),
        f"model.hidden_size={width} and model.num_attention_heads={heads} make heads of size {head_size}; PyTorch's "
        f"FlashAttention needs multiples of {FLASH_HEAD_MULTIPLE} up to {FLASH_MAX_HEAD_SIZE}. Change one of them.",
    )


def choose_attention(config: Config, device: torch.device, compute_dtype: torch.dtype) -> Attention:
    """Return the attention that `model.attention_kernel` asks for, or the one expected to be faster.

    Raises
    ------
    ConfigError
        The kernels cannot run on this machine or with this head size.
    """
    head_size = config.model.hidden_size // config.model.num_attention_heads
    unsupported = unsupported_by_triton(config, device, compute_dtype, 3 * config.model.hidden_size)
    if head_size not in TRITON_HEAD_SIZES:
        unsupported.append(f"supports head sizes 16, 32, 64 and 128, not {head_size}")
    # With heads of 128 the kernels run but spill registers.
    tuned = is_hopper(device) and head_size <= 64
    if use_triton("model.attention_kernel", config.model.attention_kernel, unsupported, tuned):
        from geneformer_pretrain.kernels.adapters import TritonAttention

        return TritonAttention()
    require_head_size(config, device, compute_dtype)
    return FlashAttention()


def choose_fused(config: Config, device: torch.device, compute_dtype: torch.dtype) -> FusedKernels | None:
    """Return the fused kernels that `model.fused_kernels` asks for, or that are faster; None for PyTorch's operations.

    Raises
    ------
    ConfigError
        Triton's kernels are asked for and cannot run.
    """
    unsupported = unsupported_by_triton(config, device, compute_dtype, config.model.hidden_size)
    for name, most in (("hidden_size", MAX_WIDTH), ("vocab_size", MAX_VOCABULARY)):
        value = getattr(config.model, name)
        if value > most:
            unsupported.append(f"supports model.{name} up to {most:,}, not {value:,}")
    if not unsupported and torch.cuda.get_device_capability(device) >= SMALLER_SHARED_MEMORY:
        unsupported.append("needs the shared memory of compute capability 9 or 10")
    for name in ("hidden_size", "intermediate_size"):
        value = getattr(config.model, name)
        if value % WIDTH_MULTIPLE:
            unsupported.append(f"supports multiples of {WIDTH_MULTIPLE} as model.{name}, not {value:,}")
    if use_triton("model.fused_kernels", config.model.fused_kernels, unsupported, is_hopper(device)):
        from geneformer_pretrain.kernels.adapters import TritonFused

        return TritonFused()
    return None
