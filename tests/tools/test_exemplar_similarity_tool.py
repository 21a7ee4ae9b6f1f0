"""The table of similarities, and errors of the command that prints it."""

import numpy as np
import pytest
import torch

from unseg.discovery import ExemplarError, save_exemplar_pool
from unseg.modeling import ExemplarContrast
from unseg.structures import Exemplar, ExemplarPool
from unseg.tools.exemplar_similarity import main, make_table

TINY = "projects/ExemplarFreeSOLO/configs/exemplar_freesolo_tiny.yaml"


def make_head():
    head = ExemplarContrast(alpha=0.7, beta=0.3, temperature=0.5)
    head.pool_embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    return head


def test_table():
    """Cosines of three objects with the exemplars: (1, 0.6), (-1, -0.6) and (0, 0.8)."""
    table = make_table(make_head(), torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row[0].endswith(" %")}
    assert rows["0 %"] == ["-0.600", "-1.000", "0.600"]
    assert rows["50 %"][0] == "0.800"
    assert rows["100 %"] == ["1.000", "1.000", "0.600"]
    assert "0.7: 66.7 % of the objects have a positive" in table
    assert "0.3: 50.0 % of all pairs are negative, 66.7 % of the objects have one" in table
    assert "about the 33.3 % of the objects that have both" in table
    assert "no object's is above 0.371 " in table  # log(1 + exp(-0.8))


def test_no_objects():
    with pytest.raises(ExemplarError, match="no object"):
        make_table(make_head(), torch.zeros(0, 2))


@pytest.mark.parametrize("missing", ["pool", "masks"])
def test_missing_files_are_named_in_one_line(missing, tmp_path, monkeypatch):
    pool = tmp_path / "none.npz"
    if missing == "masks":
        pool = tmp_path / "pool.npz"
        image, mask = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), bool)
        row = np.ones(2, np.float32)
        exemplar = Exemplar(image, mask, "a", "a/0.jpg", (0, 0, 32, 32), "whole", row)
        save_exemplar_pool(pool, ExemplarPool((exemplar,)))
    words = ["MODEL.DEVICE", "cpu", "MODEL.EXEMPLAR.POOL", str(pool)]
    words += ["DATASETS.TRAIN", f"('{tmp_path}/none.json@unseg_synthetic_val',)"]
    argv = ["exemplar_similarity", "--config-file", TINY, "--random-weights", *words]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match=r"error: .*none\.") as error:
        main()
    assert "\n" not in str(error.value)
