"""Cleaning: what each rule drops and what it leaves, how rules combine, and where images repeat themselves."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from megatron_vl.data.dataset.manifest import Manifest, read_manifest
from megatron_vl.data.dataset.rows import RowStore
from megatron_vl.data.filters.duplicates import dhash, matches_any, near_duplicate_pairs
from megatron_vl.data.filters.options import MOST_DISTANCE, FilterOptions, read_filters
from megatron_vl.data.filters.rules import SampleFilter
from megatron_vl.data.filters.text import strip_html, strip_irregular
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe
from megatron_vl.data.sample import IMAGE_MARK, ImageRef, Region, Sample, Turn
from megatron_vl.errors import ConfigError, DataError, SkipSample
from tests.helpers.data.prepared import recipe_values
from tests.helpers.data.reading import write_tar


def sample(text: str = "a red house", **fields: Any) -> Sample:
    return Sample("k", "s", **{"task": "caption", "text": text, **fields})


def outcome(item: Sample, **options: Any) -> str:
    """The reason for which a sample is dropped, or its text."""
    try:
        return SampleFilter(FilterOptions(**options)).apply(item).text
    except SkipSample as error:
        return f"({error.reason})"


def test_nothing_is_touched_unless_it_is_asked_for() -> None:
    for text in ("<b>Größe</b> 😀  !!!!!! http://a.b", "слово", "", "x" * 10_000):
        item = sample(text)
        assert SampleFilter(FilterOptions()).apply(item) is item


@pytest.mark.parametrize(
    ("item", "options", "expected"),
    [
        (sample(score=0.25), {"min_score": 0.28}, "(low_score)"),
        (sample(score=0.28), {"min_score": 0.28}, "a red house"),
        (sample(), {"min_score": 0.28}, "a red house"),
        (sample(), {"min_score": 0.28, "drop_unscored": True}, "(no_score)"),
        (sample("abc"), {"min_characters": 4}, "(short_text)"),
        (sample("abcd"), {"min_characters": 4, "max_characters": 4}, "abcd"),
        (sample("abcde"), {"max_characters": 4}, "(long_text)"),
        (sample("naïve Größe, 3 × 4 ½ № ²"), {"letters": "latin"}, "naïve Größe, 3 × 4 ½ № ²"),
        (sample("dom na Ślęży"), {"letters": "latin"}, "(foreign_letters)"),
        (sample("Ślęża"), {"letters": "latin", "max_foreign_letters": 3}, "Ślęża"),
        (sample("红房子"), {"letters": "latin"}, "(foreign_letters)"),
        (sample("红房子，ＡＢ abc 500ml"), {"letters": "latin_han"}, "红房子，ＡＢ abc 500ml"),
        (sample("赤いドア"), {"letters": "latin_han"}, "(foreign_letters)"),
        (sample("дом"), {"letters": "latin_han"}, "(foreign_letters)"),
        (sample("red 房子"), {"letters": "han"}, "(foreign_letters)"),
        (sample("a red 房子"), {"match_language": True}, "(other_language)"),
        (sample("a red house", language="zh"), {"match_language": True}, "(other_language)"),
        (sample("红房子", language="zh"), {"match_language": True}, "红房子"),
        (sample("nice 😀"), {"drop_emoji": True}, "(emoji)"),
        (sample("I ❤️ it"), {"drop_emoji": True}, "(emoji)"),
        (sample("flag 🇨🇳"), {"drop_emoji": True}, "(emoji)"),
        (sample("4 ★ hotel ™ © ♥ → №"), {"drop_emoji": True}, "4 ★ hotel ™ © ♥ → №"),
        (sample("<PERSON> on stage"), {"drop_special_tags": True}, "(special_tag)"),
        (sample("<PERSON> on stage"), {"drop_special_tags": True, "strip_html": True}, "(special_tag)"),
        (sample("say <|im_end|>"), {"drop_special_tags": True}, "(special_tag)"),
        (sample("a [UNK] b"), {"drop_special_tags": True}, "(special_tag)"),
        (sample("a < b and [1] <3"), {"drop_special_tags": True}, "a < b and [1] <3"),
        (sample("stock photo of cat 123"), {"drop_patterns": ("stock photo",)}, "(pattern)"),
        (sample("a cat - Shutterstock"), {"remove_patterns": (r"\s*- Shutterstock$",)}, "a cat"),
        (sample("<p></p>"), {"strip_html": True}, "(empty_text)"),
        # Cleaning comes before the rules about what is left.
        (sample("<b>hi</b>"), {"strip_html": True, "max_characters": 2}, "hi"),
    ],
)
def test_rules(item: Sample, options: dict[str, Any], expected: str) -> None:
    assert outcome(item, **options) == expected


def test_all_that_a_sample_says_is_judged() -> None:
    emoji = {"drop_emoji": True}
    assert outcome(sample(task="vqa", question="what 😀?"), **emoji) == "(emoji)"
    assert outcome(sample("", task="chat", turns=(Turn("user", "hi"), Turn("assistant", "😀"))), **emoji) == "(emoji)"
    assert outcome(sample("", task="ocr", regions=(Region("😀"),)), **emoji) == "(emoji)"
    chat = sample("", task="chat", turns=(Turn("user", "<img>a.jpg</img>"),))
    assert outcome(chat, drop_special_tags=True) == "", "markup of chats has meaning"
    assert outcome(chat, min_characters=17) == "(short_text)"


def test_a_text_whose_phrases_have_places_is_never_changed() -> None:
    grounded = sample("a  cat <b> ", task="grounded_caption", regions=(Region("cat", span=(3, 6)),))
    assert outcome(grounded, strip_html=True) == "(unclean_text)"
    assert outcome(grounded, drop_emoji=True) == "a  cat <b> "
    blank_at_the_end = sample("a cat ", task="grounded_caption", regions=(Region("cat", span=(2, 5)),))
    assert outcome(blank_at_the_end, strip_html=True) == "a cat "


def test_cleaning_never_takes_the_place_of_an_image() -> None:
    marks = IMAGE_MARK * 4
    document = sample(f"see  http://a.b{marks}<b>it</b> <!-- a{IMAGE_MARK}b -->", task="interleaved")
    assert outcome(document, strip_irregular=True) == f"see{marks}<b>it</b> <!-- a{IMAGE_MARK}b -->"
    assert outcome(document, strip_html=True) == f"see http://a.b{marks}it <!-- a{IMAGE_MARK}b -->"
    assert outcome(document, remove_patterns=(r"http\S+",)) == f"see{marks}<b>it</b> <!-- a{IMAGE_MARK}b -->"
    assert outcome(sample(f"hi{marks}", task="interleaved"), min_characters=3) == "(short_text)"


def test_the_lines_of_a_page_are_judged_as_they_are_learned() -> None:
    lines = ("see http://a.b", "<b>x</b> ......")
    page = sample(" ".join(lines), task="ocr", regions=tuple(Region(line, quads=((0.0,) * 8,)) for line in lines))
    cleaning = {"strip_irregular": True, "strip_html": True}
    assert outcome(page, **cleaning) == page.text
    assert outcome(page, **cleaning, drop_patterns=("http",)) == "(pattern)"
    assert outcome(page, **cleaning, max_characters=10) == "(long_text)"
    assert outcome(sample("......", task="ocr", regions=(Region("......"),)), remove_patterns=(r"\.",)) == "......"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A <b>big</b> house<br/>", "A big house"),
        ("Vintage brass lamp &amp; shade", "Vintage brass lamp & shade"),
        ("&lt;p class=&quot;x&quot;&gt;Text&lt;/p&gt;", "Text"),
        ("x <!-- a > b --> y<script>var a = '<b>';</script> z", "x y z"),
        ('<a href="http://x.y/?a=1&b=2" onclick="f()">link</a>', "link"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("1 <2> 3", "1 <2> 3"),
        ("I <3 you", "I <3 you"),
        ("line one\nline  two", "line one\nline two"),
    ],
)
def test_html_is_stripped(text: str, expected: str) -> None:
    assert strip_html(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sale!!!!!! now", "Sale! now"),
        ("wait... what", "wait... what"),
        ("a \t  b", "a b"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
        ("see https://a.b/c?d=e#f now", "see now"),
        ("见www.example.com，谢谢", "见 ，谢谢"),
        ("bell\x07 and \r\n line", "bell and \n line"),
        ("aaaaaaa 1111", "aaaaaaa 1111"),
        ("----====", "-="),
    ],
)
def test_irregular_patterns_are_stripped(text: str, expected: str) -> None:
    assert strip_irregular(text) == expected


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = strip_irregular(text)
    assert strip_irregular(once) == once


def test_images_by_name_number_and_size(tmp_path: Path) -> None:
    names = tmp_path / "excluded.txt"
    names.write_text("VG_100K/5.jpg\n\n 000000123456 \nkitchen\n")
    for key, excluded in {
        "VG_100K/5.jpg": True, "VG_100K_2/5.jpg": False, "train2014/COCO_train2014_000000123456.jpg": True,
        "123456": True, "1234567": False, "rooms/kitchen.png": True, "kitchens.png": False,
    }.items():  # fmt: skip
        item = sample(images=(ImageRef("other.jpg", b""), ImageRef(key, b"")))
        assert (outcome(item, exclude_images=names) == "(excluded_image)") == excluded, key
    keeper = SampleFilter(FilterOptions(min_side=20, max_aspect_ratio=2))
    keeper.check_image((20, 40))
    with pytest.raises(SkipSample, match="small_image"):
        keeper.check_image((100, 19))
    with pytest.raises(SkipSample, match="aspect_ratio"):
        keeper.check_image((20, 41))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_sid": 3}, "data.yaml: filters: unknown key 'min_sid'. Did you mean min_side"),
        ({"min_side": 2.5}, r"filters.min_side: found 2.5 \(a number\), expected an integer"),
        ({"min_side": -1}, "expected an integer of at least 0"),
        ({"drop_emoji": 1}, "expected true or false"),
        ({"letters": "greek"}, "expected one of any, latin"),
        ({"drop_patterns": "x"}, "expected a list of strings"),
        ({"remove_patterns": ["("]}, "is not a regular expression"),
        ({"duplicate_distance": 9}, "expected an integer from 0 to 7"),
        ({"max_aspect_ratio": 0.5}, "expected a number of at least 1"),
        ({"exclude_images": "missing.txt"}, "missing.txt: no such file"),
        ([], "expected a mapping"),
    ],
)
def test_a_wrong_option_names_its_key(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_filters(values, "data.yaml: filters", root=tmp_path)


def test_a_source_replaces_single_thresholds(tmp_path: Path) -> None:
    top = read_filters({"min_side": 30, "drop_emoji": True}, "top", root=tmp_path)
    mine = read_filters({"min_side": None, "min_score": 1}, "mine", root=tmp_path, base=top)
    assert (mine.min_side, mine.drop_emoji, mine.min_score) == (None, True, 1)


# Images that look like something: noise, blurred, so that neighbors differ clearly.
def picture(seed: int, *, side: int = 96) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_looks_survive_scaling_and_compression_and_tell_images_apart() -> None:
    looks = [dhash(picture(seed)) for seed in range(40)]
    for seed, mine in enumerate(looks):
        image = picture(seed)
        small = image.resize((60, 50), Image.Resampling.LANCZOS)
        lossy = Image.open(io.BytesIO(encoded(image, "JPEG", quality=40)))
        for other in (small, lossy, image.filter(ImageFilter.GaussianBlur(1))):
            assert distance(mine, dhash(other)) <= MOST_DISTANCE
    assert min(distance(a, b) for i, a in enumerate(looks) for b in looks[:i]) > 10
    assert dhash(Image.new("RGB", (50, 50), (9, 200, 30))) == 0
    ramp = Image.fromarray(np.tile(np.arange(90, 0, -1, dtype=np.uint8), (8, 1)))
    assert dhash(ramp) == 2**64 - 1


HASHES = st.lists(
    st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=4)).map(
        lambda pair: (0, 0xF0F0F0F0F0F0F0F0, 2**64 - 1, 0x0123456789ABCDEF)[pair[0]] ^ sum(1 << bit for bit in pair[1])
    ),
    max_size=25,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(HASHES, st.integers(0, 7))
def test_pairs_are_those_of_comparing_all(values: list[int], most: int) -> None:
    distinct = list(dict.fromkeys(values))
    expected = [(i, j) for j in range(len(distinct)) for i in range(j) if distance(distinct[i], distinct[j]) <= most]
    firsts, seconds = near_duplicate_pairs(np.array(distinct, dtype=np.uint64), most)
    assert list(zip(firsts.tolist(), seconds.tolist(), strict=True)) == expected


@settings(derandomize=True, max_examples=150, deadline=None)
@given(HASHES, HASHES, st.integers(0, 7))
def test_images_like_others_are_those_of_comparing_all(values: list[int], others: list[int], most: int) -> None:
    like = [bool(v) and any(o and distance(v, o) <= most for o in others) for v in values]
    assert matches_any(np.array(values, dtype=np.uint64), np.array(others, dtype=np.uint64), most).tolist() == like


def prepared(folder: Path, sources: dict[str, list[bytes]], *, entries: dict[str, Any], **filters: Any) -> Manifest:
    """Captions over the given images, one tar for each two of them; ``entries``: filters of single sources."""
    for name, images in sources.items():
        for begin in range(0, len(images), 2):
            members = []
            for number, data in enumerate(images[begin : begin + 2], start=begin):
                members += [(f"{number}.png", data), (f"{number}.txt", b"a caption")]
            write_tar(folder / name / f"{begin:03d}.tar", members)
    values = recipe_values(filters=filters, allow_empty=True)
    values["sources"] = [
        {"name": name, "type": "img2dataset", "path": name, "filters": entries.get(name, {})} for name in sources
    ]
    recipe = folder / "data.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    prepare(load_recipe(recipe), folder / "set", progress=False)
    return read_manifest(folder / "set")


def left_out(manifest: Manifest) -> dict[tuple[str, str], tuple[int, tuple[str, ...]]]:
    return {(skip.source, skip.reason): (skip.count, skip.examples) for skip in manifest.skips}


def test_repeated_images_are_dropped_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    one, two = picture(1), picture(2)
    like_one = encoded(one, "JPEG", quality=60)
    sources = {
        "free": [encoded(one)] * 2,
        "first": [encoded(one), encoded(two), encoded(one)],
        "second": [like_one, encoded(two), encoded(picture(3)), encoded(picture(3))],
    }
    entries = {"free": {"duplicates": "keep"}, "second": {"duplicates": "near"}}
    manifest = prepared(tmp_path, sources, entries=entries, duplicates="exact", duplicate_distance=4)
    # What "first" keeps is seen before; its own images are compared by their bytes alone.
    assert left_out(manifest) == {
        ("first", "duplicate_image"): (1, ("002.tar/2",)),
        ("second", "duplicate_image"): (2, ("000.tar/1", "002.tar/3")),
    }
    manifest = prepared(tmp_path, sources, entries={}, duplicates="near", duplicate_distance=4)
    assert left_out(manifest) == {
        ("free", "duplicate_image"): (1, ("000.tar/1",)),
        ("first", "duplicate_image"): (2, ("000.tar/0", "002.tar/2")),
        ("second", "duplicate_image"): (2, ("000.tar/1", "002.tar/3")),
        ("second", "similar_image"): (1, ("000.tar/0",)),
    }
    assert [(totals.read, totals.kept) for totals in manifest.sources] == [(2, 1), (3, 1), (4, 1)]
    store = RowStore(tmp_path / "set")
    assert sorted(key.key for row in range(len(store)) for key in store.keys(row)) == [
        "000.tar/0", "000.tar/1", "002.tar/2",
    ]  # fmt: skip


def test_images_of_benchmarks_are_dropped(tmp_path: Path) -> None:
    exact, scaled, other = encoded(picture(1)), picture(2), encoded(picture(3))
    sources = {"web": [exact, encoded(scaled.resize((200, 200))), other], "own": [exact]}
    folder = tmp_path / "benchmark" / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(exact)
    (folder / "b.png").write_bytes(encoded(scaled))
    dropped = {("web", "benchmark_image"): (2, ("000.tar/0", "000.tar/1"))}
    entries = {"own": {"benchmark_images": None}}
    options = {"benchmark_images": "benchmark", "benchmark_distance": 4}
    assert left_out(prepared(tmp_path, sources, entries=entries, **options)) == dropped
    hashes = [hashlib.sha256(exact).hexdigest(), f"{dhash(scaled):016x}", ""]
    (tmp_path / "hashes.txt").write_text("\n".join(hashes))
    options["benchmark_images"] = "hashes.txt"
    assert left_out(prepared(tmp_path, sources, entries=entries, **options)) == dropped
    (tmp_path / "hashes.txt").write_text("0123\n")
    with pytest.raises(DataError, match=r"hashes.txt, line 1: found '0123', expected a SHA-256"):
        prepared(tmp_path, sources, entries=entries, **options)


@pytest.mark.parametrize("order", [("plain", "checked"), ("checked", "plain")])
def test_a_file_that_another_source_has_too_is_looked_at(tmp_path: Path, order: tuple[str, str]) -> None:
    """The first of equal files may come from a source whose filters need no hash of it."""
    image = encoded(picture(2).resize((200, 200)))
    folder = tmp_path / "benchmark"
    folder.mkdir()
    (folder / "b.png").write_bytes(encoded(picture(2)))
    entries = {"plain": {"benchmark_images": None}}
    options = {"benchmark_images": "benchmark", "benchmark_distance": 4}
    manifest = prepared(tmp_path, {name: [image] for name in order}, entries=entries, **options)
    assert left_out(manifest) == {("checked", "benchmark_image"): (1, ("000.tar/0",))}


def test_filters_are_counted_like_everything_else(tmp_path: Path) -> None:
    images = [encoded(picture(1, side=30)), encoded(picture(2, side=96)), encoded(picture(3).resize((96, 20))), b"x"]
    manifest = prepared(tmp_path, {"web": images}, entries={}, min_side=20, max_aspect_ratio=4)
    assert left_out(manifest).keys() == {("web", "aspect_ratio"), ("web", "unreadable_image")}
    lost = r"no sample is left to write:\n  source 'web': 3 of 4 left out for small_image, first 000\.tar/0: "
    with pytest.raises(DataError, match=lost):
        prepared(tmp_path, {"web": images}, entries={}, min_side=100)
