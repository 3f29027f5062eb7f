"""Report a run: Megatron's log line, JSON lines, TensorBoard, Weights & Biases, and a progress bar.

Throughput counts useful work: tokens that are not padding, images that fill slots, and the floating-point operations
that the step requires given what is frozen (``planning/flops.py``; recomputation is not counted). Rank 0 reports. It
has every figure after the one reduction of the step.

Every step is in exactly one report. When a run ends, for whatever reason, the rest of the interval is reported. As in
Megatron-LM, the loss is the mean over the steps that changed the weights. Validating and saving take no training time.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_vl.config.schema import RunConfig
from megatron_vl.log import abandon_output, log_rank_0, write_line
from megatron_vl.planning.flops import FrozenParts, Work, step_flops
from megatron_vl.training.state import TrainState
from megatron_vl.training.step import Counts, LossSum, StepResult


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one report; rates are means over its steps."""

    iteration: int
    train_iters: int
    consumed_rows: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float
    """Mean per supervised token, without skipped steps; NaN if all steps were skipped."""
    learning_rate: float
    """The largest of all parameter groups, at the last of these steps."""
    smallest_learning_rate: float
    """Under layer-wise decay the rate of the first vision layers; otherwise equal to ``learning_rate``."""
    grad_norm: float
    elapsed_ms_per_iteration: float
    global_batch_size: int
    tokens_per_second: float
    images_per_second: float
    samples_per_second: float
    tflops_per_rank: float
    memory_gib: float
    skipped_iterations: int
    nan_iterations: int
    layout: str


@dataclass
class Window:
    """Sums over the steps since the last report."""

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    loss: LossSum = LossSum(0.0, 0)
    """Of the steps that changed the weights."""
    supervised: int = 0
    """Supervised tokens of all steps."""
    skipped: int = 0
    nan: int = 0
    counts: Counts = field(default_factory=Counts)

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.steps += 1
        if not result.skipped:
            self.loss = self.loss + result.loss
        self.supervised += result.loss.num_tokens
        self.skipped += result.skipped
        self.nan += not math.isfinite(result.loss.total)
        self.counts = self.counts + result.counts

    def summarize(self, state: TrainState, result: StepResult, *, config: RunConfig, layout: Layout) -> StepMetrics:
        """Return the metrics of these steps; ``result`` belongs to the last one."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        counts = self.counts
        work = Work(counts.images, counts.tokens, counts.squared_spans, self.supervised)
        flops = step_flops(config.model, FrozenParts.of(config.training), work)
        return StepMetrics(
            iteration=state.step,
            train_iters=config.training.train_iters,
            consumed_rows=state.consumed_rows,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            lm_loss=self.loss.mean,
            learning_rate=result.learning_rates.largest,
            smallest_learning_rate=result.learning_rates.smallest,
            grad_norm=result.grad_norm,
            elapsed_ms_per_iteration=1000.0 * seconds / self.steps,
            global_batch_size=config.training.global_batch_size,
            tokens_per_second=counts.tokens / seconds,
            images_per_second=counts.images / seconds,
            samples_per_second=counts.samples / seconds,
            tflops_per_rank=flops / seconds / layout.world_size / 1e12,
            memory_gib=_peak_memory_gib(),
            skipped_iterations=self.skipped,
            nan_iterations=self.nan,
            layout=layout.text,
        )


@dataclass(frozen=True)
class Layout:
    """The parallel layout of a run, for reports."""

    text: str
    world_size: int


class Sink(Protocol):
    """A destination of metrics."""

    def step(self, metrics: StepMetrics) -> None: ...

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def log_line(metrics: StepMetrics) -> str:
    """Format the metrics as Megatron-LM's log line, which scripts search for."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    parts = [
        f" [{now}] iteration {metrics.iteration:8d}/{metrics.train_iters:8d}",
        f"consumed samples: {metrics.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {metrics.elapsed_ms_per_iteration:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {metrics.tflops_per_rank:.4f}",
        f"learning rate: {metrics.learning_rate:.6E}",
        f"smallest learning rate: {metrics.smallest_learning_rate:.6E}",
        f"global batch size: {metrics.global_batch_size:5d}",
        f"lm loss: {metrics.lm_loss:.6E}",
        "loss scale: 1.0",
        f"grad norm: {metrics.grad_norm:.3f}",
        f"tokens/s: {metrics.tokens_per_second:.0f}",
        f"images/s: {metrics.images_per_second:.0f}",
        f"number of skipped iterations: {metrics.skipped_iterations:3d}",
        f"number of nan iterations: {metrics.nan_iterations:3d}",
    ]
    return " | ".join(parts) + " |"


class LogLine:
    """Megatron's log line on standard output."""

    def step(self, metrics: StepMetrics) -> None:
        write_line(log_line(metrics))

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            on = f" on {name}" if len(losses) > 1 else ""
            write_line(f" validation loss at iteration {iteration}{on} | lm loss value: {loss:.6E} |")

    def close(self) -> None:
        pass


