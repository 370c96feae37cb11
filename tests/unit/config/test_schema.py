"""Every configuration composes, trains and exports; every mistake is named with its remedy."""

import inspect
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from geneformer_pretrain.config.compose import CONFIG_DIR, load_config
from geneformer_pretrain.config.data import DataConfig
from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.config.training import TrainingConfig
from geneformer_pretrain.data.dataset import check_vocabulary
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model import precision
from geneformer_pretrain.model.precision import check_machine
from geneformer_pretrain.training.main import run
from tests.tiny import (
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    read_exit,
    read_metrics,
    tiny_config,
)

PATH = re.compile(r"(^|_)(path|dir)$")
NAMES = ("l0_sanity", "10m", "106m", "4b", "v2_104m", "v2_316m")


def test_the_configurations_are_all_listed_here():
    runs = {path.stem for path in CONFIG_DIR.glob("*.yaml")} - {"defaults"}
    assert runs == set(NAMES)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "feed_forward", "heads"),
    [
        ("l0_sanity", 6, 256, 512, 4),
        ("10m", 6, 256, 512, 4),
        ("106m", 12, 768, 3072, 12),
        ("4b", 36, 2560, 10240, 40),
    ],
)
def test_architectures(name, layers, hidden, feed_forward, heads):
    model = load_config(name).model
    assert (model.num_hidden_layers, model.hidden_size) == (layers, hidden)
    assert (model.intermediate_size, model.num_attention_heads) == (feed_forward, heads)
    assert (model.vocab_size, model.max_position_embeddings) == (25426, 2048)
    assert model.seq_length == (512 if name == "l0_sanity" else 2048)
    assert (model.hidden_act, model.hidden_dropout_prob, model.attention_probs_dropout_prob) == (
        "relu",
        0.02,
        0.02,
    )
    assert (model.layer_norm_eps, model.initializer_range, model.pad_token_id) == (1e-12, 0.02, 0)
    assert (model.use_te_layers, load_config(name).training.use_fp8) == (False, name == "4b")


def test_contract_defaults():
    training = load_config("10m").training
    assert (training.learning_rate, training.mlm_probability, training.num_workers) == (1e-4, 0.15, 4)
    assert (training.save_every_minutes, training.save_every_n_steps) == (15, None)
    assert load_config("l0_sanity").training.save_every_n_steps == 50
    assert training.resume_from_checkpoint
    assert not any((training.use_fp8, training.use_nvfsdp, training.use_fsdp2))
    assert set(training.wandb_init_args) == {"name", "project"}


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_trains_two_steps_and_exports(name, tmp_path):
    config = tiny_config(tmp_path, name=name)
    assert run(config) == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert read_exit(tmp_path / "run") == {"reason": "completed", "exit_code": 0, "step": 2}
    exported = BertForMaskedLM.from_pretrained(tmp_path / "run/final_model")
    assert exported.config.hidden_size == 32


def test_every_key_has_a_description():
    for group in (ModelConfig, TrainingConfig, DataConfig):
        source = Path(str(inspect.getsourcefile(group)))
        body = source.read_text().split(f"class {group.__name__}:")[1].split("def __post_init__")[0]
        for field in fields(group):
            assert re.search(rf'    {field.name}: .*\n    """.+', body), f"{group.__name__}.{field.name}"


