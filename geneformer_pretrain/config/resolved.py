"""The choices that a run made where its configuration says `auto` or `null`, or nothing."""

from dataclasses import asdict, dataclass
from typing import Any

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.training import ComputeDtype


@dataclass(frozen=True)
class Resolved:
    """Every `auto` of a configuration, decided for one machine; `model.resolve` decides.

    Attributes
    ----------
    compute_dtype
        float32 or bfloat16.
    compile
        Whether blocks are compiled, which needs constant shapes.
    cuda_graphs
        Whether micro-batches are replayed as CUDA graphs.
    reshard_after_forward
        Whether a sharding engine frees gathered weights between forward and backward.
    attention_kernel, fused_kernels
        triton or torch; they draw dropout in different ways.
    world_size
        Number of ranks.
    device
        Name of the GPU, or cpu.
    cuda, triton
        Versions, or none.
    """

    compute_dtype: ComputeDtype
    compile: bool
    cuda_graphs: bool
    reshard_after_forward: bool
    attention_kernel: Kernel
    fused_kernels: Kernel
    world_size: int
    device: str
    cuda: str
    triton: str

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.compute_dtype is ComputeDtype.float32 else 2

    def values(self) -> dict[str, Any]:
        """Return the choices as plain values, for config.yaml and for comparison between ranks."""
        return {name: value.value if hasattr(value, "value") else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values().items())
