"""What ends a preparation: a source that gives nothing, a score that no record has; scores in any form count."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vl.cli import prepare as command
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.dataset.indexed import IndexedFile
from megatron_vl.data.dataset.manifest import manifest_path, read_manifest
from megatron_vl.data.formats.values import as_number
from megatron_vl.data.loading.loader import DataSets, DataShare, RowLoader
from megatron_vl.data.loading.plan import DataPlan
from megatron_vl.data.sources.grounded_caption import GroundedCaption
from megatron_vl.data.sources.img2dataset import Img2Dataset
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.prepared import RANKS, make_data_set, png, run_config, write_raw
from tests.helpers.data.reading import JPEG, kept, read_all, reasons, write_tar

CAPTIONS = {"name": "captions", "type": "img2dataset", "path": "captions"}
DOCUMENTS = {"name": "documents", "type": "text", "path": "text.jsonl"}


def write_scored(folder: Path, scores: list[Any]) -> Path:
    """A tar of captions, each with its score."""
    members = []
    for number, score in enumerate(scores):
        fields = json.dumps({"similarity": score, "caption": f"caption {number}"}).encode()
        members += [(f"{number}.png", png(number)), (f"{number}.json", fields)]
    write_tar(folder / "captions" / "0.tar", members)
    return folder


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.25, 0.25), ("0.1", 0.1), (" 1e-1 ", 0.1), (".5", 0.5), ("-3.", -3.0), (Decimal("0.31"), 0.31)],
)
def test_a_number_counts_in_any_form(value: Any, number: float) -> None:
    assert as_number(value) == number


@pytest.mark.parametrize("value", [None, True, "", "high", "0,3", "1_000", "nan", "inf", "1e999", 10**400, [1], "٣"])
def test_what_is_no_number_is_none(value: Any) -> None:
    assert as_number(value) is None


def test_a_score_as_text_is_filtered_by(tmp_path: Path) -> None:
    """``"0.1"`` once passed a threshold of 0.28."""
    write_scored(tmp_path, [0.1, "0.1", "0.35", 0.35, None, "high", True])
    sources = [{**CAPTIONS, "score_field": "similarity"}]
    manifest = read_manifest(make_data_set(tmp_path, sources=sources, filters={"min_score": 0.28}))
    assert manifest.sources[0].kept == 3, "two of 0.35, and the one without"
    assert {skip.reason: skip.count for skip in manifest.skips} == {"low_score": 2, "bad_score": 2}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [(["0.2", 0.4], [0.2, 0.4]), (0.3, [0.3, 0.3]), ([None, 0.4], [None, 0.4]), ([0.1, 0.2, 0.3], None)],
)
def test_scores_belong_to_captions(tmp_path: Path, scores: Any, expected: list[float | None] | None) -> None:
    """One each, or one for all; three scores of two captions are nobody's."""
    fields = json.dumps({"caption": ["a cat", "a dog"], "clip": scores}).encode()
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.json", fields)])
    items = read_all(Img2Dataset("s", tmp_path, score_field=("clip",), captions="all"))
    if expected is None:
        assert reasons(items) == {"bad_score": 2}
    else:
        assert [sample.score for sample in kept(items)] == expected


@pytest.mark.parametrize("filters", [{}, {"min_score": 0.2}, {"min_score": 0.2, "drop_unscored": True}])
def test_a_score_that_no_record_has_is_an_error(tmp_path: Path, filters: dict[str, Any]) -> None:
    write_scored(tmp_path, [0.3, 0.4])
    sources = [{**CAPTIONS, "score_field": "similiarity", "filters": filters}]
    with pytest.raises(DataError, match="captions"):
        make_data_set(tmp_path, sources=sources)
    sources = [{**CAPTIONS, "type": "coyo"}]
    assert read_manifest(make_data_set(tmp_path, sources=sources)).num_samples == 2, "nobody asked for a score"
    sources[0]["filters"] = {"min_score": 0.2}
    with pytest.raises(DataError, match="none of the 2 records has a score in 'clip_similarity_vitb32' or 'clip"):
        make_data_set(tmp_path, sources=sources)


def test_a_threshold_without_scores_is_an_error(tmp_path: Path) -> None:
    write_raw(tmp_path)
    for changes in (
        {"sources": [CAPTIONS], "filters": {"min_score": 0.2}},
        {"sources": [{**CAPTIONS, "filters": {"min_score": 0.2}}]},
    ):
        with pytest.raises(ConfigError, match=r"min_score: no .* has a score"):
            make_data_set(tmp_path, **changes)


