"""The figures of 05 and 06: labels that do not overlap, hatching for estimates, one colour per role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from telco_nb.analysis.labels import label_points
from telco_nb.analysis.results import StudyResults
from telco_nb.analysis.statements import counted
from telco_nb.analysis.statistics import Numbers, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: distinct for colour-blind readers and in grey print
COLOURS = {"front-runner": "#009e73", "lowest loss": "#0072b2", "highest loss": "#d55e00", "other": "#6b6b6b"}
FACTOR_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKERS = ("o", "s", "^", "D")  # of the numbers of epochs, the fewest first
MAX_LABELS = 40  # above this only configurations with a role are labelled, and the others stay in the background
HATCHED_KINDS = ("estimated", "allocated")


def roles(first: str | None, losses: pd.Series) -> dict[str, str]:
    """Configuration -> role in the text (a key of COLOURS); two are joined by " and ", the first gives the colour."""
    names: dict[str, str] = {}
    ends = ((str(losses.idxmin()), "lowest loss"), (str(losses.idxmax()), "highest loss"))
    for config, role in ((first, "front-runner"), *ends):
        if config is not None:
            names[config] = f"{names[config]} and {role}" if config in names else role
    return names


def colour(config: str, used: Mapping[str, str]) -> str:
    """The colour of a configuration's first role, grey without one."""
    return COLOURS[used.get(config, "other").partition(" and ")[0]]


def epoch_markers(results: pd.DataFrame) -> dict[str, str]:
    """Configuration -> marker by its number of epochs; none with one number or more than there are markers."""
    levels = sorted(results["epochs"].dropna().unique()) if "epochs" in results else []
    if not 1 < len(levels) <= len(MARKERS):
        return {}
    return {str(config): MARKERS[levels.index(n)] for config, n in results["epochs"].dropna().items()}


def role_legend(fig: Figure, used: Mapping[str, str], shapes: Mapping[int, str] | None = None) -> None:
    """A legend above the panels that names the configurations with a role, and the numbers of epochs by marker."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour(config, used), label=f"{role}: {config}")
        for config, role in used.items()
    ]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color=COLOURS["other"], label=counted(int(n), "epoch"))
        for n, marker in (shapes or {}).items()
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)


def labelled(configs: Sequence[str], used: Mapping[str, str]) -> list[str]:
    """The configurations to label: all, or of very many only those that have a role."""
    return [config for config in configs if len(configs) <= MAX_LABELS or config in used]


def every_nth(n: int) -> int:
    """Of n ticks every first, second, ... one gets a label, so that labels do not touch."""
    return math.ceil(n / MAX_LABELS) or 1


def row_look(n: int) -> tuple[float, float]:
    """Height in inches and font size in points of each of n rows that all have a label."""
    return (0.28, 8) if n <= MAX_LABELS else (0.12, 6)


def draw_intervals(
    ax: Axes, values: Numbers, places: Numbers, low: Numbers, high: Numbers, along: str = "x", **style: Any
) -> None:
    """Values with whiskers to their bounds; a side that has no bound, where the other has one, is an arrow to the rim.

    Args:
        ax: where to draw.
        values: along the axis `along`; a missing value draws nothing.
        places: along the other axis.
        low, high: bounds of the values; both missing: no interval is known, and none is drawn.
        along: x or y, the axis of the values.
        style: of `Axes.errorbar`; `ecolor` may be one colour per value.
    """
    value, place, below, above = (np.asarray(numbers, dtype=float) for numbers in (values, places, low, high))
    lengths = np.nan_to_num(np.maximum(0, [value - below, above - value]))
    across, up = (value, place) if along == "x" else (place, value)
    bars = ax.errorbar(across, up, **{f"{along}err": lengths}, **{"fmt": "none"} | style)
    shades = bars.lines[2][0].get_colors()
    for rim, missing, known in ((0.0, below, above), (1.0, above, below)):
        for i in np.flatnonzero(np.isnan(missing) & np.isfinite(known) & np.isfinite(value)):
            look = {"arrowstyle": "->", "color": shades[i % len(shades)], "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
            end, of = ((rim, place[i]), ("axes fraction", "data")) if along == "x" else (
                (place[i], rim), ("data", "axes fraction"))  # fmt: skip
            ax.annotate("", end, (across[i], up[i]), xycoords=of, textcoords="data", arrowprops=look, zorder=2)


def score_panels(study: StudyResults, x: str, xlabel: str, used: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """Scores against a column of the results, one panel per judge.

    Args:
        study: the study; a judge without a headline is marked.
        x: column of `study.results`; its interval is drawn if x is `val_loss`, the Pareto front if it is an energy.
        xlabel: title of the horizontal axis, with its unit.
        used: roles of configurations (`roles`).

    Returns:
        The figure and its data, one row per configuration.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(study.judges), figsize=(9, 4.2), sharex=True, squeeze=False, layout="constrained")
    is_loss, markers = x == "val_loss", epoch_markers(study.results)
    data = study.results[[x, f"{x}_low", f"{x}_high"] if is_loss else [x]].astype(float)
    comparable = is_loss or len(study.energy_kinds) == 1  # energies of different kinds share no axis
    for ax, judge in zip(axes.flat, study.judges, strict=True):
        frame = data[data.columns[:3] if is_loss else [x]].assign(score=judge.scores)
        frame = frame.assign(score_low=judge.ranking["low"], score_high=judge.ranking["high"])
        frame = frame.dropna(subset=[x, "score"])
        ax.set(xlabel=xlabel, ylabel=f"score by {judge.label}, log-odds")
        if len(frame) and comparable:
            if not is_loss:
                front_line(ax, frame, pareto_front(frame[x], frame["score"]), x, "score")
            points_with_intervals(ax, frame, x, "score", used, markers)
        if judge.blocks:
            ax.set_title("not valid, shown without a headline", color="#b3261e", fontsize=9)
        data = data.join(frame[["score", "score_low", "score_high"]].add_prefix(f"{judge.name}_"))
    shapes = {study.results.loc[config, "epochs"]: marker for config, marker in markers.items()}
    role_legend(fig, used, dict(sorted(shapes.items())))
    return fig, data.reset_index()


