"""With 200 configurations no label of a figure lies on another, and what has a role stays visible."""

from collections import Counter
from itertools import pairwise

import fake_study
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from telco_nb.analysis import charts

matplotlib.use("Agg")
N = 200


@pytest.fixture(scope="module")
def study():
    return fake_study.make_study(N)


@pytest.fixture
def used(study):
    return charts.roles("c017", study.losses)


def boxes(fig: plt.Figure) -> dict[str, list]:
    """The drawn labels of a figure: ticks by axis, and the texts inside each panel."""
    fig.canvas.draw()
    found: dict[str, list] = {}
    for k, ax in enumerate(fig.axes):
        for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
            found[f"{name}{k}"] = [label.get_window_extent() for label in labels if label.get_text()]
        found[f"texts{k}"] = [text.get_window_extent() for text in ax.texts if text.get_text()]
    plt.close(fig)
    return found


def assert_apart(found: dict[str, list]) -> None:
    for name, labels in found.items():
        for i, one in enumerate(labels):
            # ticks touch only their neighbours; a rounding of 1 pixel is no overlap
            for other in labels[i + 1 : i + 3 if name[0] in "xy" and "t" not in name else None]:
                assert not one.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9)), name


def energy(study) -> plt.Figure:
    joules = pd.DataFrame({"config": study.results.index, "window": "train", "kind": "estimated", "component": "cpu"})
    joules["gross_j"] = study.results["train_energy_wh"].to_numpy() * 3600
    joules = pd.concat([joules, joules.assign(component="total")])
    joules = joules.assign(low_j=joules["gross_j"] / 2, high_j=joules["gross_j"] * 2)
    bars = charts.energy_by_component(joules, study.results.index)
    fig, ax = plt.subplots(figsize=(8, 1.2 + charts.row_look(N)[0] * N), layout="constrained")
    charts.energy_bars(ax, bars)
    return fig


def slopes(study, used) -> plt.Figure:
    fig, ax = plt.subplots(figsize=(8, 10), layout="constrained")
    ranks = pd.DataFrame({"by loss": study.losses.rank(), "by x": study.judges[0].scores.rank(ascending=False)})
    charts.slopes(ax, ranks, used)
    return fig


def square(names: pd.Index) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).integers(0, 5, (N, N)), names, names)


@pytest.mark.parametrize("kind", ["loss", "energy", "bars", "slopes", "meetings", "wins", "ranking"])
def test_no_two_labels_of_200_configurations_overlap(study, used, kind):
    ranking = study.judges[0].ranking.rename_axis("config").reset_index()
    figures = {
        "loss": lambda: charts.score_panels(study, "val_loss", "loss", used)[0],
        "energy": lambda: charts.score_panels(study, "train_energy_wh", "Wh", used)[0],
        "bars": lambda: energy(study),
        "slopes": lambda: slopes(study, used),
        "meetings": lambda: charts.meetings(square(study.results.index)),
        "wins": lambda: charts.win_rates(square(study.results.index) / 4),
        "ranking": lambda: charts.ranking_intervals(ranking, "ranking"),
    }
    assert_apart(boxes(figures[kind]()))


def test_points_with_a_role_are_drawn_above_all_others(study, used):
    fig, _ = charts.score_panels(study, "train_energy_wh", "Wh", used)
    fig.canvas.draw()
    dots = Counter()
    for found in fig.axes[0].collections:
        dots[found.get_zorder()] += len(found.get_offsets()) if len(found.get_paths()) == 1 else 0
    assert dots[1] == N - len(used) and dots[3] == len(used)
    plt.close(fig)


def test_the_number_of_epochs_is_told_by_the_marker_where_there_are_several():
    study = fake_study.make_study(16)
    fig, _ = charts.score_panels(study, "val_loss", "loss", {})
    told = [text.get_text() for text in fig.legends[0].get_texts()]
    levels = sorted(study.results["epochs"].unique())
    assert len(levels) > 1 and told == [f"{n} epoch{'' if n == 1 else 's'}" for n in levels]
    assert len(set(charts.epoch_markers(study.results).values())) == len(levels)
    plt.close(fig)
    assert charts.epoch_markers(study.results.assign(epochs=3)) == {} == charts.epoch_markers(pd.DataFrame())


def test_every_configuration_of_a_study_of_16_has_its_label():
    study = fake_study.make_study(16)
    fig, _ = charts.score_panels(study, "val_loss", "loss", charts.roles("c01", study.losses))
    assert {text.get_text() for text in fig.axes[0].texts} >= set(study.results.index)
    plt.close(fig)
    assert [charts.every_nth(n) for n in (0, 16, 40, 41, 200)] == [1, 1, 1, 2, 5]
    assert all(a[0] > b[0] for a, b in pairwise(map(charts.row_look, (16, 200))))
