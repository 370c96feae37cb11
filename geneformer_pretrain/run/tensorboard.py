"""TensorBoard: the records of a run as events in tensorboard/ in its folder."""

from pathlib import Path
from typing import Any

from geneformer_pretrain.run.tracking import Tracker

FOLDER = "tensorboard"


def start_tensorboard(folder: Path, first_step: int) -> Tracker:
    """Start writing events, those of a run that goes on beside the earlier ones.

    Parameters
    ----------
    folder
        Of the run.
    first_step
        Completed steps. TensorBoard does not show events of later ones, which are made again.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / FOLDER), purge_step=first_step + 1 if first_step else None)

    def log_record(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, record["step"])

    return Tracker("TensorBoard", log_record, lambda exit_code: writer.close())
