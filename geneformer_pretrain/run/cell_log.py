"""The log of cells: the cell numbers of each micro-batch, for audits."""

import re
from pathlib import Path

from geneformer_pretrain.data.batch import BatchMetadata
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.run.metrics import JsonLines, cut_back


class CellLog:
    """Appends the cell numbers of each micro-batch to cells/rank_R.jsonl.

    Parameters
    ----------
    folder
        Checkpoint folder.
    world
        This process among all.
    first_step
        Records of later steps, of a run that was cut off, are dropped. Ranks share the files that a run on
        more ranks left.
    """

    def __init__(self, folder: Path, world: World, first_step: int) -> None:
        (folder / "cells").mkdir(exist_ok=True)
        own = folder / "cells" / f"rank_{world.rank}.jsonl"
        for path in (folder / "cells").iterdir():
            match = re.fullmatch(r"rank_(\d+)\.jsonl", path.name)
            if match and int(match[1]) % world.size == world.rank and path != own:
                cut_back(path, first_step)
        self.file = JsonLines(own, first_step)

    def write(self, step: int, batch: BatchMetadata) -> None:
        """Record one micro-batch of the optimizer step that completes `step` steps."""
        record = {"step": step, "pack": batch.pack, "epoch": batch.epoch, "cells": batch.cells.tolist()}
        self.file.write(record)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
