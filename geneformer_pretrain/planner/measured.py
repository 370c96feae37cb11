"""GPUs and the steps that were measured on them, from `data.json`."""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError

LAYERS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
"""Keys of `model` that decide what a layer computes."""


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet, with the memory that PyTorch reports of it.

    Attributes
    ----------
    memory_gib
        GiB that a process may use.
    bf16_tflops, fp8_tflops
        Dense matrix products; None where there are none in that precision.
    memory_tbps
        Memory bandwidth in TB/s.
    link_gbps
        Bandwidth between GPUs of one node in GB/s, both directions together.
    capability
        CUDA compute capability.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_tbps: float
    link_gbps: float
    capability: float

    @property
    def is_hopper(self) -> bool:
        """True for the kind of GPU that the project's kernels were tuned on."""
        return 9 <= self.capability < 10


@dataclass(frozen=True)
class Measurement:
    """One measured run.

    Attributes
    ----------
    model
        Name of its architecture in `data.json`.
    lengths
        lognormal: exp(N(ln 900, 0.557)) in [200, 2048]. genecorpus: exp(N(ln 255, 1.41)) in [16, 2048].
    step_ms, memory_gib
        Median step and peak memory, None where not measured.
    outdated
        True where kernels or engines have become faster since: its time is no guide.
    """

    date: str
    gpu: str
    gpus: int
    model: str
    engine: str
    use_te_layers: bool
    use_fp8: bool
    micro_batch_size: int
    recompute_every_n_layers: int
    reshard_after_forward: bool
    lengths: str
    step_ms: float | None
    memory_gib: float | None
    outdated: bool
    source: str

    @property
    def architecture(self) -> dict[str, Any]:
        """Keys of `model` with this run's values."""
        values: dict[str, Any] = _data()["architectures"][self.model]
        return values

    def applied_to(self, config: Config) -> Config:
        """Return this run's configuration: its model, shape, engine and precision, the rest as in `config`.

        All measured runs had CUDA graphs and kernels as `auto` chooses them.
        """
        model = replace(
            config.model,
            **self.architecture,
            micro_batch_size=self.micro_batch_size,
            use_te_layers=self.use_te_layers,
            attention_kernel=Kernel.auto,
            fused_kernels=Kernel.auto,
        )
        training = replace(
            config.training,
            use_fp8=self.use_fp8,
            use_fsdp2=self.engine == "fsdp2",
            use_nvfsdp=self.engine == "nvfsdp",
            reshard_after_forward=self.reshard_after_forward if self.engine != "ddp" else None,
            shard_group_size=None,
            gradient_accumulation_steps=1,
            recompute_every_n_layers=self.recompute_every_n_layers,
            cuda_graphs=None,
        )
        return replace(config, model=model, training=training)

    def __str__(self) -> str:
        tokens = self.micro_batch_size * self.architecture["seq_length"]
        engine = "" if self.gpus == 1 else f", {self.engine}"
        return f"{self.date}, {self.model} on {self.gpus} x {self.gpu}{engine}, {tokens:,} tokens a GPU ({self.source})"


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_name("data.json").read_text())
    return data


@cache
def measurements() -> list[Measurement]:
    """Return all measured runs, oldest first."""
    return sorted((Measurement(**row) for row in _data()["measurements"]), key=lambda row: row.date)


def card(name: str) -> Card:
    """Return a GPU by its short name.

    Raises
    ------
    ConfigError
        Listing the names that exist.
    """
    cards = _data()["cards"]
    if name.lower() not in cards:
        raise ConfigError(f"--gpu {name}: not among the GPUs that are known: {', '.join(cards)}.")
    return Card(**cards[name.lower()])


def card_of_device(device: str) -> Card | None:
    """Return a GPU by the name that its driver gives it; None if it is not known."""
    name = _data()["devices"].get(device)
    return None if name is None else card(name)


def measured_like(config: Config, gpu: str) -> list[Measurement]:
    """Return measured steps of the same layers in the same precision on the same GPU, oldest first.

    What a configuration is called does not matter, and its vocabulary and longest cell may differ.
    """
    return [
        row
        for row in measurements()
        if all(row.architecture[key] == getattr(config.model, key) for key in LAYERS)
        and row.gpu == gpu
        and row.step_ms is not None
        and not row.outdated
        and (row.use_te_layers, row.use_fp8) == (config.model.use_te_layers, config.training.use_fp8)
    ]