def any_two(results: pd.DataFrame, x: str, y: str) -> Figure:
    """Any two columns of a results table against each other; ringed are those that no other one beats on both.

    Beating is less along x and more along y. Configurations without one of the values are left out. Energies of
    different kinds do not beat each other.
    """
    import matplotlib.pyplot as plt

    frame = results[list(dict.fromkeys([x, y]))].astype(float).dropna()
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    points_with_intervals(ax, frame, x, y, used={})
    by_energy = any(word in name for name in (x, y) for word in ("_wh", "joules", "mean_w"))
    if by_energy and "energy_kind" in results and results.loc[frame.index, "energy_kind"].nunique(dropna=False) > 1:
        ax.set_title("Energies of different kinds: none is ringed")
    elif len(frame):
        front_line(ax, frame, pareto_front(frame[x], frame[y]), x, y)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    plt.close(fig)
    return fig


def points_with_intervals(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, used: Mapping[str, str], markers: Mapping[str, str] | None = None
) -> None:
    """Labelled points at columns x and y of `frame` (indexed by configuration), whiskers to `<x>_low` etc. if there.

    `markers` are by configuration; those without one are circles.
    """
    names = labelled(list(frame.index), used)
    shown, others = frame.loc[names], frame.drop(names)
    ax.margins(0.12)  # room for arrows beside the outermost points
    ax.scatter(others[x], others[y], s=14, color=COLOURS["other"], alpha=0.35, linewidths=0, zorder=1)
    shades = [colour(config, used) for config in names]
    look = {"ecolor": shades, "elinewidth": 0.9, "alpha": 0.45 if others.empty else 1, "zorder": 2}
    for along, values, places in (("x", x, y), ("y", y, x)):
        if f"{values}_low" in frame:
            bounds = shown[f"{values}_low"], shown[f"{values}_high"]
            draw_intervals(ax, shown[values], shown[places], *bounds, along, **look)
    looks = {config: (markers or {}).get(config, "o") for config in names}
    for marker in dict.fromkeys(looks.values()):
        chosen = [config for config in names if looks[config] == marker]
        hues = [colour(config, used) for config in chosen]
        ax.scatter(shown.loc[chosen, x], shown.loc[chosen, y], s=36, c=hues, marker=marker, zorder=3)
    label_points(ax, shown[x], shown[y], names)


