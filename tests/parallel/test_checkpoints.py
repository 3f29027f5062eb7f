"""Checkpoints belong to no layout: what one saves, any other loads and exports, whatever pads its vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.backends.safe_metadata import MetadataUnpickler
from megatron_vl.checkpoint import store
from megatron_vl.checkpoint.tensors import METADATA_FILE, open_checkpoint
from megatron_vl.config.schema import RunConfig
from megatron_vl.conversion.checkpoints import write_checkpoint
from megatron_vl.conversion.convert import check_model, export_folder, import_folder
from megatron_vl.planning.vocabulary import padded_vocab_size
from tests.helpers.ranks import RankPools, Start
from tests.helpers.tiny import MODEL, tiny_config
from tests.parallel.saving import save_fresh_weights, train_steps
from tests.unit.conversion.samples import assert_same_bytes, read_with_libraries

ONE: dict[str, Any] = {}
TP4 = {"tensor_model_parallel_size": 4}
TP2_PP2_VP2 = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}


def _config(parallel: dict[str, Any], *, vocab_size: int) -> RunConfig:
    config = tiny_config(parallel={"use_distributed_optimizer": True} | parallel)
    return replace(config, model=replace(MODEL, language=replace(MODEL.language, vocab_size=vocab_size)))


@pytest.mark.parametrize("vocab_size", [500, 600])
def test_fresh_weights_of_two_layouts_export_to_the_same_bytes(
    ranks: RankPools, tmp_path: Path, vocab_size: int
) -> None:
    folders = []
    for name, size, parallel in (("one", 1, ONE), ("many", 4, TP2_PP2_VP2)):
        config = _config(parallel, vocab_size=vocab_size)
        checkpoint = ranks(size).run(save_fresh_weights, config, tmp_path / name)[0]
        tensors = open_checkpoint(checkpoint)
        check_model(tensors, config.model)
        export_folder(tensors, tensors.model, tmp_path / f"hf_{name}")
        folders.append(read_with_libraries(tmp_path / f"hf_{name}"))
    assert folders[0]["lm_head.weight"].shape[0] == vocab_size
    assert_same_bytes(folders[1], folders[0])


@pytest.fixture(scope="module")
def straight(ranks: RankPools) -> dict[int, list[float]]:
    """Losses of five steps in one process, for each size of the vocabulary."""
    return {size: ranks(1).run(train_steps, _config(ONE, vocab_size=size), 5, None, None)[0] for size in (500, 600)}


@pytest.mark.parametrize(
    ("vocab_size", "parallel"),
    [(500, TP4), (600, TP4), (600, TP2_PP2_VP2)],
    ids=["500-tp4", "600-tp4", "600-tp2-pp2-vp2"],
)
def test_training_goes_on_at_a_layout_that_pads_the_vocabulary_otherwise(
    ranks: RankPools, tmp_path: Path, straight: dict[int, list[float]], vocab_size: int, parallel: dict[str, Any]
) -> None:
    """500 rows are padded to 512 everywhere; 600 to 640 at TP 1, to 768 at TP 2, and to 1024 at TP 4."""
    assert [padded_vocab_size(600, size) for size in (1, 2, 4)] == [640, 768, 1024]
    one, many = _config(ONE, vocab_size=vocab_size), _config(parallel, vocab_size=vocab_size)
    expected = straight[vocab_size]
    assert ranks(1).run(train_steps, one, 2, tmp_path / "one", None)[0] == expected[:2]
    for losses in ranks(4).run(train_steps, many, 2, tmp_path / "many", tmp_path / "one"):
        assert losses == pytest.approx(expected[2:4], rel=1e-5)
    assert ranks(1).run(train_steps, one, 1, None, tmp_path / "many")[0] == pytest.approx(expected[4:], rel=1e-5)


def test_a_checkpoint_has_what_either_version_of_megatron_core_reads(ranks: RankPools, tmp_path: Path) -> None:
    """0.16.1 writes and needs ``common.pt``. 0.19 reads it, but writes what it holds only among the tensors."""
    config = _config(ONE, vocab_size=500)
    ranks(1).run(train_steps, config, 2, tmp_path / "trained", None)
    weights = ranks(1).run(save_fresh_weights, config, tmp_path / "weights")[0]
    common = torch.load(store.directory_of(tmp_path / "trained", 2) / "common.pt", weights_only=True)
    assert common["optimizer"] == {"param_groups": [{"step": 2}]}
    assert "optimizer" not in torch.load(weights / "common.pt", weights_only=True)


def test_padding_is_zero_after_a_change_of_layout(ranks: RankPools, tmp_path: Path) -> None:
    """Rows that only pad have no contents that could be carried from one layout to another."""
    config = _config(TP4, vocab_size=600)
    ranks(1).run(save_fresh_weights, _config(ONE, vocab_size=600), tmp_path / "one")
    ranks(4).run(train_steps, config, 1, tmp_path / "many", None)
    tensors = open_checkpoint(tmp_path / "many")
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        assert tensors[name].shape[0] == 1024
        assert torch.equal(tensors[name][600:], torch.zeros_like(tensors[name][600:]))


def import_on_rank(_: Start, folder: Path, root: Path) -> Path:
    """Import a folder; no topology, since the import makes its own."""
    return write_checkpoint(import_folder(folder), root)


def _entries(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says it holds: shape and type of each tensor, and the names of everything else."""
    with (checkpoint / METADATA_FILE).open("rb") as stream:
        described = MetadataUnpickler(stream).load().state_dict_metadata
    return {key: (getattr(e, "size", None), getattr(e, "properties", None)) for key, e in described.items()}


def test_what_is_streamed_is_what_megatron_core_writes(ranks: RankPools, tmp_path: Path) -> None:
    config = _config(ONE, vocab_size=600)
    written = ranks(1).run(save_fresh_weights, config, tmp_path / "written")[0]
    export_folder(open_checkpoint(written), config.model, tmp_path / "hf")
    streamed = ranks(1).run(import_on_rank, tmp_path / "hf", tmp_path / "streamed")[0]
    assert _entries(streamed) == _entries(written)
    assert_same_bytes(dict(open_checkpoint(streamed)), dict(open_checkpoint(written)))
    store.verify(streamed)  # the hash that was computed beside the writing is the file's