def grounded(folder: Path, **fields: Any) -> GroundedCaption:
    entry = ["0", 5.0, "0.1", 0.1, 0.5, Decimal("0.5"), "0.9"]
    meta = {"caption": "a cat on a mat", "ref_exps": [entry], **fields}
    write_tar(folder / "0.tar", [("0.jpg", JPEG), ("0.json", json.dumps(meta, default=str).encode())])
    return GroundedCaption("g", folder, min_score=0.5)


def test_numbers_of_a_phrase_count_in_any_form(tmp_path: Path) -> None:
    (sample,) = kept(read_all(grounded(tmp_path)))
    assert [(region.text, region.boxes) for region in sample.regions] == [("a cat", ((0.1, 0.1, 0.5, 0.5),))]
    halves = [[0, 5.5, 0.1, 0.1, 0.5, 0.5, 0.9]]
    assert reasons(read_all(grounded(tmp_path, ref_exps=halves))) == {"bad_span": 1}, "no half of a character"
    nothing = [[0, 5, 0.1, 0.1, 0.5, 0.5, float("nan")]]
    assert reasons(read_all(grounded(tmp_path, ref_exps=nothing))) == {"bad_region": 1}


@pytest.mark.parametrize("form", [int, float, str])
def test_a_padded_image_is_refused_in_whatever_form_its_size_is(tmp_path: Path, form: type[Any]) -> None:
    """A size of 600.0, as LAION has it, once counted as unknown."""
    sizes = {"width": 256, "height": 256, "original_width": 600, "original_height": 400}
    items = read_all(grounded(tmp_path, **{name: form(size) for name, size in sizes.items()}))
    assert reasons(items) == {"aspect_changed": 1}


# Sources without samples


def test_a_source_that_gives_nothing_ends_the_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({
        "sources": [{**CAPTIONS, "caption_field": "top_caption"}, DOCUMENTS], "seq_length": 64, "num_queries": 4,
        "num_bpe_tokens": RANKS,
    }))  # fmt: skip
    arguments = [str(tmp_path / "data.json"), "--output", str(tmp_path / "set"), "--workers", "1", "--quiet"]
    assert command.main(arguments) == 2
    told = capsys.readouterr().err
    assert "nothing is kept of source 'captions'" in told and "--allow-empty" in told
    assert "30 of 30 left out for no_caption, first 00000.tar/0000: top_caption empty or absent of txt" in told
    assert not list(tmp_path.glob("set.*s*on")), "no data set"
    assert command.main([*arguments, "--allow-empty"]) == 0
    assert "warning: nothing of source 'captions' is in the rows" in capsys.readouterr().err
    assert read_manifest(tmp_path / "set").num_samples > 0


# Ids beyond the vocabulary


def test_ids_beyond_the_vocabulary_are_refused_when_the_set_is_opened(tmp_path: Path) -> None:
    prefix = make_data_set(tmp_path)
    manifest = read_manifest(prefix)
    last = SpecialTokens(RANKS).img_pad
    assert manifest.largest_token == last, "the padding of an image's slots is the last id"
    path = manifest_path(prefix)
    path.write_text(path.read_text().replace(f'"largest_token": {last}', f'"largest_token": {last + 1}'))
    with pytest.raises(DataError, match=f"holds the token {last + 1}, but .* ends at {last}"):
        DataSets(run_config(prefix), [prefix])
    with pytest.raises(DataError, match="holds the token"):  # what train.py --check and the launcher read
        DataPlan.read(run_config(prefix))


def test_a_damaged_row_is_named_and_no_index_error(tmp_path: Path) -> None:
    """Of a set whose files were changed, or that was prepared before the largest id was noted."""
    prefix = make_data_set(tmp_path, sources=[DOCUMENTS])
    path = manifest_path(prefix)
    values = json.loads(path.read_text())
    del values["largest_token"]
    path.write_text(json.dumps(values))
    tokens = IndexedFile(f"{prefix}.tokens", with_modes=True)
    row = np.frombuffer(tokens.read_bytes(3), dtype=np.int32)
    content = Path(f"{prefix}.tokens.bin").read_bytes()
    changed = np.concatenate([row[:-1], np.array([150_000], dtype=np.int32)])
    Path(f"{prefix}.tokens.bin").write_bytes(content.replace(row.tobytes(), changed.tobytes()))
    loader = RowLoader(run_config(prefix), share=DataShare(0, 1))
    with pytest.raises(DataError, match="set, row 3: holds the token 150000, but the vocabulary ends at"):
        list(loader.one_pass())


def test_weights_that_draw_nothing_are_an_error(tmp_path: Path) -> None:
    """A thousandth of thirty captions is none: once a traceback."""
    write_raw(tmp_path)
    with pytest.raises(DataError, match="of 30 that were kept, none is drawn. Raise weight"):
        make_data_set(tmp_path, sources=[{**CAPTIONS, "weight": 0.001}])