def front_line(ax: Axes, frame: pd.DataFrame, front: Sequence[str], x: str, y: str) -> None:
    """The Pareto front as a staircase through its members, ordered by rising x."""
    members = frame.loc[list(front)].sort_values(x)
    corners = [(members[x].iloc[0], members[y].iloc[0])]
    for (_, a), (_, b) in pairwise(members.iterrows()):
        corners += [(b[x], a[y]), (b[x], b[y])]
    ax.plot(*zip(*corners, strict=True), color="#cc79a7", lw=1.6, zorder=1)
    ax.plot(members[x], members[y], "o", color="#cc79a7", markersize=11, fillstyle="none", markeredgewidth=1.6)


def spread(values: Numbers, gap: float) -> np.ndarray:
    """Positions nearest to `values` (least squares) with at least `gap` between neighbours, in the given order."""
    from scipy.optimize import isotonic_regression

    numbers = np.asarray(values, dtype=float)
    order = np.argsort(numbers, kind="stable")
    steps = np.arange(len(numbers)) * gap
    positions = np.empty_like(numbers)
    positions[order] = isotonic_regression(numbers[order] - steps).x + steps
    return positions


def slopes(ax: Axes, ranks: pd.DataFrame, used: Mapping[str, str]) -> None:
    """Slope chart of `ranks` (index configurations, columns orderings, 1 on top); both ends are labelled."""
    names = labelled(list(ranks.index), used)
    places = range(ranks.shape[1])
    for config in ranks.index:
        width, alpha, zorder = (2.4, 1, 3) if config in used else (0.9, 0.55, 2) if config in names else (0.5, 0.25, 1)
        marker = "o" if config in names else None
        (line,) = ax.plot(places, ranks.loc[config], marker=marker, markersize=4, color=colour(config, used))
        line.set(lw=width, alpha=alpha, zorder=zorder)
    gap = 0.022 * max(len(ranks), 16)
    for place, side, offset in ((0, "right", -0.04), (places[-1], "left", 0.04)):
        heights = spread(ranks.loc[names].iloc[:, place], gap)
        for config, height in zip(names, heights, strict=True):
            ax.text(place + offset, height, config, ha=side, va="center", fontsize=8, color=colour(config, used))
    ax.set(xlim=(-0.35, ranks.shape[1] - 0.65), ylim=(len(ranks) + 0.6, 0.4), ylabel="rank (1 = best)")
    ax.set_xticks(list(places), list(ranks.columns))
    ax.grid(axis="y", alpha=0.4)


def tau_map(ax: Axes, taus: pd.DataFrame) -> None:
    """Kendall tau between every two orderings, best configuration first, as a small annotated table in colour."""
    import seaborn as sns

    sns.heatmap(taus, ax=ax, vmin=-1, vmax=1, cmap="PuOr", annot=True, fmt="+.2f", cbar=False, annot_kws={"size": 9})
    ax.set_title("Kendall tau between orderings, best first", fontsize=9)
    ax.tick_params(labelsize=8, rotation=0)


def _share_dots(ax: Axes, measures: pd.DataFrame, places: Numbers, **style: Any) -> None:
    """Shares with whiskers beside the line of no preference."""
    draw_intervals(ax, measures["value"], places, measures["low"], measures["high"], fmt="o", **style)
    ax.axvline(0.5, color="0.5", lw=0.8)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(measures) - 0.4, -0.6))


def bias_panel(ax: Axes, measures: pd.DataFrame) -> None:
    """Measures of each judge (columns judge, metric, value, low, high; shares between 0 and 1) with intervals."""
    names, judges = (list(dict.fromkeys(measures[column])) for column in ("metric", "judge"))
    for k, judge in enumerate(judges):
        part = measures[measures["judge"] == judge].set_index("metric").reindex(names)
        places = np.arange(len(names)) + (k - (len(judges) - 1) / 2) * 0.7 / max(len(judges), 2)
        _share_dots(ax, part, places, markersize=4, label=judge)
    words = [name.replace("p_first_seat", "first seat wins").replace("_", " ") for name in names]
    ax.set_yticks(range(len(names)), words, fontsize=8)
    ax.set_title("each judge with itself (share)", fontsize=9)
    ax.legend(fontsize=8, loc="lower left")


