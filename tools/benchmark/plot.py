"""The picture of a run: cidfs beside each peer, a panel a measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmark.report import BY_KEY, Values, best

PANELS = (
    "ingest",
    "stored_mb",
    "mount",
    "walk_cold",
    "walk_warm",
    "daemon_mb",
    "small_cold",
    "small_warm",
    "ingest_peak_mb",
    "big_cold",
    "big_warm",
    "ingest_cpu",
)
COLUMNS = 3


def draw(values: Values, peers: Sequence[str], path: Path, title: str) -> None:
    """Draw the values that count into a PNG."""
    panels = [key for key in PANELS if key in values]
    rows = max(1, -(-len(panels) // COLUMNS))
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(13, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for key, axis in zip(panels, axes.flat, strict=False):
        measure = BY_KEY[key]
        found = [(peer, value) for peer in peers if (value := best(values, key, peer)) is not None]
        colours = ["tab:blue" if peer == "cidfs" else "lightgrey" for peer, _ in found]
        bars = axis.barh([peer for peer, _ in found], [value for _, value in found], color=colours)
        axis.bar_label(bars, fmt="{:,.3g}", fontsize=7, padding=2)
        axis.set_title(f"{measure.title}, {measure.unit}", fontsize=9)
        axis.set_xlabel("more is better" if measure.more_is_better else "less is better", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.18)
        axis.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
