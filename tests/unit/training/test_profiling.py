"""A profile: what it writes, for which steps and ranks, and that it changes no number."""

from __future__ import annotations

import gzip
import json
import logging
import os
import pickle
import re
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vl.config.profile import profile_folder
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import validate
from megatron_vl.errors import ConfigError, ExitStatus
from megatron_vl.planning.calibration import calibrate
from megatron_vl.planning.gpus import find_gpu, read_rates
from megatron_vl.planning.stage_profile import StageProfile
from megatron_vl.training import profiling
from megatron_vl.training.stopping import Stop
from megatron_vl.training.trainer import Trainer
from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.integration.running import train_on_rank

STAGES = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
EVERYWHERE = {"tensor_model_parallel_size": 2, "vision_parallel": "data"}


def profiled(prefix: str, folder: Path | None, *, parallel: dict[str, Any] | None = None, **logging: Any) -> RunConfig:
    """Four steps of eight rows, of which the second and the third are profiled."""
    chosen = {"profile": True, "profile_step_start": 1, "profile_step_end": 3, "profile_dir": str(folder)} | logging
    return tiny_config(
        data={"data_path": (prefix,), "seq_length": SEQ_LENGTH},
        training={"train_iters": 4, "micro_batch_size": 1},
        parallel=parallel or {},
        logging={"progress": False, "log_interval": 1} | (chosen if folder else {}),
    )


def written(folder: Path) -> StageProfile:
    (path,) = folder.glob("stage_times_*.json")
    profile = read_rates(path).stage_times
    assert profile is not None
    return profile