def effect_panels(effects: pd.DataFrame) -> Figure:
    """Main effects (`effect_tables`) with 95 % intervals: one panel per response, one line per contrast."""
    import matplotlib.pyplot as plt

    panels = list(effects.groupby("response", sort=False))
    shades = dict(zip(dict.fromkeys(effects["factor"]), FACTOR_COLOURS, strict=False))
    n_lines = int(effects["response"].value_counts().max())
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    size = (9, rows * max(1.8, 0.8 + 0.27 * n_lines))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (response, part) in zip(axes.flat, panels, strict=False):
        unit, places = part["unit"].iloc[0], range(len(part))
        colours = [shades[factor] for factor in part["factor"]]
        draw_intervals(ax, part["effect"], places, part["low"], part["high"], ecolor=colours)
        ax.scatter(part["effect"], places, c=colours, zorder=3)
        ax.axvline(1.0 if unit == "ratio" else 0.0, color="0.4", lw=1)
        labels = part["factor"].str.replace("_", " ") + ": " + part["contrast"]
        ax.set_yticks(places, labels, fontsize=8)
        ax.set_ylim(len(part) - 0.5, -0.5)
        ax.set_title(f"{str(response).replace('val_loss', 'validation loss')} ({unit})", fontsize=9)
        ax.tick_params(axis="x", labelsize=8)
    for ax in axes[:, 1:].flat:
        if all(len(part) == n_lines for _, part in panels):
            ax.set_yticklabels([])
    return fig


def energy_by_component(energy: pd.DataFrame, configs: Sequence[str]) -> pd.DataFrame:
    """Arrange energy tables for `energy_bars`.

    Args:
        energy: the energy tables of 03 with a column config (joules per window and component).
        configs: the configurations, in the order of the bars.

    Returns:
        One row per configuration: Wh and kind of cpu, gpu and total in the training window, and the interval of the
        total. A component without a meter or estimate is missing.
    """
    train = energy[(energy["window"] == "train") & (energy["kind"] != "none")].set_index("config")
    columns = {}
    for component in ("cpu", "gpu", "total"):
        rows = train[train["component"] == component].reindex(configs)
        columns |= {f"{component}_wh": rows["gross_j"].astype(float) / 3600, f"{component}_kind": rows["kind"]}
    columns |= {f"{end}_wh": rows[f"{end}_j"].astype(float) / 3600 for end in ("low", "high")}
    return pd.DataFrame(columns).rename_axis("config")


def kinds_text(bars: pd.DataFrame) -> str:
    """`estimated`, `measured`, `estimated and measured`: every kind that stands in the bars."""
    kinds = pd.concat([bars["cpu_kind"], bars["gpu_kind"]]).dropna()
    return " and ".join(sorted(set(kinds))) or "not metered"


def extremes_text(bars: pd.DataFrame) -> str:
    """Whether the energies of the cheapest and the most expensive configuration overlap; kinds are not compared."""
    if len(bars) < 2:
        return ""
    if len(bars[["cpu_kind", "gpu_kind"]].drop_duplicates()) > 1:
        return "Energies of different kinds do not stand on one ranking, so none is the cheapest."
    least, most = bars.loc[bars["total_wh"].idxmin()], bars.loc[bars["total_wh"].idxmax()]
    word = "overlap" if least["high_wh"] >= most["low_wh"] else "do not overlap"
    return f"The intervals of the cheapest and the most expensive one ({least.name}, {most.name}) {word}."


