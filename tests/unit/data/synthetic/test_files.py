"""The generator's folders: every reader reads them back whole; they are reproducible and never mixed up."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.cli.synthetic import main
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.registry import build_source
from megatron_vl.data.synthetic.config import FAMILIES, FULL, TINY, SyntheticConfig, scaled
from megatron_vl.data.synthetic.families import FINISH
from megatron_vl.data.synthetic.generate import generate
from megatron_vl.errors import ConfigError, DataError
from tests.helpers.data.reading import read_all

COUNTS = (
    ("caption", 25),
    ("grounded_caption", 12),
    ("vqa", 15),
    ("refexp", 14),
    ("ocr", 13),
    ("chat", 11),
    ("text", 30),
    ("photos", 1),
)
SMALL = dataclasses.replace(TINY, counts=COUNTS, samples_per_shard=10)
SOURCES = {
    "caption": {"type": "img2dataset", "path": "caption"},
    "photos": {"type": "img2dataset", "path": "photos"},
    "grounded_caption": {"type": "grounded_caption", "path": "grounded_caption"},
    "vqa": {
        "type": "vqa",
        "questions": "vqa/questions.json",
        "annotations": "vqa/annotations.json",
        "image_root": "vqa/images",
        "image_pattern": "{image_id:012d}.jpg",
    },
    "refexp": {"type": "refexp", "path": "refexp/refexp.json", "image_root": "refexp/images"},
    "ocr": {"type": "ocr", "path": "ocr"},
    "chat": {"type": "qwen_vl_chat", "path": "chat/chat.json", "image_root": "chat"},
    "text": {"type": "text", "path": "text"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "train"
    generate(SMALL, out, progress=False)
    return out


def read_family(folder: Path, family: str) -> list[Sample]:
    source = build_source({"name": family, **SOURCES[family]}, where=family, root=folder)
    items = read_all(source)
    assert all(isinstance(item, Sample) for item in items), [i for i in items if not isinstance(i, Sample)][:3]
    return [item for item in items if isinstance(item, Sample)]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_every_family_is_read_back_without_a_skip(folder: Path, family: str) -> None:
    if family == "photos":
        pytest.importorskip("skimage")
    samples = read_family(folder, family)
    meta = json.loads((folder / "meta.json").read_text())
    assert len(samples) == meta["counts"][family] > 0
    assert len({sample.key for sample in samples}) == len(samples)
    if family != "text":
        assert all(len(s.images) == 1 and s.images[0].data[:2] == b"\xff\xd8" for s in samples)


def test_tars_have_the_published_layout(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "caption").iterdir()) == [
        f"0000{i}{end}" for i in range(3) for end in (".tar", "_stats.json")
    ]
    with tarfile.open(folder / "caption" / "00002.tar") as archive:
        names = archive.getnames()
        meta = json.load(archive.extractfile("000020.json"))
        text = archive.extractfile("000020.txt").read().decode()
    assert names[:4] == ["000020.jpg", "000020.json", "000020.txt", "000021.jpg"]
    assert len(names) == 15
    assert meta["caption"] == text
    assert (meta["key"], meta["status"], meta["width"]) == ("000020", "success", 84)
    assert json.loads((folder / "caption" / "00002_stats.json").read_text())["successes"] == 5


def test_grounded_phrases_match_the_scene_named_in_the_url(folder: Path) -> None:
    with tarfile.open(folder / "grounded_caption" / "00000.tar") as archive:
        urls = [json.load(archive.extractfile(n))["url"] for n in archive.getnames() if n.endswith(".json")]
    for sample, url in zip(read_family(folder, "grounded_caption"), urls, strict=False):
        objects = re.findall(r"(small|big) (\w+ \w+) (\d+),(\d+)", url)
        for region, (size, name, x, y) in zip(sample.regions, objects, strict=True):
            side = {"small": 28, "big": 56}[size]
            expected = [int(x) / 84, int(y) / 84, (int(x) + side) / 84, (int(y) + side) / 84]
            assert region.boxes[0] == pytest.approx(expected, abs=1e-5)
            assert region.text.startswith(f"a {size} {name} at the ")
            assert region.span is not None and sample.text[slice(*region.span)] == region.text


def test_vqa_files_follow_vqav2(folder: Path) -> None:
    questions = json.loads((folder / "vqa" / "questions.json").read_text())
    annotations = json.loads((folder / "vqa" / "annotations.json").read_text())
    assert {"info", "license", "task_type", "data_type", "data_subtype"} <= set(questions)
    assert (questions["data_subtype"], len(questions["questions"])) == ("train", 30)
    assert [q["question_id"] for q in questions["questions"][:3]] == [0, 1, 1000]
    for annotation in annotations["annotations"]:
        assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
        assert annotation["answer_type"] in ("number", "other")


def test_heldout_data_of_any_seed_share_no_scene_with_training(tmp_path: Path) -> None:
    def urls(config: SyntheticConfig, name: str) -> set[str]:
        generate(dataclasses.replace(config, counts=(("caption", 400),)), tmp_path / name, progress=False)
        found = set()
        for path in sorted((tmp_path / name / "caption").glob("*.tar")):
            with tarfile.open(path) as archive:
                jsons = [n for n in archive.getnames() if n.endswith(".json")]
                found |= {json.load(archive.extractfile(n))["url"].partition("/")[2] for n in jsons}
        return found

    train = urls(TINY, "train")
    heldout = urls(dataclasses.replace(TINY, split="heldout"), "heldout")
    assert len(train) > 150 and len(heldout) > 80
    assert not train & heldout


def test_the_same_configuration_gives_the_same_bytes_with_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "again", num_workers=2, progress=False)
    assert digests(tmp_path / "again") == digests(folder)
    generate(dataclasses.replace(SMALL, seed=2), tmp_path / "other", progress=False)
    assert digests(tmp_path / "other")["caption/00000.tar"] != digests(folder)["caption/00000.tar"]


def test_parts_of_a_family_hold_different_samples(folder: Path) -> None:
    shards = [(folder / "caption" / f"0000{i}.tar").read_bytes() for i in range(2)]
    assert shards[0] != shards[1]
    images = {sample.images[0].data for sample in read_family(folder, "caption")}
    assert len(images) == 25, "no picture twice: ground and shade vary even where a scene repeats"


def test_a_complete_folder_is_kept_and_any_other_is_refused(folder: Path, tmp_path: Path) -> None:
    before = digests(folder)
    assert generate(SMALL, folder, progress=False).reused
    with pytest.raises(ConfigError, match="another configuration; remove it"):
        generate(dataclasses.replace(SMALL, seed=9), folder, progress=False)
    assert digests(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is no synthetic data set"):
        generate(SMALL, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    small = dataclasses.replace(SMALL, counts=(("caption", 3), ("chat", 2)))
    with monkeypatch.context() as patch:
        patch.setattr("megatron_vl.data.synthetic.families.converse", fail)
        with pytest.raises(KeyboardInterrupt):
            generate(small, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert not generate(small, tmp_path / "out", progress=False).reused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_full_profile_is_read_back(tmp_path: Path) -> None:
    page = dataclasses.replace(FULL.page, width=(200, 300), height=(200, 300), line_height=(14, 24))
    counts = (("caption", 2), ("vqa", 3), ("refexp", 2), ("ocr", 3), ("text", 5))
    config = dataclasses.replace(FULL, page=page, counts=counts)
    summary = generate(config, tmp_path / "full", progress=False)
    for family in ("caption", "vqa", "refexp", "ocr", "text"):
        assert len(read_family(tmp_path / "full", family)) == summary.counts[family] > 0


def test_wrong_configurations_are_named(tmp_path: Path) -> None:
    for change, message in (
        ({"counts": (("captions", 1),)}, "unknown family 'captions'; known are caption"),
        ({"counts": (("caption", -1),)}, "counts.caption is -1"),
        ({"heldout_percent": 0}, "heldout_percent is 0"),
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"page": dataclasses.replace(TINY.page, elastic=12.0)}, r"page\.elastic is 12\.0, expected 0 to less than 12"),
        (
            {"scene": dataclasses.replace(TINY.scene, sizes=(("huge", 99),))},
            "'huge' is 99 pixels in an image of 84",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(dataclasses.replace(TINY, **change), tmp_path / "x", progress=False)
    assert not list(tmp_path.iterdir())


def test_scaled_counts_keep_proportions() -> None:
    counts = dict(scaled(TINY.counts, 2100))
    assert sum(n for family, n in counts.items() if family not in ("text", "photos")) == pytest.approx(2100, abs=3)
    assert counts["text"] == round(20000 / 10) and counts["photos"] == 1


def test_the_command_takes_pictures_and_words_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("alpha beta gamma delta", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "pictures" / "red.png")
    counts = [f"--count={family}={int(family == 'ocr')}" for family in FAMILIES]
    files = ["--corpus-en", str(tmp_path / "words.txt"), "--background-dir", str(tmp_path / "pictures")]
    assert main([str(tmp_path / "d"), "--profile", "full", *counts, *files, "--no-progress"]) == 0
    (sample,) = read_family(tmp_path / "d", "ocr")
    assert set(sample.text.split()) <= {"alpha", "beta", "gamma", "delta"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-scenes", "0"], "--num-scenes 0: expected at least 1"),
        (["--num-scenes", "-5"], "--num-scenes -5: expected at least 1"),
        (["--num-workers", "0"], "--num-workers 0: expected at least 1"),
        (["--count", "ocr=²"], "--count 'ocr=²': expected FAMILY=N"),
        (["--font-dir", "no-fonts"], "--font-dir no-fonts: there is no such folder"),
        (["--background-dir", "{}/none"], "--background-dir {}/none: there is no such folder"),
        (["--background-dir", "{}/empty"], "--background-dir {}/empty: holds no picture; give one with pictures (.jpg"),
        (["--corpus-en", "{}/none"], "--corpus-en {}/none: cannot be read ([Errno 2] No such file"),
        (["--corpus-zh", "{}/blank.txt"], "--corpus-zh {}/blank.txt: is empty"),
        (["--corpus-zh", "{}/latin.txt"], "--corpus-zh {}/latin.txt: cannot be read ('utf-8' codec"),
        (["--background-dir", "{}/broken", "--count", "ocr=1"], "--background-dir: ten unreadable pictures in a row"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    before = sorted(tmp_path.iterdir())
    flags = [flag.format(tmp_path) for flag in flags]
    assert main([str(tmp_path / "out"), "--num-scenes", "42", "--no-progress", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said.format(tmp_path)}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    assert main([str(out), "--num-scenes", "42", "--no-progress"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: cannot be made (No")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While other processes have parts to make for minutes, which are not waited for."""

    def full(*args: object) -> None:
        assert list(tmp_path.glob("out.partial/caption/*.tar"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(FINISH, "vqa", full)
    many = dataclasses.replace(SMALL, counts=(("caption", 10), ("vqa", 10), ("ocr", 200_000)))
    with pytest.raises(DataError) as caught:
        generate(many, tmp_path / "out", num_workers=2, progress=False)
    assert str(caught.value) == f"{tmp_path}/out: cannot be made (No space left on device)"
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    flags = [
        out,
        "--num-scenes",
        "42",
        "--count",
        "text=7",
        "--count",
        "photos=0",
        "--split",
        "heldout",
        "--seed",
        "5",
    ]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert f"{out}: written" in said and re.search(r"caption +12\n", said) and re.search(r"text +7\n", said)
    assert main(flags) == 0
    assert "already complete" in capsys.readouterr().out
    assert main([*flags, "--seed", "6"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path / "e"), "--count", "words=3"]) == 2
    assert "--count 'words=3': expected FAMILY=N" in capsys.readouterr().err
