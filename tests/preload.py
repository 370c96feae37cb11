"""Imported once, by the process that ranks are forked from: loads what each of them would otherwise load."""

import tempfile
from pathlib import Path

import hypothesis  # noqa: F401
import transformers

import geneformer_pretrain.distributed.engines
import geneformer_pretrain.training.main  # noqa: F401
import tests.faults.injections  # noqa: F401
from geneformer_pretrain.data.batch import build_batches
from geneformer_pretrain.data.dataset import open_training_data
from tests.tiny import tiny_config

transformers.BertForMaskedLM  # noqa: B018 - imported at its first use, as by many modules of tests

with tempfile.TemporaryDirectory() as folder:
    # Loading numba's compiled functions takes longest.
    source = open_training_data(tiny_config(Path(folder)), is_main=False, pin_memory=False)
    stream = source.stream()
    stream.plan(0)
    list(build_batches(source.builder(), stream, [0]))