def energy_bars(ax: Axes, energy: pd.DataFrame) -> None:
    """Horizontal bars of `energy` (as `energy_by_component` makes it), with whiskers; estimates are hatched."""
    places, left = np.arange(len(energy)), np.zeros(len(energy))
    for component, shade in (("gpu", "#e69f00"), ("cpu", "#56b4e9")):
        kinds = energy[f"{component}_kind"][energy[f"{component}_wh"].notna()]
        if kinds.empty:
            continue
        width = energy[f"{component}_wh"].fillna(0).to_numpy(float)
        label = f"{component.upper()}, {' and '.join(sorted(set(kinds)))}"
        hatches = ["///" if kind in HATCHED_KINDS else "" for kind in energy[f"{component}_kind"]]
        ax.barh(places, width, left=left, color=shade, edgecolor="white", label=label, hatch=hatches)
        left += width
    bounds = energy["low_wh"], energy["high_wh"]
    draw_intervals(ax, energy["total_wh"], places, *bounds, ecolor="0.25", elinewidth=0.9)
    ax.set_yticks(places, energy.index, fontsize=row_look(len(energy))[1])
    ax.grid(axis="y", visible=False)  # a line beside each whisker would look like one
    ax.set(xlim=(0, None), ylim=(len(energy) - 0.4, -0.6), xlabel=f"training energy, {kinds_text(energy)} (Wh)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def loss_curves(curves: pd.DataFrame, configs: pd.DataFrame, used: Mapping[str, str]) -> Figure:
    """Training loss against tokens in small panels; the other curves stay behind in grey.

    Args:
        curves: columns config, tokens_seen, train_loss (nats per token).
        configs: results, indexed by configuration. More than 20 are drawn one panel per set of target modules.
        used: roles of configurations (`roles`).
    """
    import matplotlib.pyplot as plt

    many = len(configs) > 20
    panels = configs.groupby("target_modules").groups if many else {c: [c] for c in configs.index}
    columns, height = min(2 if many else 4, len(panels)), 2.6 if many else 1.7
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(9, max(2.6, rows * height)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, members) in zip(axes.flat, panels.items(), strict=False):
        for config, curve in curves.groupby("config"):
            is_member, shade = config in members, colour(str(config), used)
            has_role = is_member and config in used
            style = {"color": shade if has_role else COLOURS["lowest loss"], "lw": 1.3 if has_role or not many else 0.6}
            style = style if is_member else {"color": "0.85", "lw": 0.4}
            ax.plot(curve["tokens_seen"] / 1000, curve["train_loss"], zorder=2 + is_member + has_role, **style)
        role = used.get(str(title))
        ax.set_title(f"{title} ({role})" if role else str(title), fontsize=8)
        ax.tick_params(labelsize=7)
    fig.supxlabel("tokens seen (thousands)", fontsize=9)
    fig.supylabel("training loss (nats per token)", fontsize=9)
    return fig


def meetings(met: pd.DataFrame) -> Figure:
    """A figure of how often configurations meet: `met` has the first seat as index, the second as columns."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    levels, every = np.arange(met.to_numpy().max() + 2) - 0.5, every_nth(len(met))
    fig, ax = plt.subplots(figsize=(5.5, 4.5) if every == 1 else (8, 7))
    colours = plt.get_cmap("viridis", len(levels) - 1)
    ticks = {"ticks": range(0, len(levels) - 1, max(1, len(levels) // 8))}
    sns.heatmap(met, mask=np.eye(len(met), dtype=bool), cmap=colours, vmin=levels[0], vmax=levels[-1], cbar_kws=ticks,
                xticklabels=every, yticklabels=every, square=True, ax=ax)  # fmt: skip
    ax.set(title="How often two configurations meet", xlabel="second seat", ylabel="first seat")
    ax.tick_params(labelsize=8 if every == 1 else 7)
    ax.tick_params(axis="x", rotation=90)
    ax.grid(False)
    return fig


def ranking_intervals(table: pd.DataFrame, title: str) -> Figure:
    """Scores with intervals and ranks, best at the top; `table` as judge.ranking.with_anchors gives it.

    The axis holds every score and every bound, those of the anchors too. An arrow to the rim: no limit on this side.
    """
    import matplotlib.pyplot as plt

    rows = table.dropna(subset=["score"]).sort_values("score", ignore_index=True)
    height, font = row_look(len(rows))
    fig, ax = plt.subplots(figsize=(8, 1.2 + height * len(rows)))
    limits = rows[["score", "low", "high"]].astype(float).stack()
    room = 0.06 * max(limits.max() - limits.min(), 1.0) if len(rows) else 1.0
    if len(rows):
        ax.set_xlim(limits.min() - room, limits.max() + room)
    for is_anchor, look in ((False, {"ecolor": "C0", "color": "C0", "fmt": "o"}),
                            (True, {"ecolor": "0.5", "color": "0.5", "fmt": "D"})):  # fmt: skip
        part = rows[rows["is_anchor"].astype(bool) == is_anchor]
        if len(part):
            draw_intervals(ax, part["score"], part.index, part["low"], part["high"], elinewidth=2, **look)
    for y, (_, row) in enumerate(rows.iterrows()):
        text = "anchor" if row["is_anchor"] else rank_text(row)
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=font)
    ax.axvline(0, color="0.6", lw=1)
    ax.set_yticks(range(len(rows)), rows["config"], fontsize=None if len(rows) <= MAX_LABELS else font)
    ax.set_ylim(-0.8, len(rows) - 0.2)
    ax.set(xlabel="score, log-odds (mean of the ranked configurations = 0)", title=title)
    return fig


def rank_text(row: pd.Series) -> str:
    """`rank 2 [1 to 3]`, or the rank alone where no interval of it is known."""
    known = pd.notna(row["rank_low"]) and pd.notna(row["rank_high"])
    return f"rank {row['rank']}{f' [{row.rank_low} to {row.rank_high}]' if known else ''}"


def win_rates(rates: pd.DataFrame) -> Figure:
    """A figure of how often the row won against the column, a tie as a half; shares between 0 and 1."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    every = every_nth(len(rates))
    size = 2.2 + 0.34 * min(len(rates), MAX_LABELS)
    fig, ax = plt.subplots(figsize=(size + 0.9, size))
    sns.heatmap(100 * rates, vmin=0, vmax=100, cmap="PuOr", annot=every == 1, fmt=".0f", annot_kws={"size": 7},
                square=True, xticklabels=every, yticklabels=every, cbar_kws={"shrink": 0.7}, ax=ax)  # fmt: skip
    ax.set(title="Row wins against column, %", xlabel="", ylabel="")
    ax.tick_params(labelsize=8, rotation=0)
    ax.tick_params(axis="x", rotation=0 if every == 1 else 90)
    ax.grid(False)
    return fig


def shares_with_intervals(measures: pd.DataFrame, title: str) -> Figure:
    """Shares (columns metric, value, low, high, n) as dots; the line at one half is no preference."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 2.4))
    _share_dots(ax, measures, np.arange(len(measures)), capsize=3)
    labels = measures["metric"].str.replace("_", " ") + " (n = " + measures["n"].astype(str) + ")"
    ax.set_yticks(range(len(measures)), labels)
    ax.set(xlabel="share", title=title)
    return fig


def taught_dots(table: pd.DataFrame, labels: Mapping[str, str]) -> Figure:
    """Points made on taught problems, with 95 % bounds, and on others, joined by a line.

    Args:
        table: from `taught.taught_table`, in the order of the rows from above.
        labels: other names of rows.
    """
    import matplotlib.pyplot as plt

    height, size = row_look(len(table))
    fig, ax = plt.subplots(figsize=(8, 1.4 + height * len(table)), layout="constrained")
    places, blue, shares = np.arange(len(table))[::-1], COLOURS["lowest loss"], 100 * table
    ax.hlines(places, shares["untaught"], shares["taught"], color=COLOURS["other"], linewidth=3, alpha=0.4)
    draw_intervals(ax, shares["taught"], places, shares["taught_low"], shares["taught_high"], color=blue, fmt="o",
                   elinewidth=1, label="problem was in training (line: 95 % interval)")  # fmt: skip
    ax.scatter(
        shares["untaught"], places, zorder=3, facecolor="white", edgecolor=blue, label="problem was not in training"
    )
    ax.set_yticks(places, [labels.get(name, name) for name in table.index], fontsize=size)
    ax.set(xlabel="share of a full answer's points, %", xlim=(0, None))
    fig.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return fig