def events_of(path: Path, category: str) -> list[dict[str, Any]]:
    """The events of a kind in a trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and event.get("cat") == category]


def ranges(path: Path) -> Counter[str]:
    """The ranges of our names in a trace, and how often each is there."""
    names = [event["name"] for event in events_of(path, "user_annotation")]
    return Counter(name for name in names if name.startswith(("step ", "forward stage", "backward stage", "vision")))


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, STAGES), (2, EVERYWHERE)])
def test_a_profile_changes_no_number(
    ranks: RankPools, prefix: str, tmp_path: Path, size: int, parallel: dict[str, Any]
) -> None:
    plain = ranks(size).run(train_on_rank, profiled(prefix, None, parallel=parallel))
    assert ranks(size).run(train_on_rank, profiled(prefix, tmp_path, parallel=parallel)) == plain
    assert plain[0].losses[0] != plain[0].losses[-1]


def test_every_pass_of_every_stage_is_timed(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    config = profiled(prefix, tmp_path, parallel=STAGES, profile_ranks=("1",))
    works = ranks(2).run(train_noting, config)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank1_steps2-3.pt.trace.json.gz",
        "stage_times_steps2-3.json",
    ]
    profile = written(tmp_path)
    assert (profile.device, profile.world_size, profile.traced_ranks, profile.steps) == ("CPU", 2, (1,), (2, 3))
    assert profile.config == config
    assert [(row.step, row.images, row.supervised) for row in profile.micro_batches] == works
    assert len({row.images for row in profile.micro_batches}) > 1
    assert all(len(row.forward) == len(row.backward) == 4 for row in profile.micro_batches)
    assert all(seconds > 0 for row in profile.micro_batches for seconds in (*row.forward, *row.backward))
    passes = [
        f"{way} stage {stage} micro-batch {n}" for way in ("forward", "backward") for stage in (1, 3) for n in range(8)
    ]
    expected = Counter(dict.fromkeys(passes, 2) | {"step 2": 1, "step 3": 1})
    assert ranges(tmp_path / "rank1_steps2-3.pt.trace.json.gz") == expected


def train_noting(start: Start, config: RunConfig) -> list[tuple[int, int, int]]:
    """Step, images and supervised tokens of each micro-batch of the steps that are profiled."""
    with start.topology(config.parallel) as topology:
        trainer = Trainer.set_up(config, topology)
        seen: list[tuple[int, int, int]] = []
        advance, logging = trainer.advance, config.logging

        def noting(batches: Any) -> None:
            if logging.profile_step_start <= trainer.state.step < logging.profile_step_end:
                seen.extend((trainer.state.step + 1, one.num_images, one.targets.numel()) for one in batches)
            advance(batches)

        trainer.advance = noting  # type: ignore[method-assign]
        trainer.loop()
        trainer.close()
        return seen


def test_every_rank_times_its_share_of_the_vision_part(ranks: RankPools, prefix: str, tmp_path: Path) -> None:
    ranks(2).run(train_noting, profiled(prefix, tmp_path, parallel=EVERYWHERE, use_pytorch_profiler=False))
    assert [path.name for path in tmp_path.iterdir()] == ["stage_times_steps2-3.json"]
    profile = written(tmp_path)
    assert profile.traced_ranks == () and [(one.rank, one.step) for one in profile.vision] == [
        (0, 2), (0, 3), (1, 2), (1, 3)
    ]  # fmt: skip
    assert all(one.forward > 0 and one.backward > 0 for one in profile.vision)
    for step in profile.steps:
        shares = [one.images for one in profile.vision if one.step == step]
        assert max(shares) - min(shares) <= 1 and sum(shares) > 0
    found = calibrate(profile, replace(find_gpu("h100"), host_seconds=1e-9))
    assert [stage.name for stage in found.stages] == ["stage 0 (L*4)", "vision part on every rank"]
    assert found.factors.vision.forward > 10, "a CPU is slower than an H100"


def test_a_run_that_ends_within_the_steps_writes_those_that_it_has(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    config = profiled(prefix, tmp_path, profile_step_end=9)
    ranks(1).run(train_noting, config)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rank0_steps2-4.pt.trace.json.gz", "stage_times_steps2-4.json"}
    assert written(tmp_path).steps == (2, 3, 4)


@pytest.mark.parametrize("asked", [None, signal.SIGTERM], ids=["to the end", "SIGTERM"])
def test_a_profile_that_cannot_be_written_ends_no_run(
    ranks: RankPools, prefix: str, tmp_path: Path, asked: int | None
) -> None:
    """Its folder is a file. The checkpoint that is due after its last step is written, and the status stays."""
    folder, save = tmp_path / "taken", tmp_path / "save"
    folder.touch()
    config = profiled(prefix, folder, profile_ranks=("1",))
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(save), save_interval=3))
    ends = ranks(2).run(train_with_warnings, config, asked)
    expected = Stop("SIGTERM", ExitStatus.STOPPED) if asked else Stop("the last step", ExitStatus.DONE)
    assert [end for end, _ in ends] == [expected, expected]
    text = f"{folder}: File exists"
    for _, (above, line, below) in ends:  # these ranks have no launcher, so that each takes itself for rank 0
        assert line == (
            f"THE PROFILE OF STEPS 2 TO 3 IS NOT COMPLETE: {folder} cannot be written to (rank 1: {text}; "
            f"rank 0: {text}); no training step is lost by it"
        )
        assert above == below == "!" * len(line)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000003", "iter_0000004"][: 1 if asked else 2]


def train_with_warnings(start: Start, config: RunConfig, asked: int | None) -> tuple[Stop, list[str]]:
    """Train; return the end and the warnings. Rank 1 gets the signal in the third step."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vl")
    logger.addHandler(handler)
    try:
        with start.topology(config.parallel) as topology:
            trainer = Trainer.set_up(config, topology)
            advance = trainer.advance

            def signalled(batches: Any) -> None:
                advance(batches)
                if asked and trainer.state.step == 3 and topology.rank == 1:
                    os.kill(os.getpid(), asked)

            trainer.advance = signalled  # type: ignore[method-assign]
            end = trainer.loop()
            trainer.close()
            return end, said
    finally:
        logger.removeHandler(handler)


def test_the_save_comes_before_the_profile_and_is_not_in_the_trace(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    config = profiled(prefix, tmp_path / "profile")
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(tmp_path / "save"), save_interval=3))
    assert ranks(1).run(order_of_writes, config) == [["stop", "save", "write", "save", "write"]]