MISTAKES = [
    ("model.hiden_size=64", r"Unknown configuration key model\.hiden_size: did you mean model\.hidden_size\?"),
    ("+model.hiden_size=64", r"did you mean model\.hidden_size\?"),
    ("training.vocab_size=64", r"did you mean model\.vocab_size\? docs/configuration.md lists all keys"),
    ("+training.lr=1e-3", r"Unknown configuration key training\.lr: .* docs/configuration.md lists all keys"),
    ("+trainig.lr=1e-3", "Unknown configuration key trainig"),
    ("+trainig={lr: 1}", r"Unknown configuration key trainig: did you mean training\?"),
    ("+model={hiden_size: 64}", r"Unknown configuration key model\.hiden_size: did you mean model\.hidden_size\?"),
    ("model.hidden_size=wide", "model.hidden_size"),
    ("training.learning_rate=fast", "training.learning_rate"),
    ("training.use_fp8=perhaps", "training.use_fp8"),
    ("training.lr_schedule=step", "training.lr_schedule.*constant, linear, cosine"),
    ("training.compute_dtype=float16", "training.compute_dtype.*auto, float32, bfloat16"),
    ("training.num_train_steps=???", "training.num_train_steps"),
    ("training.wandb_init_args.name=???", r"training\.wandb_init_args\.name"),
    ("data.path=null", "data.path"),
    ("data.path=", "data.path.*parquet"),
    ("model.hidden_size=250", r"model\.hidden_size \(250\).*model\.num_attention_heads \(4\)"),
    ("model.seq_length=4096", r"model\.seq_length \(4096\) exceeds model\.max_position_embeddings \(2048\)"),
    ("model.hidden_act=rellu", "model.hidden_act.*'rellu'.*relu"),
    ("model.hidden_act=prelu", "model.hidden_act=prelu has trainable parameters"),
    ("model.model_type=gpt2", "model.model_type"),
    ("model.num_hidden_layers=0", "model.num_hidden_layers is 0; it must be positive"),
    ("model.hidden_dropout_prob=1", "model.hidden_dropout_prob"),
    ("model.pad_token_id=-1", "model.pad_token_id"),
    ("model.pad_token_id=5", "model.pad_token_id.*data.num_special_tokens"),
    ("model.seq_length=100", "model.micro_batch_size.*model.seq_length.*128"),
    ("training.num_train_steps=-1", "training.num_train_steps"),
    ("training.learning_rate=-1", "training.learning_rate"),
    ("training.learning_rate=.nan", "training.learning_rate"),
    ("training.mlm_probability=15", "training.mlm_probability"),
    ("training.adam_beta2=1.0", "training.adam_beta2"),
    ("training.keep_last_n=0", "training.keep_last_n"),
    ("training.reshard_after_forward=false", "training.reshard_after_forward=False.*training.use_fsdp2=True"),
    ("training.shard_group_size=8", "training.shard_group_size is 8.*training.use_fsdp2=True"),
    ("training.recompute_every_n_layers=-1", "training.recompute_every_n_layers"),
    ("data.mask_token_id=2", "data.mask_token_id.*data.num_special_tokens"),
    ("data.num_special_tokens=30000", "data.num_special_tokens.*model.vocab_size"),
    ("data.max_cells_per_pack=0", "data.max_cells_per_pack"),
]


FP8_MISTAKES = [
    ("training.fp8_recipe=current", "training.fp8_recipe=current needs model.use_te_layers=True"),
    ("model.hidden_act=gelu", "needs model.hidden_act=relu, not gelu"),
    ("data.packing=false", "needs data.packing=True"),
]


@pytest.mark.parametrize(("override", "message"), FP8_MISTAKES, ids=[override for override, _ in FP8_MISTAKES])
def test_what_fp8_of_pytorch_layers_needs(override, message):
    assert load_config("l0_sanity", ["training.use_fp8=true"]).fp8_by_kernels
    with pytest.raises(ConfigError, match=message):
        load_config("l0_sanity", ["training.use_fp8=true", override])
    load_config("l0_sanity", ["training.use_fp8=true", "model.use_te_layers=true", override])


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config("l0_sanity", [override])


