"""A loss says what it depends on, and does not depend on how the checkpoint came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli import convert, evaluate_loss
from megatron_vl.config.schema import RunConfig
from tests.helpers.data.prepared import SEQ_LENGTH, make_data_set
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, tiny_config
from tests.parallel.saving import save_fresh_weights

Loss = Callable[..., dict[str, Any]]


def losses(start: Start, arguments: list[str]) -> dict[str, Any]:
    options = evaluate_loss._build_parser().parse_args(arguments)
    with start.topology(evaluate_loss.parallel_config(options)) as topology:
        return evaluate_loss._losses(options, topology)


@pytest.fixture
def loss(ranks: RankPools, tmp_path: Path) -> Loss:
    prefix = make_data_set(tmp_path)

    def evaluate(checkpoint: Path, *flags: str) -> dict[str, Any]:
        arguments = ["--checkpoint", str(checkpoint), "--data-path", prefix, *flags]
        found: dict[str, Any] = ranks(1).run(losses, arguments)[0][prefix]
        assert found.pop("checkpoint") == str(checkpoint)
        return found

    return evaluate


def converted(start: Start, checkpoint: Path, folder: Path) -> Path:
    assert convert.main(["export", str(checkpoint), str(folder / "hf")]) == 0
    assert convert.main(["import", str(folder / "hf"), str(folder / "imported")]) == 0
    return folder / "imported" / "iter_0000000"


def saved(ranks: RankPools, root: Path, config: RunConfig) -> Path:
    path: Path = ranks(1).run(save_fresh_weights, config, root)[0]
    return path


def test_how_a_checkpoint_was_trained_does_not_count(ranks: RankPools, loss: Loss, tmp_path: Path) -> None:
    """Rows end above the native length, so a padded row or a span over several samples would stretch the base."""
    language = replace(MODEL.language, native_seq_length=SEQ_LENGTH // 2)
    base = replace(tiny_config(), model=replace(MODEL, language=language))
    plain = saved(ranks, tmp_path / "plain", base)
    data = replace(base.data, attention_span="segment", seq_length=8 * SEQ_LENGTH, blank_images=True)
    other = replace(base, data=data, training=replace(base.training, micro_batch_size=1, global_batch_size=2))
    others = saved(ranks, tmp_path / "other", other)
    imported = ranks(1).run(converted, others, tmp_path)[0]
    for flags in ((), ("--attention-span", "row")):
        expected = loss(plain, *flags)
        assert loss(others, *flags) == expected
        assert loss(imported, *flags) == expected
        small = loss(imported, *flags, "--micro-batch-size", "1")
        assert small.pop("loss") == pytest.approx(expected["loss"], rel=1e-6)
        assert small == {key: value for key, value in expected.items() if key != "loss"}


def test_what_changes_a_loss_stands_beside_it(ranks: RankPools, loss: Loss, tmp_path: Path) -> None:
    checkpoint = saved(ranks, tmp_path / "saved", tiny_config())
    plain = loss(checkpoint)
    assert {key: value for key, value in plain.items() if key not in ("loss", "num_tokens")} == {
        "attention_span": "segment",
        "seq_length": SEQ_LENGTH,
        "blank_images": False,
        "bf16": False,
        "image_size": MODEL.image_size,
        "native_seq_length": 2048,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    changes = {"attention_span": ["--attention-span", "row"], "bf16": ["--bf16"], "blank_images": ["--blank-images"]}
    for name, flags in changes.items():
        changed = loss(checkpoint, *flags)
        assert changed["loss"] != plain["loss"]
        # The piece of a document that goes on in another row has one more target where it sees what is before it.
        follows = {"num_tokens"} if name == "attention_span" else set()
        assert {key for key in plain if plain[key] != changed[key]} == {"loss", name} | follows


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--micro-batch-size 0", "--micro-batch-size 0: expected at least 1"),
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: expected at least 1"),
        ("--tensor-model-parallel-size 2", "the run has 1 ranks"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_loss.main(["--checkpoint", "c", "--data-path", "d", *flags.split()]) == 2
    assert said in capsys.readouterr().err