def order_of_writes(start: Start, config: RunConfig) -> list[str]:
    """What happens after the steps."""
    with start.topology(config.parallel) as topology:
        trainer = Trainer.set_up(config, topology)
        profiler, said = trainer.profiler, list[str]()

        def note(name: str, act: Callable[[], None]) -> None:
            said.append(name)
            act()

        for owner, name in ((profiler, "stop"), (trainer, "save"), (profiler, "write")):
            setattr(owner, name, partial(note, name, getattr(owner, name)))
        trainer.loop()
        trainer.close()
        return said


@pytest.mark.parametrize(
    ("logging", "cuda", "said"),
    [
        ({"profile_step_start": 12}, False, "profile_step_start 12 is not below logging.profile_step_end 12"),
        ({"profile_step_start": 2000, "profile_step_end": 2001}, False, "is not below training.train_iters 10"),
        ({"profile_ranks": ("0", "2")}, False, "'2' is no rank of this run; expected numbers from 0 to 1"),
        ({"profile_ranks": ("-1",)}, False, "'-1' is no rank of this run"),
        ({"record_memory_history": True}, False, "there is no CUDA device here"),
        ({"profile_dir": None}, False, "nothing says where to write: add --save or --profile-dir"),
        ({"profile": False}, True, "profile_step_start has no effect without logging.profile"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(logging: dict[str, Any], cuda: bool, said: str) -> None:
    usual = {"profile": True, "profile_dir": "here", "profile_step_start": 2}
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(tiny_config(logging=usual | logging), world_size=2, cuda=cuda)


def test_a_profile_is_beside_the_checkpoints_unless_a_directory_is_given() -> None:
    assert profile_folder(tiny_config(checkpoint={"save": "run"})) == Path("run/profile")
    assert profile_folder(tiny_config(checkpoint={"save": "run"}, logging={"profile_dir": "x"})) == Path("x")


def test_on_cuda_the_ranges_are_nvtx_s_and_memory_is_recorded(tmp_path: Path) -> None:
    """With stand-ins for what needs a device."""
    config = tiny_config(logging={"profile": True, "record_memory_history": True, "use_pytorch_profiler": False})
    said: list[str] = []

    def snapshot() -> dict[str, list[int]]:
        said.append("snapshot")
        return {"segments": [1]}

    def record(**options: Any) -> None:
        said.append("forget" if options.get("enabled", "all") is None else "remember")

    with ExitStack() as stand_ins:
        for name, stand_in in (
            ("cuda.is_available", lambda: True),
            ("cuda.memory._record_memory_history", record),
            ("cuda.memory._snapshot", snapshot),
            ("cuda.nvtx.range_start", lambda name: said.append(name) or 7),  # type: ignore[func-returns-value]
            ("cuda.nvtx.range_end", lambda number: said.append(f"end {number}")),
            ("cuda.profiler.start", lambda: said.append("profile")),
            ("cuda.profiler.stop", lambda: said.append("stop")),
        ):
            stand_ins.enter_context(mock.patch(f"torch.{name}", stand_in))
        trace = profiling.Trace(config)
        for _ in range(2):
            trace.start()
            with trace.range("step 1"):
                said.append("work")
        trace.stop()
        assert said[-2:] == ["snapshot", "forget"]
        trace.stop()
        trace.write(tmp_path, "rank0_steps1-2")
    step = ["step 1", "work", "end 7"]
    assert said == ["remember", "profile", *step, *step, "stop", "snapshot", "forget"]
    assert {path.name: pickle.loads(path.read_bytes()) for path in tmp_path.iterdir()} == {  # noqa: S301 - ours
        "rank0_steps1-2.memory.pickle": {"segments": [1]}
    }


def test_a_disk_that_is_full_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    class Full:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text("half", encoding="utf-8")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        profiling._write_trace(Full(), tmp_path / "rank0.json.gz")
    assert list(tmp_path.iterdir()) == []
