"""Load an export as a user without this project does: `python -I check.py FOLDER` in an environment of its own.

FOLDER holds the export (`model`), `cells.pt` with cells and the outputs that are expected, and, where this version of
transformers is to load it with `modeling_bert_te.py` too, that file.
"""

import sys
from pathlib import Path

import torch
import transformers


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise SystemExit unless the two agree as FP32 does."""
    error = (found - expected).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{name}: off by {error}")
    print(f"  {name}: agrees to {error:.0e}")


@torch.no_grad()
def main(folder: Path) -> None:
    """Compare each class's outputs with those expected."""
    transformers.logging.set_verbosity_error()  # Heads of other tasks are new in each model.
    transformers.logging.disable_progress_bar()
    cells = torch.load(folder / "cells.pt", weights_only=True)
    ids, mask = cells["ids"], cells["mask"]
    valid = mask.bool()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    for kind in (transformers.BertForMaskedLM, transformers.AutoModelForMaskedLM):
        model, info = kind.from_pretrained(folder / "model", output_loading_info=True)
        if info["missing_keys"] or info["unexpected_keys"]:
            raise SystemExit(f"{kind.__name__}: {info}")
        outputs = model.eval()(ids, mask, output_hidden_states=True)
        check(f"{kind.__name__} logits", outputs.logits[valid], cells["logits"][valid])
        check(f"{kind.__name__} second to last layer", outputs.hidden_states[-2][valid], cells["hidden"][valid])
    for kind in (transformers.BertModel, transformers.AutoModel):
        states = kind.from_pretrained(folder / "model").eval()(ids, mask, output_hidden_states=True).hidden_states
        check(f"{kind.__name__} second to last layer", states[-2][valid], cells["hidden"][valid])
    labels = {"num_labels": 3}
    for kind in (transformers.BertForSequenceClassification, transformers.BertForTokenClassification):
        states = kind.from_pretrained(folder / "model", **labels).eval()(ids, mask, output_hidden_states=True)
        check(f"{kind.__name__} second to last layer", states.hidden_states[-2][valid], cells["hidden"][valid])
    if (folder / "modeling_bert_te.py").exists():
        sys.path.insert(0, str(folder))
        from modeling_bert_te import BertForMaskedLM

        for attention in (None, "sdpa", "eager", "flash_attention_2"):
            model = BertForMaskedLM.from_pretrained(folder / "model", attn_implementation=attention)
            check(
                f"modeling_bert_te, attention {attention}",
                model.eval()(ids, mask).logits[valid],
                cells["logits"][valid],
            )
        model.save_pretrained(folder / "saved")
        model = transformers.BertForMaskedLM.from_pretrained(folder / "saved").eval()
        check("saved by modeling_bert_te, stock logits", model(ids, mask).logits[valid], cells["logits"][valid])
        model = BertForMaskedLM.from_pretrained(folder / "saved").train()
        model.gradient_checkpointing_enable()
        with torch.enable_grad():
            loss = model(ids, mask, labels=torch.where(valid, ids, -100)).loss
            loss.backward()
        check("modeling_bert_te, loss with checkpointing", loss.detach(), cells["loss"])


main(Path(sys.argv[1]))
