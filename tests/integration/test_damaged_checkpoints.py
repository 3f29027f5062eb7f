"""A damaged checkpoint: --auto-resume goes on from the newest whole one, and one that was named is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.tensors import open_checkpoint
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import CheckpointError, DamagedCheckpointError
from tests.helpers.listening import heard
from tests.helpers.prepared import SEQ_LENGTH
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import tiny_config
from tests.integration.running import RunRecord, train_on_rank


def _config(prefix: str, *, steps: int, world_size: int = 2, **checkpoint: Any) -> RunConfig:
    return tiny_config(
        data={"data_path": (prefix,), "seq_length": SEQ_LENGTH, "attention_span": "segment"},
        training={"train_iters": steps, "micro_batch_size": 1, "global_batch_size": 4},
        parallel={"use_distributed_optimizer": True, "tensor_model_parallel_size": world_size},
        optimizer={"lr_decay_iters": 3},
        logging={"log_interval": 1, "progress": False},
        checkpoint=checkpoint,
    )


@pytest.fixture(scope="module")
def run(ranks: RankPools, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """A directory with the checkpoints of steps 1 and 2 of two ranks, and the losses of a run to step 3."""
    root = tmp_path_factory.mktemp("run")
    config = _config(prefix, steps=2, save=str(root / "saved"), save_interval=1)
    ranks(2).run(train_on_rank, config)
    whole: RunRecord = ranks(2).run(train_on_rank, _config(prefix, steps=3))[0]
    return root / "saved", whole


def train_and_listen(start: Start, config: RunConfig) -> tuple[RunRecord, list[str]]:
    """Train; also the warnings of this rank."""
    with heard() as warnings:
        return train_on_rank(start, config), warnings


def refusal(start: Start, config: RunConfig) -> str:
    """The error that this rank ends with; caught here, so that the processes can be used again."""
    with pytest.raises(CheckpointError) as caught:
        train_on_rank(start, config)
    return str(caught.value)


def _flip(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(bytes(content))

    return damage


def _truncate(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-10])

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def _empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _foreign_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("no checkpoint at all")


def _other_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(store.directory_of(checkpoint.parent, 1), checkpoint)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "byte of rank 0's shard": (_flip("__0_0.distcp"), "__0_0.distcp: SHA-256"),
    "byte of rank 1's shard": (_flip("__1_0.distcp"), "__1_0.distcp: SHA-256"),
    "truncated shard": (_truncate("__1_0.distcp"), "__1_0.distcp: .* bytes, but .* were written"),
    "shard away": (_remove("__0_0.distcp"), "__0_0.distcp: missing"),
    "metadata": (_flip(".metadata"), ".metadata: SHA-256"),
    "common.pt": (_flip("common.pt"), "common.pt: SHA-256"),
    "state.json": (_flip("state.json"), "state.json: SHA-256"),
    "config.yaml": (_flip("config.yaml"), "config.yaml: SHA-256"),
    "rng.pt": (_truncate("rng.pt"), "rng.pt: .* bytes"),
    "manifest unreadable": (_truncate(store.MANIFEST), "manifest.json: cannot be read"),
    "manifest away": (_remove(store.MANIFEST), "manifest.json: missing"),
    "empty directory": (_empty, "manifest.json: missing"),
    "foreign file": (_foreign_file, "manifest.json: missing"),
    "another step": (_other_step, "manifest.json: is of step 1, under the name"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_auto_resume_goes_on_from_the_newest_whole_one(
    ranks: RankPools, prefix: str, tmp_path: Path, run: tuple[Path, RunRecord], damage: str
) -> None:
    saved, whole = run
    root = tmp_path / "saved"
    shutil.copytree(saved, root)
    broken, (spoil, said) = store.directory_of(root, 2), DAMAGES[damage]
    spoil(broken)
    left = sorted(path.name for path in broken.iterdir()) if broken.is_dir() else []
    config = _config(prefix, steps=3, save=str(root), save_interval=1, auto_resume=True)
    (record, warnings), _ = ranks(2).run(train_and_listen, config)
    assert record.losses == whole.losses[1:] and record.hashes == whole.hashes
    assert store.steps_in(root) == [1, 2, 3]
    for step in (1, 2, 3):
        store.verify(store.directory_of(root, step))
    (aside,) = root.glob("damaged-iter_0000002-*")
    assert (sorted(path.name for path in aside.iterdir()) if aside.is_dir() else []) == left
    (warning,) = warnings
    assert str(aside) in warning and "goes on from step 1" in warning
    assert re.search(f"DAMAGED CHECKPOINT {broken}: {broken}/{said}", warning)


@pytest.mark.parametrize("damage", ["byte of rank 1's shard", "manifest unreadable", "manifest away"])
@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_one_that_was_named_is_refused(
    ranks: RankPools, prefix: str, tmp_path: Path, run: tuple[Path, RunRecord], damage: str, flag: str
) -> None:
    root = tmp_path / "saved"
    shutil.copytree(run[0], root)
    broken, (spoil, said) = store.directory_of(root, 2), DAMAGES[damage]
    spoil(broken)
    for path in (broken, root):
        for told in ranks(2).run(refusal, _config(prefix, steps=3, **{flag: str(path)})):
            assert re.search(f"{said}.*Nothing else was loaded.*{store.directory_of(root, 1)}", told)
    with pytest.raises(DamagedCheckpointError, match=said):
        open_checkpoint(broken)  # as conversion does
    assert store.steps_named(root) == [1, 2] and not list(root.glob("damaged-*"))


def test_where_none_is_whole_nothing_is_changed_and_nothing_started_over(
    ranks: RankPools, prefix: str, tmp_path: Path, run: tuple[Path, RunRecord]
) -> None:
    root = tmp_path / "saved"
    shutil.copytree(run[0], root)
    _flip("__0_0.distcp")(store.directory_of(root, 1))
    _remove(store.MANIFEST)(store.directory_of(root, 2))
    config = _config(prefix, steps=3, save=str(root), auto_resume=True)
    for told in ranks(2).run(refusal, config):
        assert f"no checkpoint in {root} is whole, and nothing was changed" in told
    assert store.steps_named(root) == [1, 2]


def test_a_checkpoint_that_has_vanished_is_missed(
    ranks: RankPools, prefix: str, tmp_path: Path, run: tuple[Path, RunRecord]
) -> None:
    root = tmp_path / "saved"
    shutil.copytree(run[0], root)
    shutil.rmtree(store.directory_of(root, 2))
    config = _config(prefix, steps=2, world_size=1, save=str(root), auto_resume=True)
    ((_, warnings),) = ranks(1).run(train_and_listen, config)
    assert len(warnings) == 1 and "names step 2, which is not there; newest is step 1" in warnings[0]


def test_something_in_the_place_of_a_later_checkpoint_is_seen_at_the_start(
    ranks: RankPools, prefix: str, tmp_path: Path
) -> None:
    """A directory without manifest is no checkpoint, but a save of its step would fail after hours."""
    store.directory_of(tmp_path, 2).mkdir()
    (told,) = ranks(1).run(refusal, _config(prefix, steps=2, world_size=1, save=str(tmp_path)))
    assert "already holds checkpoints" in told