class JsonLines:
    """One JSON object a line. Lines are appended, so a resumed run continues the same file.

    JSON cannot represent numbers that are not finite; they are written as null.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab", buffering=0)

    def step(self, metrics: StepMetrics) -> None:
        self._write({"time": time.time(), **asdict(metrics)})

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            record = {"time": time.time(), "iteration": iteration, "validation_set": name, "validation_loss": loss}
            self._write(record)

    def close(self) -> None:
        self._stream.close()

    def _write(self, record: dict[str, Any]) -> None:
        known = {key: None if _is_not_finite(value) else value for key, value in record.items()}
        line = json.dumps(known, allow_nan=False).encode() + b"\n"
        before = self._stream.seek(0, os.SEEK_END)
        if self._stream.write(line) != len(line):
            self._stream.truncate(before)  # no half line, to which a resumed run would append
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TensorBoard:
    """Scalars by iteration."""

    _SKIP = ("iteration", "train_iters", "layout")

    def __init__(self, directory: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory)

    def step(self, metrics: StepMetrics) -> None:
        for name, value in asdict(metrics).items():
            if name not in self._SKIP:
                self._writer.add_scalar(name.replace("_", "-"), value, metrics.iteration)

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            self._writer.add_scalar(_tag("validation-loss", name, losses), loss, iteration)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; offline unless the user has logged in."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        logged_in = wandb.api.api_key is not None
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.wandb_exp_name,
            config=asdict(config),
            mode="online" if logged_in else "offline",
        )

    def step(self, metrics: StepMetrics) -> None:
        self._run.log(asdict(metrics), step=metrics.iteration)

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        values = {_tag("validation_loss", name, losses): loss for name, loss in losses.items()}
        self._run.log(values, step=iteration)

    def close(self) -> None:
        self._run.finish()


class ProgressBar:
    """A bar that moves with every report; silent if standard error is not a terminal."""

    def __init__(self, *, first: int, last: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=last, initial=first, unit="step", disable=None, dynamic_ncols=True)

    def step(self, metrics: StepMetrics) -> None:
        self._bar.set_postfix(loss=f"{metrics.lm_loss:.3f}", tokens_s=f"{metrics.tokens_per_second:.0f}", refresh=False)
        self._bar.update(metrics.iteration - self._bar.n)

    def validation(self, iteration: int, losses: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        self._bar.close()


class Reporter:
    """Collect steps, and pass their metrics to every sink, on rank 0."""

    def __init__(self, config: RunConfig, *, layout: Layout, state: TrainState, active: bool) -> None:
        self._config, self._layout = config, layout
        self._window = Window()
        self._last: tuple[TrainState, StepResult] | None = None
        """The last step that is not in a report yet."""
        self._sinks = _open_sinks(config, state) if active else []

    def step(self, state: TrainState, result: StepResult) -> None:
        """Count a step, and report when the interval is full or the run ends."""
        self._window.add(result)
        self._last = state, result
        if state.step % self._config.logging.log_interval == 0 or state.step == self._config.training.train_iters:
            self._report()

    def validation(self, state: TrainState, losses: Mapping[str, float]) -> None:
        """Report the loss of each validation set by its name."""
        self._tell(lambda sink: sink.validation(state.step, losses))

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Exclude the time spent inside this context from all rates."""
        started = time.perf_counter()
        yield
        self._window.started += time.perf_counter() - started

    def close(self) -> None:
        """Report the remaining steps, and flush the sinks."""
        self._report()
        self._tell(lambda sink: sink.close())

    def _report(self) -> None:
        if self._last is None:
            return
        metrics = self._window.summarize(*self._last, config=self._config, layout=self._layout)
        self._tell(lambda sink: sink.step(metrics))
        self._window, self._last = Window(), None

    def _tell(self, say: Callable[[Sink], None]) -> None:
        """Call ``say`` on every sink. Drop a sink that cannot write any more; training continues."""
        for sink in tuple(self._sinks):
            try:
                say(sink)
            except OSError as error:
                self._sinks.remove(sink)
                if isinstance(error, BrokenPipeError):
                    abandon_output()
                reason = f"{type(sink).__name__} gets no more reports: {error.strerror or error}; training goes on"
                log_rank_0(reason, level=logging.WARNING)


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tag(kind: str, name: str, losses: Mapping[str, float]) -> str:
    """Return the tag of a chart; it includes the name of the validation set if there are several."""
    return f"{kind}/{name}" if len(losses) > 1 else kind


def _open_sinks(config: RunConfig, state: TrainState) -> list[Sink]:
    logging, save = config.logging, config.checkpoint.save
    sinks: list[Sink] = [LogLine()]
    path = logging.log_file or (str(Path(save) / "metrics.jsonl") if save else None)
    if path:
        sinks.append(JsonLines(Path(path)))
    if logging.tensorboard_dir:
        sinks.append(TensorBoard(logging.tensorboard_dir))
    if logging.wandb_project:
        sinks.append(WeightsAndBiases(config))
    if logging.progress:
        sinks.append(ProgressBar(first=state.step, last=config.training.train_iters))
    log_rank_0(f"metrics go to {path or 'the terminal only'}")
    return sinks


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
