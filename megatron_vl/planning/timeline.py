"""Draw a simulated schedule as an SVG picture: what each pipeline rank computes, and where it waits.

A lane is a pipeline rank, and time runs to the right. A long step repeats itself, so its middle is left out; the break
is marked. The picture is one of fixed proportions: on a narrow screen the style enlarges the letters, for which every
text has room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from megatron_vl.planning.plans import Plan
from megatron_vl.planning.schedule import Pipeline
from megatron_vl.planning.simulation import StageTimes, Timed, Timeline, simulate

_WIDTH, _LEFT, _RIGHT = 1200, 24, 24
_TITLE, _LANE, _BAR, _LEGEND = 96, 84, 36, 120
_MOST_DRAWN = 4
"""Micro-batches that are drawn for each pipeline rank."""
_FORWARD = ("#2b6cb0", "#4f97d8", "#7fb6e6", "#a9cef0")
_BACKWARD = ("#c05621", "#dd7a3d", "#ec9f6d", "#f4c09c")
"""Fills of passes, by chunk."""
_STYLE = """
text { font-family: system-ui, sans-serif; font-size: 16px; fill: #1a202c; }
.title { font-size: 20px; font-weight: 600; }
.number { font-size: 12px; fill: #ffffff; text-anchor: middle; }
.light { fill: #1a202c; }
.wait { fill: #dde3ec; }
.gap { stroke: #4a5568; stroke-width: 2; stroke-dasharray: 5 5; }
@media (max-width: 700px) {
  text { font-size: 30px; }
  .title { font-size: 34px; }
  .number { display: none; }
  .wide { display: none; }
}
"""


@dataclass(frozen=True)
class Lane:
    """What is said of a pipeline rank."""

    label: str
    units: str
    """What it holds; left out on a narrow screen."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn."""

    title: str
    lanes: tuple[Lane, ...]
    timeline: Timeline
    cut: float | None
    """Time at which micro-batches are left out, if there are more than are drawn."""
    left_out: int

    @classmethod
    def of(cls, pipeline: Pipeline, times: Sequence[StageTimes], title: str, lanes: Sequence[Lane]) -> Drawing:
        """Simulate a schedule with at most as many micro-batches as a picture can show."""
        shown = min(pipeline.micro_batches, max(8, _MOST_DRAWN * pipeline.size))
        timeline = simulate(replace(pipeline, micro_batches=shown), times)
        left_out = pipeline.micro_batches - shown
        return cls(title, tuple(lanes), timeline, timeline.end / 2 if left_out else None, left_out)


def draw_plan(plan: Plan, gpu: str) -> str:
    """Return the schedule of a plan as SVG text."""
    one = plan.candidate
    stages = one.layout.stages
    pipeline = Pipeline(stages.pipeline_size, stages.virtual_size, one.micro_batches)
    lanes = []
    for rank in range(pipeline.size):
        chunks = plan.time.stages[rank :: pipeline.size]
        busy = pipeline.micro_batches * sum(own.forward + own.backward for own in chunks) / plan.time.timeline.end
        units = "; ".join(stage.units or "head" for stage in stages.stages_of_rank(rank))
        lanes.append(Lane(f"pipeline rank {rank}, busy {busy:.0%}", units))
    waits = plan.time.bubble / plan.time.seconds
    title = f"{one.micro_batches} micro-batches in {plan.time.seconds:.2f} s on {gpu}, bubble {waits:.1%}"
    return draw(Drawing.of(pipeline, plan.time.stages, title, lanes))


def draw(drawing: Drawing) -> str:
    """Return the picture as SVG text."""
    height = _TITLE + _LANE * len(drawing.lanes) + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" '
        'aria-labelledby="title">',
        f'<title id="title">{escape(drawing.title)}</title>',
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text class="title" x="{_LEFT}" y="44">{escape(drawing.title)}</text>',
        *_lanes(drawing),
        *_break(drawing),
        *_legend(drawing, _TITLE + _LANE * len(drawing.lanes)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lanes(drawing: Drawing) -> Iterator[str]:
    scale = (_WIDTH - _LEFT - _RIGHT) / drawing.timeline.end
    for rank, (lane, passes) in enumerate(zip(drawing.lanes, drawing.timeline.ranks, strict=True)):
        top = _TITLE + _LANE * rank
        units = f'<tspan class="wide">: {escape(lane.units)}</tspan>'
        yield f'<text x="{_LEFT}" y="{top}">{escape(lane.label)}{units}</text>'
        bar = top + 12
        yield f'<rect class="wait" x="{_LEFT}" y="{bar}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_BAR}"/>'
        for one in passes:
            yield from _pass(one, bar, scale)


def _pass(one: Timed, top: float, scale: float) -> Iterator[str]:
    left, width = _LEFT + one.start * scale, (one.end - one.start) * scale
    fills = _BACKWARD if one.what.is_backward else _FORWARD
    fill = fills[min(one.what.chunk, len(fills) - 1)]
    yield (
        f'<rect x="{left:.2f}" y="{top}" width="{width:.2f}" height="{_BAR}" fill="{fill}" stroke="#ffffff" '
        'stroke-width="0.6"/>'
    )
    number = str(one.what.micro_batch + 1)
    if width >= 9 * len(number):
        light = " light" if one.what.chunk > 1 else ""
        yield f'<text class="number{light}" x="{left + width / 2:.2f}" y="{top + _BAR / 2 + 4:.1f}">{number}</text>'


def _break(drawing: Drawing) -> Iterator[str]:
    if drawing.cut is None:
        return
    x = _LEFT + drawing.cut * (_WIDTH - _LEFT - _RIGHT) / drawing.timeline.end
    bottom = _TITLE + _LANE * len(drawing.lanes) - 24
    yield f'<line class="gap" x1="{x:.1f}" y1="{_TITLE - 12}" x2="{x:.1f}" y2="{bottom}"/>'


def _legend(drawing: Drawing, top: float) -> Iterator[str]:
    entries = (("forward", _FORWARD[0]), ("backward", _BACKWARD[0]), ("waiting (bubble)", "#dde3ec"))
    for number, (name, fill) in enumerate(entries):
        x = _LEFT + 300 * number
        yield f'<rect x="{x}" y="{top}" width="26" height="26" fill="{fill}" stroke="#a0aec0"/>'
        yield f'<text x="{x + 38}" y="{top + 21}">{name}</text>'
    rest = "Numbers are micro-batches; lighter colors are later chunks of a rank."
    if drawing.left_out:
        rest = f"Dashed line: {drawing.left_out} more micro-batches of the same pattern are left out."
    yield f'<text x="{_LEFT}" y="{top + 76}">{rest}</text>'
