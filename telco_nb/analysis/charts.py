"""Small helpers for the analysis figures: labels that do not overlap, hatching for estimates, roles in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

# Okabe-Ito: told apart by colour-blind readers and in grey print
COLOURS = {"deploy": "#009e73", "lowest loss": "#0072b2", "highest loss": "#d55e00", "other": "#6b6b6b"}
MAX_LABELS = 40  # above this only the highlighted configurations are labelled
HATCHED_KINDS = ("estimated", "allocated")


def roles(deploy: str | None, losses: Any) -> dict[str, str]:
    """Configuration -> role in the text (a key of COLOURS); two are joined by " and ", the first gives the colour."""
    found: dict[str, str] = {}
    for config, role in ((deploy, "deploy"), (losses.idxmin(), "lowest loss"), (losses.idxmax(), "highest loss")):
        if config is not None:
            found[config] = f"{found[config]} and {role}" if config in found else role
    return found


def colour(config: str, used: Mapping[str, str]) -> str:
    """The colour of a configuration's first role, grey without one."""
    return COLOURS[used.get(config, "other").partition(" and ")[0]]


def role_legend(fig: Any, used: Mapping[str, str]) -> None:
    """A legend above the panels that names the configurations with a role."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour(config, used), label=f"{role}: {config}")
        for config, role in used.items()
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)


def mark_blocked(ax: Any, blocks: Sequence[str]) -> None:
    """Say on the panel of a judge that is not valid that it carries no headline."""
    if blocks:
        ax.set_title("not valid, shown without a headline", color="#b3261e", fontsize=9)


def labelled(configs: Sequence[str], used: Mapping[str, str]) -> list[str]:
    """The configurations to label: all, or with very many only those that have a role."""
    return list(configs) if len(configs) <= MAX_LABELS else [c for c in configs if c in used]


def points_with_intervals(ax: Any, frame: Any, x: str, y: str, used: Mapping[str, str]) -> None:
    """Points at columns x and y of `frame` (indexed by configuration), with whiskers where it has `<x>_low` etc."""
    for config, row in frame.iterrows():
        bars = {}
        for axis, name in (("xerr", x), ("yerr", y)):
            if f"{name}_low" in frame:
                bars[axis] = [[max(0.0, row[name] - row[f"{name}_low"])], [max(0.0, row[f"{name}_high"] - row[name])]]
        shade = colour(str(config), used)
        ax.errorbar(row[x], row[y], **bars, fmt="none", ecolor=shade, elinewidth=0.9, alpha=0.45, zorder=2)
        ax.plot(row[x], row[y], "o", color=shade, markersize=6, zorder=3)
    names = labelled(list(frame.index), used)
    label_points(ax, frame.loc[names, x], frame.loc[names, y], names)


def label_points(ax: Any, x: Sequence[float], y: Sequence[float], labels: Sequence[str], size: float = 8) -> None:
    """Write a label beside every point where it covers least: other points, labels already placed, the frame.

    Greedy; call it after the limits of the axes are settled. Diagonals come first because whiskers are upright.
    """
    ax.figure.canvas.draw()
    scale = ax.figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y]))
    frame = ax.get_window_extent()
    placed: list[tuple[float, float, float, float]] = []
    for place, (px, py), label in zip(zip(x, y, strict=True), points, labels, strict=True):
        width, height = 0.58 * size * len(label) * scale, 1.1 * size * scale
        spots = [_spot(px, py, angle, r * scale, width, height) for r in (7, 13, 22, 34) for angle in _ANGLES]
        costs = [_cost(box, points, placed, frame) + 0.01 * k for k, box in enumerate(spots)]
        box = spots[int(np.argmin(costs))]
        placed.append(box)
        left, bottom = (box[0] - px) / scale, (box[1] - py) / scale
        far = math.hypot(left + width / scale / 2, bottom + height / scale / 2) > 26
        arrow = {"arrowstyle": "-", "color": "0.6", "lw": 0.6} if far else None
        ax.annotate(label, place, (left, bottom), textcoords="offset points", fontsize=size, arrowprops=arrow, zorder=5)


_ANGLES = [math.radians(a) for a in (35, 145, -35, -145, 0, 180, 90, -90)]


def _spot(px: float, py: float, angle: float, radius: float, width: float, height: float) -> tuple[float, ...]:
    cx = px + math.cos(angle) * (radius + width / 2)
    cy = py + math.sin(angle) * (radius + height / 2)
    return (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def _cost(box: tuple[float, ...], points: np.ndarray, placed: list, frame: Any) -> float:
    x0, y0, x1, y1 = box
    inside = (points[:, 0] > x0 - 3) & (points[:, 0] < x1 + 3) & (points[:, 1] > y0 - 3) & (points[:, 1] < y1 + 3)
    overlaps = sum(max(0, min(x1, q[2]) - max(x0, q[0])) * max(0, min(y1, q[3]) - max(y0, q[1])) > 0 for q in placed)
    outside = x0 < frame.x0 or y0 < frame.y0 or x1 > frame.x1 or y1 > frame.y1
    return 2.0 * inside.sum() + 3.0 * overlaps + 4.0 * outside


def spread(values: Sequence[float], gap: float) -> np.ndarray:
    """Positions as near to `values` as can be with at least `gap` between neighbours, in the order given."""
    values = np.asarray(values, dtype=float)
    order = np.argsort(values, kind="stable")
    blocks: list[list[float]] = []  # [sum of (value - own offset), count]: pool adjacent violators
    for position, index in enumerate(order):
        blocks.append([values[index] - position * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    fitted = np.concatenate([np.full(int(count), total / count) for total, count in blocks]) if blocks else values
    result = np.empty_like(values)
    result[order] = fitted + np.arange(len(values)) * gap
    return result


def slopes(ax: Any, ranks: Any, used: Mapping[str, str]) -> None:
    """Slope chart of `ranks` (index configurations, columns orderings, 1 on top); both ends are labelled."""
    names = labelled(list(ranks.index), used)
    places = range(ranks.shape[1])
    for config in ranks.index:
        role = used.get(config)
        style = {"color": colour(config, used), "lw": 2.4 if role else 0.9, "alpha": 1 if role else 0.55}
        ax.plot(places, ranks.loc[config], marker="o", markersize=4, zorder=3 if role else 2, **style)
    gap = 0.022 * max(len(ranks), 16)
    for place, side in ((0, "right"), (ranks.shape[1] - 1, "left")):
        heights = spread(ranks.loc[names].iloc[:, place], gap)
        for config, height in zip(names, heights, strict=True):
            offset = -0.04 if side == "right" else 0.04
            shade = colour(config, used)
            ax.text(place + offset, height, config, ha=side, va="center", fontsize=8, color=shade)
    ax.set(xlim=(-0.35, ranks.shape[1] - 0.65), ylim=(len(ranks) + 0.6, 0.4), ylabel="rank (1 = best)")
    ax.set_xticks(list(places), list(ranks.columns))
    ax.grid(axis="y", alpha=0.4)


def front_line(ax: Any, frame: Any, front: Sequence[str], x: str, y: str) -> None:
    """The Pareto front as a staircase through its members, ordered by rising x."""
    members = frame.loc[list(front)].sort_values(x)
    corners = [(members[x].iloc[0], members[y].iloc[0])]
    for (_, a), (_, b) in pairwise(members.iterrows()):
        corners += [(b[x], a[y]), (b[x], b[y])]
    ax.plot(*zip(*corners, strict=True), color="#cc79a7", lw=1.6, zorder=1)
    ax.plot(members[x], members[y], "o", color="#cc79a7", markersize=11, fillstyle="none", markeredgewidth=1.6)


def effect_panel(ax: Any, effects: Any, title: str, neutral: float, colours: Mapping[str, str]) -> None:
    """Effects with 95 % intervals as dots and whiskers, one line per contrast, coloured by factor."""
    for place, row in enumerate(effects.itertuples()):
        ax.plot([row.low, row.high], [place, place], color=colours[row.factor], lw=1.6)
        ax.plot(row.effect, place, "o", color=colours[row.factor])
    ax.axvline(neutral, color="0.4", lw=1)
    labels = [f"{row.factor.replace('_', ' ')}: {row.contrast}" for row in effects.itertuples()]
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_title(title, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)


def energy_bars(ax: Any, energy: Any) -> None:
    """Horizontal bars of `energy` (as `energy_by_component` makes it), with whiskers; estimates are hatched."""
    places, left = np.arange(len(energy)), np.zeros(len(energy))
    for component, shade in (("gpu", "#e69f00"), ("cpu", "#56b4e9")):
        known = energy[f"{component}_wh"].notna().to_numpy()
        if not known.any():
            continue
        width = energy[f"{component}_wh"].fillna(0).to_numpy(float)
        kinds = energy[f"{component}_kind"]
        label = f"{component.upper()}, {' and '.join(sorted(set(kinds[known])))}"
        bars = ax.barh(places, width, left=left, color=shade, edgecolor="white", label=label)
        for bar, kind in zip(bars, kinds, strict=True):
            bar.set_hatch("///" if kind in HATCHED_KINDS else "")
        left += width
    total = energy["total_wh"].to_numpy(float)
    whiskers = [total - energy["low_wh"].to_numpy(float), energy["high_wh"].to_numpy(float) - total]
    ax.errorbar(total, places, xerr=np.maximum(np.nan_to_num(whiskers), 0), fmt="none", ecolor="0.25", elinewidth=0.9)
    ax.set_yticks(places, energy.index, fontsize=8 if len(energy) <= MAX_LABELS else 5)
    ax.set_ylim(len(energy) - 0.4, -0.6)
    ax.set_xlim(left=0)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def energy_title(word: str, window: str = "training") -> str:
    """An axis title that says how the figure was come by."""
    return f"{window} energy, {word} (Wh)"


def panel_grid(n: int, columns: int = 4, width: float = 9, height: float = 1.7) -> tuple[Any, np.ndarray]:
    """A figure with n small panels that share both axes; panels left over are hidden."""
    import matplotlib.pyplot as plt

    columns = min(columns, n)
    rows = math.ceil(n / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(width, max(2.6, rows * height)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, axes.flatten()[:n]


def effect_panels(effects: Any) -> Any:
    """One panel of main effects per response (`analysis.effect_tables`), coloured by factor; returns the figure."""
    import matplotlib.pyplot as plt

    responses = list(dict.fromkeys(effects["response"]))
    colours = dict(zip(dict.fromkeys(effects["factor"]), ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=False))
    lines = int(effects["response"].value_counts().max())
    columns = 2 if len(responses) > 1 else 1
    rows = math.ceil(len(responses) / columns)
    size = (9, rows * max(1.8, 0.8 + 0.27 * lines))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(responses) :]:
        ax.set_visible(False)
    for ax, response in zip(axes.flat, responses, strict=False):
        part = effects[effects["response"] == response]
        unit = part["unit"].iloc[0]
        effect_panel(ax, part, f"{response} ({unit})", 1.0 if unit == "ratio" else 0.0, colours)
    for ax in axes[:, 1:].flat:
        if all(len(effects[effects["response"] == r]) == lines for r in responses):
            ax.set_yticklabels([])
    return fig


def loss_curves(curves: Any, configs: Any, used: Mapping[str, str]) -> Any:
    """Training loss against tokens, small multiples: one panel per configuration, or per set of target modules when
    there are more than 20. The other curves stay behind in grey. Returns the figure."""
    many = len(configs) > 20
    panels = configs.groupby("target_modules").groups if many else {c: [c] for c in configs.index}
    fig, axes = panel_grid(len(panels), columns=2 if many else 4, height=2.6 if many else 1.7)
    for ax, (title, members) in zip(axes, panels.items(), strict=True):
        for config, curve in curves.groupby("config"):
            mine = config in members
            shade = "0.85" if not mine else colour(config, used) if config in used else COLOURS["lowest loss"]
            ax.plot(
                curve["tokens_seen"] / 1000,
                curve["train_loss"],
                color=shade,
                lw=(0.6 if many else 1.3) if mine else 0.4,
                zorder=2 + mine,
            )
        role = used.get(title)
        ax.set_title(f"{title} ({role})" if role else str(title), fontsize=8)
        ax.tick_params(labelsize=7)
    fig.supxlabel("tokens seen (thousands)", fontsize=9)
    fig.supylabel("training loss (nats per token)", fontsize=9)
    return fig


def tau_map(ax: Any, taus: Any) -> None:
    """Kendall tau between every two orderings as a small annotated table in colour."""
    ax.imshow(taus, vmin=-1, vmax=1, cmap="PuOr")
    places = range(len(taus))
    for i in places:
        for j in places:
            value = taus.iloc[i, j]
            ax.text(j, i, f"{value:+.2f}" if i != j else "1", ha="center", va="center",
                    fontsize=9, color="white" if abs(value) > 0.7 else "black")  # fmt: skip
    ax.set_xticks(places, taus.columns, fontsize=8, rotation=20)
    ax.set_yticks(places, taus.columns, fontsize=8)
    ax.set_title("Kendall tau between orderings", fontsize=9)
    ax.grid(visible=False)


def bias_panel(ax: Any, measures: Any) -> None:
    """Measures of each judge (columns judge, metric, value, low, high; shares between 0 and 1) with intervals."""
    names = list(dict.fromkeys(measures["metric"]))
    judges = list(dict.fromkeys(measures["judge"]))
    for k, judge in enumerate(judges):
        part = measures[measures["judge"] == judge].set_index("metric").reindex(names)
        places = np.arange(len(names)) + (k - (len(judges) - 1) / 2) * 0.7 / max(len(judges), 2)
        bars = np.maximum(0, [part["value"] - part["low"], part["high"] - part["value"]])
        ax.errorbar(part["value"], places, xerr=np.nan_to_num(bars), fmt="o", markersize=4, label=judge)
    ax.axvline(0.5, color="0.5", lw=0.8)
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    ax.set(xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6))
    ax.set_title("each judge with itself (share)", fontsize=9)
    ax.legend(fontsize=8, loc="lower left")


def energy_by_component(energy: Any, configs: Sequence[str]) -> Any:
    """Wide table for `energy_bars` from energy tables of the training window: Wh and kind per component, the total with
    its interval. A component without a meter or estimate stays missing."""
    train = energy[(energy["window"] == "train") & (energy["kind"] != "none")].set_index("config")
    columns = {}
    for component in ("cpu", "gpu", "total"):
        rows = train[train["component"] == component].reindex(configs)
        columns |= {f"{component}_wh": rows["gross_j"].astype(float) / 3600, f"{component}_kind": rows["kind"]}
    columns |= {"low_wh": rows["low_j"].astype(float) / 3600, "high_wh": rows["high_j"].astype(float) / 3600}
    return pd.DataFrame(columns).rename_axis("config")


def kinds_text(bars: Any) -> str:
    """`estimated`, `measured`, `estimated and measured`: every kind that stands in the bars."""
    kinds = {kind for component in ("cpu", "gpu") for kind in bars[f"{component}_kind"].dropna()}
    return " and ".join(sorted(kinds)) or "not metered"


# ---------------------------------------------------------------- one judge


def meetings(met: pd.DataFrame) -> Any:
    """A figure of how often configurations meet: `met` has the first seat as index, the second as columns."""
    import matplotlib.pyplot as plt

    levels = np.arange(met.to_numpy().max() + 2) - 0.5
    fig, ax = plt.subplots(figsize=(5.5, 4.5))
    colours = plt.get_cmap("viridis", len(levels) - 1)
    image = ax.imshow(met.where(~np.eye(len(met), dtype=bool)), cmap=colours, vmin=levels[0], vmax=levels[-1])
    ax.set_xticks(range(len(met)), met.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(met)), met.index, fontsize=8)
    ax.set(title="How often two configurations meet", xlabel="second seat", ylabel="first seat")
    ax.grid(False)
    fig.colorbar(image, ticks=range(0, len(levels) - 1, max(1, len(levels) // 8)))
    return fig


def ranking_intervals(table: pd.DataFrame, title: str) -> Any:
    """A figure of scores with intervals and ranks, best at the top; `table` as judge.ranking.with_anchors gives it.

    The axis is that of the configurations: an anchor far outside it stands at the rim, with its score in words.
    """
    import matplotlib.pyplot as plt

    rows = table.dropna(subset=["score"]).sort_values("score", ignore_index=True)
    ranked = rows[~rows["is_anchor"].astype(bool)]
    reach = max(ranked["high"].max() - ranked["low"].min(), 1.0)
    left, right = ranked["low"].min() - reach / 2, ranked["high"].max() + reach / 2
    fig, ax = plt.subplots(figsize=(8, 1.2 + 0.28 * len(rows)))
    for y, row in rows.iterrows():
        low, high = (row["score"] if pd.isna(row[side]) else row[side] for side in ("low", "high"))
        shade, shown = ("0.5", float(np.clip(row["score"], left, right))) if row["is_anchor"] else ("C0", row["score"])
        ax.plot(np.clip([low, high], left, right), [y, y], color=shade, lw=2)
        outside = shown != row["score"]
        marker = ("<" if shown == left else ">") if outside else "D" if row["is_anchor"] else "o"
        ax.plot(shown, y, marker, color=shade)
        anchor = f"anchor, score {row['score']:+.1f}" if outside else "anchor"
        text = anchor if row["is_anchor"] else f"rank {row['rank']} [{row['rank_low']} to {row['rank_high']}]"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.axvline(0, color="0.6", lw=1)
    ax.set_yticks(range(len(rows)), rows["config"])
    ax.set(xlabel="score, log-odds (mean of the ranked configurations = 0)", title=title)
    return fig


def win_rates(rates: pd.DataFrame) -> Any:
    """A figure of how often the row won against the column, a tie as a half; shares between 0 and 1."""
    import matplotlib.pyplot as plt

    size = 2.2 + 0.34 * len(rates)
    fig, ax = plt.subplots(figsize=(size + 0.9, size))
    image = ax.imshow(rates, cmap="PuOr", vmin=0, vmax=1)
    for i, j in np.argwhere(rates.notna().to_numpy()):
        shade = "white" if abs(rates.iloc[i, j] - 0.5) > 0.35 else "black"
        ax.text(j, i, f"{100 * rates.iloc[i, j]:.0f}", ha="center", va="center", fontsize=7, color=shade)
    ax.set_xticks(range(len(rates)), rates.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(rates)), rates.index, fontsize=8)
    ax.set_title("Row wins against column, %")
    ax.grid(False)
    fig.colorbar(image, shrink=0.7)
    return fig


def shares_with_intervals(measures: pd.DataFrame, title: str) -> Any:
    """A figure of shares (columns metric, value, low, high, n); the line at one half is no preference."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 2.4))
    bars = np.abs([measures["value"] - measures["low"], measures["high"] - measures["value"]])
    ax.errorbar(measures["value"], range(len(measures)), xerr=bars, fmt="o", capsize=3)
    ax.axvline(0.5, color="0.6", lw=1)
    labels = [f"{row.metric.replace('_', ' ')} (n = {row.n})" for row in measures.itertuples()]
    ax.set_yticks(range(len(measures)), labels)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(measures) - 0.5, -0.5), xlabel="share", title=title)
    return fig
