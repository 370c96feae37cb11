"""Selects the kernels that exist twice: in PyTorch for all machines, and in Triton for BF16 on GPUs from Hopper on."""

import torch

from geneformer_pretrain.config.model import Kernel, ModelConfig
from geneformer_pretrain.errors import ConfigError
from modeling_bert_te import Attention, FlashAttention, FusedKernels

MIN_CAPABILITY = (9, 0)
"""Compute capability from which GPUs have the copy engine (TMA) that Triton's kernels need."""
SMALLER_SHARED_MEMORY = (11, 0)
"""Compute capability from which a multiprocessor has no room for a block of the fused kernels' products."""
MAX_WIDTH, MAX_VOCABULARY = 4096, 2**16
"""Largest hidden size and vocabulary of the fused kernels: a row has to fit into the registers of one program."""
MAX_OFFSET = 2**31 - 1
"""Largest number of elements in a tensor: the kernels' offsets are 32-bit integers."""
WIDTH_MULTIPLE = 8
"""Layer widths must be multiples of this: TMA loads rows in units of 16 bytes."""
FP8_WIDTH_MULTIPLE = 16
"""The same for FP8."""
FLASH_HEAD_SIZES = range(8, 257, 8)
"""Head sizes of PyTorch's FlashAttention."""


def attention(kernel: Kernel) -> Attention:
    """Make the attention of a resolved choice."""
    if kernel is Kernel.triton:
        from geneformer_pretrain.kernels.adapters import TritonAttention

        return TritonAttention()
    return FlashAttention()


def fused_kernels(kernel: Kernel) -> FusedKernels | None:
    """Make the fused element-wise kernels of a resolved choice; None for PyTorch's operations."""
    if kernel is Kernel.triton:
        from geneformer_pretrain.kernels.adapters import TritonFused

        return TritonFused()
    return None


def use_triton_attention(model: ModelConfig, device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Decide whether attention runs in Triton: as `model.attention_kernel` says, or where it is faster.

    Raises
    ------
    ConfigError
        Kernels asked for where they do not run, or a head size that no kernel of this machine takes.
    """
    head_size = model.hidden_size // model.num_attention_heads
    unsupported = _unsupported(model, device, compute_dtype, 3 * model.hidden_size)
    if head_size not in (16, 32, 64, 128):
        unsupported.append(f"supports head sizes 16, 32, 64 and 128, not {head_size}")
    # With heads of 128 the kernels run but spill registers.
    tuned = is_hopper(device) and head_size <= 64
    chosen = _use_triton("model.attention_kernel", model.attention_kernel, unsupported, tuned)
    if not chosen and device.type == "cuda" and compute_dtype != torch.float32 and head_size not in FLASH_HEAD_SIZES:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} and model.num_attention_heads={model.num_attention_heads} make "
            f"heads of size {head_size}; PyTorch's FlashAttention needs multiples of 8 up to 256. Change one of them, "
            "or set training.compute_dtype=float32."
        )
    return chosen


def use_triton_fused(model: ModelConfig, device: torch.device, compute_dtype: torch.dtype, fp8: bool = False) -> bool:
    """Decide whether the fused element-wise kernels are used: as `model.fused_kernels` says, or where they are faster.

    FP8 of PyTorch layers is theirs: with `fp8` they are used wherever they run.

    Raises
    ------
    ConfigError
        Kernels asked for where they do not run, FP8 included.
    """
    # In FP8 the gradient of query, key and value is cast in one piece.
    unsupported = _unsupported(model, device, compute_dtype, (3 if fp8 else 1) * model.hidden_size)
    for name, most in (("hidden_size", MAX_WIDTH), ("vocab_size", MAX_VOCABULARY)):
        value = getattr(model, name)
        if value > most:
            unsupported.append(f"supports model.{name} up to {most:,}, not {value:,}")
    if not unsupported and torch.cuda.get_device_capability(device) >= SMALLER_SHARED_MEMORY:
        unsupported.append("needs the shared memory of compute capability 9 or 10")
    for name in ("hidden_size", "intermediate_size"):
        value = getattr(model, name)
        multiple = FP8_WIDTH_MULTIPLE if fp8 else WIDTH_MULTIPLE
        if value % multiple:
            unsupported.append(f"supports multiples of {multiple} as model.{name}, not {value:,}")
    if fp8:
        if model.fused_kernels is Kernel.torch:
            unsupported.insert(0, "needs model.fused_kernels=auto or triton")
        if unsupported:
            raise ConfigError(
                f"training.use_fp8=true with PyTorch layers {unsupported[0]}; set model.use_te_layers=true for "
                "Transformer Engine's, or training.use_fp8=false for BF16."
            )
        return True
    return _use_triton("model.fused_kernels", model.fused_kernels, unsupported, is_hopper(device))


def _use_triton(key: str, choice: Kernel, unsupported: list[str], tuned: bool) -> bool:
    """Decide between Triton and PyTorch from the reasons against it and from where it was tuned."""
    if choice is Kernel.triton and unsupported:
        raise ConfigError(f"{key}=triton {unsupported[0]}; set {key}=torch.")
    return choice is Kernel.triton or (choice is Kernel.auto and tuned and not unsupported)


def _unsupported(
    model: ModelConfig, device: torch.device, compute_dtype: torch.dtype, elements_per_token: int
) -> list[str]:
    """List the reasons why Triton's kernels cannot run on this machine, or on micro-batches of this size."""
    if device.type != "cuda":
        return ["needs a GPU"]
    reasons = []
    most = MAX_OFFSET // elements_per_token
    if model.token_budget > most:
        reasons.append(f"supports micro-batches up to {most:,} tokens, not {model.token_budget:,}")
    if compute_dtype != torch.bfloat16:
        reasons.append("needs training.compute_dtype=bfloat16")
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        reasons.append(f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}")
    return reasons


def is_hopper(device: torch.device) -> bool:
    """True for the kind of GPU that the kernels were tuned on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
