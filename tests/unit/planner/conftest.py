"""Configurations and shorthands for the planner's tests."""

from dataclasses import replace

import pytest

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.planner.lengths import genecorpus
from geneformer_pretrain.planner.measured import card
from geneformer_pretrain.planner.plan import Plan, make_plan
from geneformer_pretrain.planner.speed import Cluster

MODELS = ("10m", "106m", "4b", "v2_104m", "v2_316m")


@pytest.fixture(scope="session")
def configs() -> dict[str, Config]:
    """Return the shipped configurations by name."""
    return {name: load_config(name) for name in MODELS}


def plan(config: Config, *, gpu: str = "h200", gpus: int = 1, **options: float) -> Plan:
    """Plan with Genecorpus's lengths."""
    return make_plan(config, Cluster(gpu, card(gpu), gpus), genecorpus(config.model.seq_length), **options)


def training(config: Config, **values: object) -> Config:
    """Return the configuration with other values under `training`."""
    return replace(config, training=replace(config.training, **values))


def model(config: Config, **values: object) -> Config:
    """Return the configuration with other values under `model`."""
    return replace(config, model=replace(config.model, **values))
