"""Train: set up, loop, validate, save.

Read :func:`train` first. One trainer serves all stages of Qwen-VL; their recipes contain what differs between them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch

from megatron_vl.checkpoint import contents, store
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.config.validation_sets import validation_sets
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.data.loading.plan import DataPlan
from megatron_vl.errors import ExitStatus
from megatron_vl.log import log_rank_0
from megatron_vl.parallel.agreement import by_rank_0, together
from megatron_vl.parallel.rng import seed_all
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.training import ending, not_finite
from megatron_vl.training.feed import Feed, open_feed
from megatron_vl.training.metrics import Layout, Reporter
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model
from megatron_vl.training.profiling import Profiler
from megatron_vl.training.resume import find_start, hold_save_directory, load_start
from megatron_vl.training.start import check_nothing_later, check_same_rows
from megatron_vl.training.state import TrainState
from megatron_vl.training.step import evaluate, train_step
from megatron_vl.training.stopping import Stop, StopRequest, ending_at_sigterm


def train(config: RunConfig) -> ExitStatus:
    """Train by the configuration, on every rank. Return how the run has ended.

    The caller has called ``prepare_process`` before it imported this module.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, for faults that can be found then.
    """
    with Topology(config.parallel) as topology:
        return _train(config, topology)


def _train(config: RunConfig, topology: Topology) -> ExitStatus:
    config = _count_batch_in_rows(config, topology.world_size)
    validate(config, world_size=topology.world_size, cuda=torch.cuda.is_available())
    with hold_save_directory(config):
        ending.forget_last(config, topology)
        with ending.recording_errors(config, topology, step=lambda: None), ending_at_sigterm(config, topology):
            trainer = Trainer.set_up(config, topology)
        try:
            with ending.recording_errors(config, topology, step=lambda: trainer.state.step):
                end = trainer.loop()
        finally:
            trainer.close()
        ending.record(config, topology, end.status, step=trainer.state.step, reason=end.reason)
        return end.status


@dataclass
class Trainer:
    """The objects of a run on this rank. Only the fields ``state`` and ``saved_step`` change."""

    config: RunConfig
    topology: Topology
    model: ParallelModel
    feed: Feed
    validation: Feed | None
    reporter: Reporter
    state: TrainState
    saved_step: int
    """Step of the last checkpoint that was written or loaded."""
    profiler: Profiler | None = None

    @classmethod
    def set_up(cls, config: RunConfig, topology: Topology) -> Trainer:
        """Build the model, load the configured checkpoint, and open the data."""
        seed_all(config.training.seed)
        torch.use_deterministic_algorithms(config.training.deterministic_mode)
        feed = open_feed(config, topology, data_path=config.data.data_path)
        validation = None
        if config.data.valid_data_path:
            validation = open_feed(config, topology, data_path=config.data.valid_data_path)
        start = find_start(config, topology)
        model = build_parallel_model(config, topology, fresh_weights=start is None)
        state = TrainState()
        if start:
            state = load_start(start, model, config=config, topology=topology)
        state = check_same_rows(state, DataPlan.read(config).fingerprint)
        together(lambda: check_nothing_later(state, config))
        layout = Layout(_describe(config, topology), topology.world_size)
        log_rank_0(f"layout {layout.text}, pipeline {resolve_layout(config)}, from step {state.step}")
        for line in feed.describe(_rows_of_run(config, state)):
            log_rank_0(line)
        reporter = together(lambda: Reporter(config, layout=layout, state=state, active=topology.rank == 0))
        profiler = Profiler(config, model, topology) if config.logging.profile else None
        return cls(config, topology, model, feed, validation, reporter, state, state.step, profiler)

    def loop(self) -> Stop:
        """Train to the last step, or until something asks to stop. Save in either case; return the reason."""
        first, last = self.state.step, self.config.training.train_iters
        if first >= last:
            log_rank_0(f"nothing left to do: step {first} is done, and --train-iters is {last}")
            return Stop("nothing was left to do", ExitStatus.DONE)
        ending.warn_of_unsaved_steps(self.config, self.state)
        with StopRequest(self.config.training, self.topology) as stop:
            steps = self.feed.steps(self.state.consumed_rows)
            while self.state.step < last:
                self.advance(next(steps))
                self.validate_if_due(stop)
                early = stop.check(self.state.step) if self.state.step < last else None
                ended = early is not None or self._at_end()
                if self._checkpoint_due() or ended:
                    with self.reporter.not_training():
                        self.save()
                self.write_profile(ended=ended)
                if early:
                    log_rank_0(f"stopping after step {self.state.step}: {early.reason}")
                    break
        ending.warn_of_unsaved_steps(self.config, self.state)
        return early or Stop("the last step", ExitStatus.DONE)

    def advance(self, batches: list[MicroBatch]) -> None:
        """Train one step."""
        before = self.state
        with self.profiler.step(before.step, batches) if self.profiler else nullcontext():
            result = train_step(self.model, batches, config=self.config, topology=self.topology, step=before.step)
        self.state = self.state.advanced(
            rows=self.config.training.global_batch_size,
            samples=result.counts.samples,
            tokens=result.counts.tokens,
            skipped=result.skipped,
        )
        self.reporter.step(self.state, result)
        if self.profiler and self.profiler.ends_at(self.state.step):
            with self.reporter.not_training():
                self.profiler.stop()
        if result.skipped:
            not_finite.describe_skipped(result, before, self.feed)
            not_finite.check_progress(self.state, self.config)

    def write_profile(self, *, ended: bool) -> None:
        """Write the profile after its last step, or when the run ends before that. A save that is due comes first."""
        if self.profiler and (ended or self.profiler.ends_at(self.state.step)):
            with self.reporter.not_training():
                self.profiler.write()

    def validate_if_due(self, stop: StopRequest) -> None:
        """Run the validation that is due after a step. A signal interrupts it, since the save is still to come."""
        if self.validation and (self._due(self.config.training.eval_interval) or self._at_end()):
            with self.reporter.not_training():
                self._validate(self.validation, stop)

    def _validate(self, feed: Feed, stop: StopRequest) -> None:
        """Compute and report the loss on each validation set."""
        losses = {}
        for number, (name, _) in enumerate(validation_sets(self.config)):
            steps = feed.one_pass(number, max_steps=self.config.training.eval_iters)
            until_asked = takewhile(lambda _: not stop.is_asked(), steps)
            loss = evaluate(self.model.wrapped, until_asked, topology=self.topology, encoder=self.model.encoder)
            losses[name] = loss.mean
            if stop.is_asked():
                log_rank_0(f"the validation after step {self.state.step} was left at a signal; it has no loss")
                return
        self.reporter.validation(self.state, losses)
        not_finite.describe_validation(losses, self.state)

    def save(self) -> None:
        """Write a checkpoint, if the configuration names a directory for it."""
        if self.config.checkpoint.save is None:
            return
        not_finite.check_before_save(self.model, self.topology, self.state.step)
        trained = contents.Trained(self.model.chunks, self.model.optimizer)
        root = Path(self.config.checkpoint.save)
        path = contents.save(trained, asdict(self.state), config=self.config, topology=self.topology, root=root)
        log_rank_0(f"saved {path}")
        self.saved_step = self.state.step
        if not self.state.skipped_in_a_row:
            by_rank_0(lambda: store.retain(root, self.config.checkpoint.keep_last))

    def close(self) -> None:
        """Stop the workers and flush the reports."""
        self.feed.close()
        if self.validation:
            self.validation.close()
        self.reporter.close()

    def _checkpoint_due(self) -> bool:
        """Return whether an interval has ended since the last checkpoint and the last step was not skipped."""
        interval = self.config.checkpoint.save_interval
        if not interval or self.state.step // interval == self.saved_step // interval:
            return False
        return self.state.skipped_in_a_row == 0

    def _due(self, interval: int | None) -> bool:
        return interval is not None and interval > 0 and self.state.step % interval == 0

    def _at_end(self) -> bool:
        return self.state.step == self.config.training.train_iters


def _count_batch_in_rows(config: RunConfig, world_size: int) -> RunConfig:
    """Convert a batch size in samples, the paper's unit, to rows; the manifest gives the mean samples per row."""
    counted, said = DataPlan.read(config).count_rows(config, world_size)
    if said:
        log_rank_0(said)
    return counted


def _rows_of_run(config: RunConfig, state: TrainState) -> int:
    """Return the number of rows that the run will have read at its last step, including those before a resume."""
    steps = max(config.training.train_iters - state.step, 0)
    return state.consumed_rows + steps * config.training.global_batch_size


def _describe(config: RunConfig, topology: Topology) -> str:
    virtual = f" x VP {topology.vp_size}" if topology.vp_size > 1 else ""
    sequence = " + SP" if config.parallel.sequence_parallel and topology.tp_size > 1 else ""
    vision = ", vision part on every rank" if config.parallel.vision_parallel == "data" else ""
    return f"TP {topology.tp_size}{sequence} x PP {topology.pp_size}{virtual} x DP {topology.dp_size}{vision}"
