"""Data sets of several blocks: made by any number of workers, killed, read, verified and replaced."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.data_files import unfinished_data_set
from megatron_vl.data.dataset.indexed import IndexedFile
from megatron_vl.data.dataset.manifest import manifest_path, read_manifest, verify_files
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.images.pixels import blank_pixels
from megatron_vl.data.loading.loader import DataShare, RowLoader
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.phases import Phase, Settings, run_phase
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.prepare.share import Share
from megatron_vl.data.prepare.workers import open_pool, this_process
from megatron_vl.errors import DataError
from megatron_vl.inspector.opening import open_store
from tests.helpers.data.jobs import RUN, SMALL_SLICES, command, hashes, recipe_file, run_tool
from tests.helpers.data.prepared import NUM_CAPTIONS, NUM_DOCUMENTS, make_data_set, png, run_config
from tests.unit.data.prepare.test_interrupted import DIES
from tests.unit.data.prepare.test_job import samples_of

BLOCKS = {"block_samples": 10}
"""42 samples make five blocks."""
PHASES: tuple[Phase, ...] = ("parts", "plan", "rows")


def test_the_samples_are_those_of_one_block(tmp_path: Path) -> None:
    one, several = make_data_set(tmp_path, "one"), make_data_set(tmp_path, "several", pack=BLOCKS)
    manifest, store = read_manifest(several), RowStore(several)
    assert len(manifest.blocks) == 5 and manifest.num_samples == NUM_CAPTIONS + NUM_DOCUMENTS
    assert manifest.sources == read_manifest(one).sources and manifest.counts == read_manifest(one).counts
    assert [block.num_rows for block in manifest.blocks] == [
        len(IndexedFile(f"{prefix}.tokens", with_modes=True)) for prefix in manifest.block_prefixes(several)
    ]
    expected, found = samples_of(RowStore(one)), samples_of(store)
    assert found.keys() == expected.keys()
    for key, pieces in expected.items():
        for column in (1, 3):  # tokens, images
            assert sum((piece[column] for piece in found[key]), []) == sum((piece[column] for piece in pieces), [])
    assert store.row_images.tolist() == [len(store.row(index).image_ids) for index in range(len(store))]
    assert store.row_lengths.sum() == manifest.num_tokens + manifest.num_segments + manifest.num_images + 2 * len(store)
    numbers = [image for index in range(len(store)) for image in store.row(index).image_ids.tolist()]
    assert sorted(set(numbers)) == list(range(manifest.num_stored_images))
    with pytest.raises(DataError, match=f"image {manifest.num_stored_images} of {manifest.num_stored_images}"):
        store.image(manifest.num_stored_images)
    verify_files(several)


@pytest.mark.usefixtures("small_slices")
def test_any_number_of_workers_gives_the_same_blocks(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw, pack=BLOCKS))
    prepare(recipe, raw / "one", progress=False)
    with open_pool(3) as pool:
        prepare(recipe, raw / "many", pool=pool, progress=False)
    assert len(hashes(raw / "one")) == 6 * len(read_manifest(raw / "one").blocks) + 2
    assert hashes(raw / "one") == hashes(raw / "many")


@pytest.mark.usefixtures("small_slices")
def test_phases_give_the_same_blocks(raw: Path) -> None:
    recipe = load_recipe(recipe_file(raw, pack=BLOCKS))
    prepare(recipe, raw / "one", progress=False)
    for phase in PHASES:
        shards = (0,) if phase == "plan" else (1, 0)
        for shard in shards:
            settings = Settings(Share(shard, len(shards)), this_process(), progress=False)
            outcome = run_phase(recipe, raw / "phases", phase, settings)
    assert outcome.manifest == read_manifest(raw / "phases") and len(read_manifest(raw / "phases").blocks) > 1
    assert hashes(raw / "one") == hashes(raw / "phases")


@pytest.mark.usefixtures("small_slices")
def test_a_killed_preparation_of_blocks_ends_with_the_same_bytes(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, replace = recipe_file(raw, pack={"block_samples": 25}), os.replace
    made: list[str] = []

    def told(source: Path, target: Path) -> None:
        made.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", told)
    prepare(load_recipe(recipe), raw / "undisturbed", progress=False)
    renamed = [place for place, name in enumerate(made) if name.startswith("undisturbed.")]
    written = [place for place, name in enumerate(made) if name.startswith("rows-") and name.endswith(".npz")]
    assert len(renamed) == 6 * len(read_manifest(raw / "undisturbed").blocks) + 2
    for survives in (written[len(written) // 2], renamed[len(renamed) // 2]):
        prefix = raw / str(survives) / "set"
        prefix.parent.mkdir()
        killed = run_tool(*command(recipe, prefix), code=SMALL_SLICES + DIES.format(survives=survives) + RUN)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not manifest_path(prefix).exists()
        prepare(load_recipe(recipe), prefix, progress=False)
        assert hashes(prefix) == hashes(raw / "undisturbed"), f"killed before rename {survives}"


def test_a_run_reads_the_images_of_every_block(tmp_path: Path) -> None:
    """Beside a data set of one block, whose images are numbered by themselves."""
    prefixes = [make_data_set(tmp_path, "several", pack=BLOCKS), make_data_set(tmp_path, "one")]
    loader = RowLoader(run_config(*prefixes, num_workers=1), share=DataShare(0, 1))
    sets = loader.data_sets
    for row_id in range(loader.num_rows):
        row, name, images = sets.read(row_id)
        store = sets.stores[[prefix in name for prefix in prefixes].index(True)]
        stored = [IndexedFile(f"{sets.image_files[file]}.images").read_bytes(image) for file, image in images.tolist()]
        assert stored == [store.image(image) for image in row.image_ids.tolist()]
    seen = set()
    for step in itertools.islice(loader.steps(0), 20):
        for batch in step.micro_batches:
            assert batch.pixels is not None
            seen |= {image.numpy().tobytes() for image in batch.pixels}
    blank = blank_pixels(1, 56)[0].tobytes()
    assert len(seen - {blank}) == NUM_CAPTIONS // 2, "each shade, decoded"
    loader.close()


def test_another_number_of_blocks_leaves_no_file_of_the_old_set(tmp_path: Path) -> None:
    prefix, other = make_data_set(tmp_path), tmp_path / "set.00000-of-00002x.tokens.bin"
    other.write_bytes(b"of somebody else")
    before = hashes(Path(prefix))
    make_data_set(tmp_path, pack={"block_samples": 21})
    names = set(hashes(Path(prefix)))
    assert ".00001-of-00002.tokens.bin" in names and ".tokens.bin" not in names and other.exists()
    make_data_set(tmp_path)
    assert hashes(Path(prefix)) == before


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path, pack=BLOCKS)
    keys = Path(f"{prefix}.00003-of-00005.keys.bin")
    content = keys.read_bytes()
    keys.write_bytes(content[:-1] + b"?")
    with pytest.raises(DataError, match=r"00003-of-00005\.keys\.bin: SHA-256"):
        verify_files(prefix)
    keys.unlink()
    with pytest.raises(DataError, match=r"00003-of-00005\.keys\.bin is missing"):
        RowStore(prefix)
    keys.write_bytes(content)
    values = json.loads(manifest_path(prefix).read_text())
    values["blocks"][0]["num_rows"] += 1
    values["blocks"][1]["num_rows"] -= 1
    manifest_path(prefix).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"00000-of-00005: \d+ rows and \d+ lists of keys"):
        RowStore(prefix)
    values["blocks"][1]["num_rows"] += 5
    manifest_path(prefix).write_text(json.dumps(values))
    with pytest.raises(DataError, match="but the blocks have"):
        read_manifest(prefix)
    values["format_version"] = 4
    manifest_path(prefix).write_text(json.dumps(values))
    with pytest.raises(DataError, match="format_version is 4, but there are 5 blocks"):
        read_manifest(prefix)
    manifest_path(prefix).unlink()
    unfinished = unfinished_data_set(prefix)
    assert unfinished is not None and "00000-of-00005.tokens.bin is there, but" in unfinished
    Path(f"{prefix}.00000-of-00005.tokens.bin").unlink()
    unfinished = unfinished_data_set(prefix)
    assert unfinished is not None and "00001-of-00005.tokens.bin is there, but" in unfinished


def test_the_prefix_of_a_block_is_no_data_set(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path, pack=BLOCKS)
    assert unfinished_data_set(f"{prefix}.00000-of-00005") == (
        f"{prefix}.00000-of-00005 is one block of the data set {prefix}; give that prefix"
    )


def test_the_inspector_knows_data_sets_of_blocks(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path, pack=BLOCKS)
    assert len(open_store(prefix)) == read_manifest(prefix).num_rows
    with pytest.raises(DataError, match=rf"there is {prefix}\."):
        open_store(f"{tmp_path}/other")


def test_an_image_in_several_blocks_is_stored_once_in_each(tmp_path: Path) -> None:
    """Every shade is in two captions, which follow each other."""
    prefix = make_data_set(tmp_path, pack={"block_samples": 3})
    store = RowStore(prefix)
    blocks, _ = store.locate_images(np.arange(store.manifest.num_stored_images))
    for block in range(len(store.manifest.blocks)):
        mine = [store.image(int(image)) for image in np.flatnonzero(blocks == block)]
        assert len(set(mine)) == len(mine)
    assert store.manifest.num_stored_images > NUM_CAPTIONS // 2
    assert {store.image(image) for image in range(len(blocks))} == {png(shade) for shade in range(NUM_CAPTIONS // 2)}
