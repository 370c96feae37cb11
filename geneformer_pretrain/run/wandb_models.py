"""The exported models of a run as W&B artifacts."""

import logging
from pathlib import Path
from typing import Any

from geneformer_pretrain.config.training import WandbModel

log = logging.getLogger(__name__)

MODELS = ("final_model", "best_model")


def log_models(wandb: Any, run: Any, folder: Path, kind: WandbModel) -> None:
    """Make an artifact `RUN_ID-final_model`, and one of best_model if there is one; a failure is logged alone.

    Parameters
    ----------
    wandb, run
        The library, and its run.
    folder
        Of the run.
    kind
        Whether files are copied to W&B, or their place and checksums are recorded.
    """
    for path in (folder / name for name in MODELS):
        if not path.is_dir():
            continue
        try:
            artifact = wandb.Artifact(f"{run.id}-{path.name}", type="model")
            if kind is WandbModel.upload:
                artifact.add_dir(str(path))
            else:
                artifact.add_reference(path.resolve().as_uri())
            run.log_artifact(artifact)
        except Exception as error:  # The model itself is complete.
            reason = str(error).partition("\n")[0]
            log.error("%s has become no W&B artifact (%s: %s)", path, type(error).__name__, reason)