def test_an_unknown_configuration_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"Unknown configuration '11m'.* has 106m, 10m, 4b, l0_sanity"):
        load_config("11m")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.use_nvfsdp=true", "training.use_fsdp2=true"],
            "training.use_nvfsdp and training.use_fsdp2",
        ),
        (["training.validate_every_n_steps=5"], r"validate_every_n_steps is 5.*set data\.validation_path.*steps=0"),
        (["training.compile=true", "data.packing=false"], "training.compile=True needs data.packing=True"),
    ],
)
def test_impossible_combinations(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("l0_sanity", overrides)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home_of_mine")
    paths = [f"{group}.{name}" for group, keys in asdict(load_config()).items() for name in keys if PATH.search(name)]
    assert len(paths) == 5  # and training.init_from and data.gene_set, which have other names
    config = asdict(load_config(overrides=[f"{key}='~/x'" for key in paths]))
    assert {config[key.split(".")[0]][key.split(".")[1]] for key in paths} == {"/home_of_mine/x"}
    assert load_config().data.validation_path is None


def on_gpu(monkeypatch, capability, te=True):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(precision, "find_spec", lambda name: object() if te else None)
    return torch.device("cuda", 0)


def test_fp8_needs_a_capable_gpu(monkeypatch):
    config = load_config("4b")
    with pytest.raises(ConfigError, match=r"use_fp8=True needs compute capability 8\.9.*Some GPU has 8\.0"):
        check_machine(config, on_gpu(monkeypatch, (8, 0)))
    check_machine(config, on_gpu(monkeypatch, (8, 9)))
    check_machine(config, on_gpu(monkeypatch, (9, 0)))


def test_te_layers_need_transformer_engine_and_a_gpu(monkeypatch):
    config = load_config("4b", ["model.use_te_layers=true"])
    gpu = on_gpu(monkeypatch, (9, 0), te=False)
    with pytest.raises(
        ConfigError, match=r"not installed.*set model\.use_te_layers=False .*off Hopper GPUs training\.use_fp8=False"
    ):
        check_machine(config, gpu)
    on_gpu(monkeypatch, (9, 0))
    in_bf16 = load_config("4b", ["model.use_te_layers=true", "training.use_fp8=false"])
    with pytest.raises(
        ConfigError, match=r"model\.use_te_layers=True needs a CUDA GPU.*set model\.use_te_layers=False"
    ):
        check_machine(in_bf16, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs a CUDA GPU.*use_te_layers=False .*training\.use_fp8=False"):
        check_machine(config, torch.device("cpu"))
    check_machine(config, gpu)
    check_machine(load_config("10m"), torch.device("cpu"))


def test_nvfsdp_needs_cuda_and_a_known_release(monkeypatch):
    config = load_config("10m", ["training.use_nvfsdp=true"])
    with pytest.raises(ConfigError, match=r"training\.use_nvfsdp=True needs CUDA.*training\.use_fsdp2=True"):
        check_machine(config, torch.device("cpu"))
    gpu = on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(precision.metadata, "version", {"megatron-fsdp": "0.7.0"}.__getitem__)
    with pytest.raises(ConfigError, match=r"made for megatron-fsdp 0\.6\.x.*0\.7\.0 is installed.*use_fsdp2=True"):
        check_machine(config, gpu)
    monkeypatch.setattr(precision.metadata, "version", {"megatron-fsdp": "0.6.1"}.__getitem__)
    check_machine(config, gpu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tokens: tokens[:-1],
            r"vocab\.txt has 100 tokens, model\.vocab_size is 101; .* set model\.vocab_size=100 if",
        ),
        (
            lambda tokens: [*tokens[:-1], tokens[7]],
            r"vocab\.txt lists the token 'gene_7' in line 8 and in line 101; correct",
        ),
        (
            lambda tokens: tokens[::-1],
            r"line 1: 'gene_100' where model\.pad_token_id=0 expects <pad>; set model\.pad_token_id=100, or",
        ),
        (
            lambda tokens: [tokens[0], "x", *tokens[2:]],
            r"line 2: 'x' where data\.mask_token_id=1 expects <mask>; name another file",
        ),
        (lambda tokens: [*tokens, ""], r"vocab\.txt, line 102 is empty; each line is a token"),
    ],
)
def test_bad_vocabulary_files(tmp_path, change, message):
    tokens = ["<pad>", "<mask>", *(f"gene_{i}" for i in range(2, 101))]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n")
    config = tiny_config(tmp_path, f"data.vocab_path={path}")
    found = check_vocabulary(config)
    assert len(found) == 32
    path.write_text("\r\n".join(tokens), encoding="utf-8-sig")  # as some editors save it
    assert check_vocabulary(config) == found
    path.write_text("\n".join([*tokens[:-1], "gene_x"]))
    assert check_vocabulary(config) != found
    path.write_text("\n".join(change(tokens)) + "\n")
    with pytest.raises(ConfigError, match=f"^data.vocab_path: .*{message}"):
        check_vocabulary(config)


def test_missing_vocabulary_file(tmp_path):
    config = tiny_config(tmp_path)
    config = replace(config, data=replace(config.data, vocab_path="none.txt"))
    with pytest.raises(ConfigError, match=r"data\.vocab_path: no file none\.txt"):
        check_vocabulary(config)
