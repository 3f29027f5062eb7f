"""Plots as inline SVG: the loss of one stage, with the change to another layout marked; histograms.

Figures use matplotlib's object interface, without pyplot, so that no global state changes. Text stays text, so that it
takes the page's font, and the ids are the same in every run.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_vl.report.layout_phases import find_layout_phases
from megatron_vl.report.records import TrainingRecord

WITH_IMAGES_COLOR = "#2563eb"
WITHOUT_IMAGES_COLOR = "#9a6700"
MUTED_COLOR = "#6b7280"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_vl",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": MUTED_COLOR,
    "ytick.color": MUTED_COLOR,
}


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a window around each value, a thirtieth of the series wide and narrower towards the ends.

    The window is centered, so that earlier values do not raise a falling curve.
    """
    reach = len(values) // 60
    result = []
    for i in range(len(values)):
        half = min(reach, i, len(values) - 1 - i)
        window = values[i - half : i + half + 1]
        result.append(sum(window) / len(window))
    return result


def loss_figure(with_images: Sequence[TrainingRecord], without_images: Sequence[TrainingRecord] = ()) -> str:
    """Plot the training loss of a stage, with the blind model's for comparison. Return one <svg> element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.subplots()
        if without_images:
            _plot_loss(axes, without_images, WITHOUT_IMAGES_COLOR, "blind model")
        _plot_loss(axes, with_images, WITH_IMAGES_COLOR, "this model")
        for before, after in zip(find_layout_phases(with_images), find_layout_phases(with_images)[1:], strict=False):
            _mark_hand_over(axes, (before.last + after.first) / 2, after.layout)
        axes.set_xlabel("step", color=MUTED_COLOR)
        axes.set_ylabel("training loss", color=MUTED_COLOR)
        if without_images:
            axes.legend(loc="upper center", frameon=False)
        return _to_svg(figure)


def histogram_figure(edges: Sequence[float], counts: Sequence[int], *, label: str, unit: str = "rows") -> str:
    """Plot how often values lie between neighboring ``edges``. Return one <svg> element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6, 2.2), layout="constrained")
        axes = figure.subplots()
        axes.stairs(counts, edges, fill=True, color=WITH_IMAGES_COLOR)
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.0f}"))
        axes.set_xlabel(label, color=MUTED_COLOR)
        axes.set_ylabel(unit, color=MUTED_COLOR)
        return _to_svg(figure)


def _plot_loss(axes: Axes, records: Sequence[TrainingRecord], color: str, label: str) -> None:
    steps = [record.iteration for record in records]
    losses = [record.lm_loss for record in records]
    axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses), color=color, linewidth=1.6, label=label)


def _mark_hand_over(axes: Axes, step: float, layout: str) -> None:
    """Draw a dashed line, and the new layout's name above the plot."""
    axes.axvline(step, color=MUTED_COLOR, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"from here {layout}",
        xy=(step, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED_COLOR,
    )


def _to_svg(figure: Figure) -> str:
    """Serialize a figure as an <svg> element without the XML header and without metadata."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
