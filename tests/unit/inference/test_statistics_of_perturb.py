"""From `perturb` to its table of genes: the columns that one writes are those that the other reads."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.inference.perturb import PerturbOptions, perturb
from tests.tiny import one_cpu_thread  # noqa: F401
from tests.unit.inference.worlds import make_world

CELLS = 12


def test_perturb_writes_the_table_of_genes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_pretrain.inference.perturb.MEASURED_SECONDS", 0.001)
    columns = {
        "state": [["ill", "well"][cell % 2] for cell in range(CELLS)],
        "donor": [f"D{cell // 4}" for cell in range(CELLS)],
    }
    world = make_world(tmp_path, "v1", CELLS, **columns)
    options = {"states": "state", "start": "ill", "goal": "well", "replicates": "donor"}
    perturb(PerturbOptions(world.model, [str(world.path)], tmp_path / "out", mode="delete", tokens=512, **options))
    scores = pa.concat_tables(pq.read_table(part) for part in sorted((tmp_path / "out/scores").glob("part-*.parquet")))
    genes = pq.read_table(tmp_path / "out/genes.parquet").to_pandas().set_index("perturbation")
    frame = scores.to_pandas()
    np.testing.assert_allclose(
        genes["mean_shift_well"].sort_index(),
        frame.astype({"shift_well": np.float64}).groupby("perturbation")["shift_well"].mean(),
        rtol=1e-9,
        atol=1e-12,
    )
    assert genes["cells"].sum() == len(frame) == sum(len(world.cells[cell]) for cell in range(0, CELLS, 2))
    assert genes["replicates_shift_well"].max() == 3
    assert genes["symbol"].str.startswith("S").all()
    assert genes["excess_shift_well"].notna().mean() > 0.9
    # A cell is compared with itself, so its scores have to come one after the other.
    runs = 1 + sum(before != after for before, after in pairwise(frame["cell"]))
    assert runs == frame["cell"].nunique()
