"""Files of a gene set from which `transformers.AutoTokenizer` loads: a word for each gene id."""

import json
from pathlib import Path

ROLES = {"<pad>": "pad_token", "<mask>": "mask_token", "<cls>": "cls_token", "<eos>": "eos_token"}
"""Special tokens with a role in transformers, and its name there."""


def write_tokenizer_files(folder: Path, tokens: list[str], max_tokens: int) -> None:
    """Write `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`.

    The tokenizer splits a text at spaces; each word is a gene id. With `<cls>` and `<eos>` it puts them around. A word
    that is no token raises an error in place of becoming another token.
    """
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    special = {token: place for place, token in enumerate(tokens) if token in ROLES}
    added = [
        {"id": place, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, place in special.items()
    ]
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": _frame(special) if "<cls>" in special else None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: place for place, token in enumerate(tokens)},
            "unk_token": "<no such token>",
        },
    }
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{ROLES[token]: token for token in special},
    }
    for name, content in (("tokenizer.json", description), ("tokenizer_config.json", configuration)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _frame(special: dict[str, int]) -> dict[str, object]:
    """Describe the post-processor that puts `<cls>` in front and `<eos>` behind."""

    def token(name: str) -> dict[str, object]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    cell = [token("<cls>"), {"Sequence": {"id": "A", "type_id": 0}}, token("<eos>")]
    pair = [*cell, {"Sequence": {"id": "B", "type_id": 0}}, token("<eos>")]
    return {
        "type": "TemplateProcessing",
        "single": cell,
        "pair": pair,
        "special_tokens": {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in ("<cls>", "<eos>")},
    }
