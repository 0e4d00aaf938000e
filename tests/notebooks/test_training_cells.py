"""Cells of 03 whose work must not grow with the study."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from telco_nb import ROOT

CELLS = [
    "".join(cell["source"])
    for cell in json.loads((ROOT / "notebooks" / "03_train.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


class Rows(list):
    """500 packed rows of 40 conversations of 10 tokens."""

    def __init__(self):
        super().__init__(range(500))
        self.rows = [[SimpleNamespace(input_ids=[0] * 10)] * 40] * 500
        self.tokens = [400] * 500


def test_the_figure_of_packed_rows_has_at_most_60_of_them():
    drawn = []
    names = {
        "packing": SimpleNamespace(PackedRows=lambda *_: Rows()), "examples": {"train": []}, "batch_tokens": 400,
        "seed": 1, "micro": 400, "plt": plt, "np": np,
        "run": SimpleNamespace(figure=lambda name, fig, alt: drawn.append(fig)),
    }  # fmt: skip
    exec(next(cell for cell in CELLS if 'run.figure("packing"' in cell), names)
    (axes,) = drawn[0].axes
    assert len({bar.get_y() for bar in axes.patches}) == 60 and len(axes.patches) == 60 * 40
    assert axes.get_title() == "60 of 500 rows"
    plt.close(drawn[0])
