"""Labels beside the points of a figure, where they cover least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from telco_nb.analysis.statistics import Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_ANGLES = np.radians([35, 145, -35, -145, 0, 180, 90, -90])  # diagonals first: whiskers are upright
LABEL_DISTANCES = (7, 13, 22, 34)  # points


def label_points(ax: Axes, x: Numbers, y: Numbers, labels: Sequence[str], size: float = 8) -> None:
    """Write each label beside its point, where it covers the fewest points, other labels and edges of the panel.

    The labels are placed one after the other. The limits of the axes must be final.
    """
    from matplotlib.patheffects import withStroke

    ax.figure.canvas.draw()
    scale = ax.figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y]))
    panel = ax.get_window_extent()
    directions = np.column_stack([np.cos(LABEL_ANGLES), np.sin(LABEL_ANGLES)])
    placed: list[tuple[np.ndarray, np.ndarray]] = []
    for place, point, label in zip(zip(x, y, strict=True), points, labels, strict=True):
        half = np.array([0.29 * size * len(label), 0.55 * size]) * scale
        centres = np.vstack([point + directions * (distance * scale + half) for distance in LABEL_DISTANCES])
        low, high = centres - half, centres + half
        covered = ((points[:, None] > low - 3) & (points[:, None] < high + 3)).all(axis=2).sum(axis=0)
        overlaps = sum(((old_high > low) & (old_low < high)).all(axis=1).astype(int) for old_low, old_high in placed)
        outside = ((low < panel.min) | (high > panel.max)).any(axis=1)
        best = int(np.argmin(2 * covered + 3 * overlaps + 4 * outside + 0.01 * np.arange(len(low))))
        placed.append((low[best], high[best]))
        is_far = math.hypot(*(centres[best] - point)) / scale > 26
        arrow = {"arrowstyle": "-", "color": "0.6", "lw": 0.6} if is_far else None
        offset = (low[best] - point) / scale
        text = ax.annotate(label, place, offset, textcoords="offset points", fontsize=size, arrowprops=arrow, zorder=5)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable on points and whiskers
