"""PDF pages: every line lies in its quadrilateral, at any rotation; the rules of pages; damaged and hostile files."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_vl.data.formats import documents
from megatron_vl.data.sample import Sample
from megatron_vl.data.sources.pdf import PDF
from megatron_vl.errors import DataError
from tests.helpers.data.reading import kept, read_all, reasons

pytest.importorskip("pypdfium2")

LINES = ("Annual Report 2019", "The survey covered 12 villages.", "Results follow on page 3")


def make_pdf(*contents: bytes, page: bytes = b"", crop: str = "", encrypt: bytes = b"") -> bytes:
    """A PDF with a page of 612 x 792 points for each content stream; /F1 is Helvetica, /F2 has no known characters."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(contents))).encode()
    font2 = b"<</Type/Font/Subtype/Type0/BaseFont/X/Encoding/Identity-H/DescendantFonts[<</Type/Font/Subtype"
    font2 += b"/CIDFontType2/BaseFont/X/CIDSystemInfo<</Registry(Adobe)/Ordering(Identity)/Supplement 0>>/DW 600>>]>>"
    fonts = b"<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>/F2" + font2 + b">>>>"
    box = f"/CropBox[{crop}]".encode() if crop else b""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(contents)), fonts]
    for number, content in enumerate(contents):
        entry = b"/Parent 2 0 R/MediaBox[0 0 612 792]/Resources 3 0 R/Contents %d 0 R" % (5 + 2 * number)
        objects.append(b"<</Type/Page" + entry + box + page + b">>")
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
    data = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer<</Size %d/Root 1 0 R%s>>" % (len(objects) + 1, encrypt)
    return data + b"xref\n0 %d\n0000000000 65535 f \n%s%s\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1, table, trailer, len(data)
    )  # fmt: skip


def show(*lines: str, x: float = 100, y: float = 700, size: int = 24, before: bytes = b"") -> bytes:
    text = b"".join(b"1 0 0 1 %g %g Tm (%s) Tj\n" % (x, y - 60 * n, t.encode("cp1252")) for n, t in enumerate(lines))
    return b"BT " + before + b" /F1 %d Tf\n" % size + text + b"ET"


def write(folder: Path, *pages: bytes, **options: Any) -> PDF:
    (folder / "0000123.pdf").write_bytes(make_pdf(*pages, **options))
    return PDF("pdf", folder)


def pixels(sample: Sample) -> Any:
    """float64[lines, 4, 2]: the quadrilaterals in pixels."""
    size = Image.open(io.BytesIO(sample.images[0].data)).size
    return np.array([region.quads[0] for region in sample.regions]).reshape(-1, 4, 2) * size


def check_ink(sample: Sample, least: float = 0.05) -> None:
    """Every quadrilateral holds ink, and no ink is outside of them."""
    image = Image.open(io.BytesIO(sample.images[0].data)).convert("L")
    ink = np.asarray(image) < 128
    outside = ink.copy()
    for region, quad in zip(sample.regions, pixels(sample), strict=True):
        mask = Image.new("1", image.size)
        ImageDraw.Draw(mask).polygon([tuple(point) for point in quad], fill=1)
        inside = np.asarray(mask)
        assert least < ink[inside].mean() < 0.5, (region.text, ink[inside].mean())
        outside &= ~inside
    assert outside.sum() == 0


def test_a_page_gives_its_lines_in_order(tmp_path: Path) -> None:
    (sample,) = kept(read_all(write(tmp_path, show(*LINES))))
    assert [region.text for region in sample.regions] == list(LINES)
    assert (sample.key, sample.task, sample.text) == ("0000123.pdf#1", "ocr", " ".join(LINES))
    assert Image.open(io.BytesIO(sample.images[0].data)).size == (816, 1056)
    top_left, _, bottom_right, _ = pixels(sample)[0] * 72 / 96
    assert top_left == pytest.approx((100, 792 - 700 - 22), abs=2)
    assert bottom_right == pytest.approx((100 + 213, 792 - 700 + 6), abs=2)
    check_ink(sample)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_page_turns_its_quads(tmp_path: Path, rotation: int) -> None:
    (sample,) = kept(read_all(write(tmp_path, show(*LINES), page=b"/Rotate %d" % rotation)))
    assert sorted(region.text for region in sample.regions) == sorted(LINES)
    width, height = Image.open(io.BytesIO(sample.images[0].data)).size
    assert (width > height) == (rotation != 180)
    check_ink(sample)
    assert direction(sample) == pytest.approx(rotation, abs=0.1)


def direction(sample: Sample) -> float:
    """Degrees by which the first line is turned clockwise."""
    x, y = pixels(sample)[0][1] - pixels(sample)[0][0]
    return float(np.degrees(np.arctan2(y, x)) % 360)


@pytest.mark.parametrize("degrees", [90, 180, 17, -40])
def test_rotated_text_has_a_rotated_quad(tmp_path: Path, degrees: int) -> None:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    content = b"BT /F1 20 Tf %.6f %.6f %.6f %.6f 300 400 Tm (Draft of a long line) Tj ET" % (c, s, -s, c)
    (sample,) = kept(read_all(write(tmp_path, content)))
    assert [region.text for region in sample.regions] == ["Draft of a long line"]
    assert direction(sample) == pytest.approx(-degrees % 360, abs=0.1)
    check_ink(sample, least=0.03)


def test_a_crop_box_moves_the_lines(tmp_path: Path) -> None:
    (sample,) = kept(read_all(write(tmp_path, show(*LINES, "below the crop box", x=120), crop="100 560 500 760")))
    assert [region.text for region in sample.regions] == list(LINES)
    assert sample.regions[0].quads[0][0] == pytest.approx(20 / 400, abs=0.01)
    check_ink(sample)


def test_columns_are_separate_lines(tmp_path: Path) -> None:
    rows = b"".join(
        b"1 0 0 1 %d %d Tm (%s) Tj\n" % (x, y, text)
        for y, pair in ((700, (b"left one here", b"right one here")), (660, (b"left two here", b"right two")))
        for x, text in zip((60, 340), pair, strict=True)
    )
    (sample,) = kept(read_all(write(tmp_path, b"BT /F1 18 Tf\n" + rows + b"ET")))
    assert [region.text for region in sample.regions] == [
        "left one here", "right one here", "left two here", "right two"
    ]  # fmt: skip
    check_ink(sample)


def test_invisible_text_is_read_only_on_request(tmp_path: Path) -> None:
    source = write(tmp_path, show(*LINES, before=b"3 Tr"))
    assert reasons(read_all(source)) == {"too_few_characters": 1}
    assert len(kept(read_all(PDF("pdf", tmp_path, invisible_text=True)))) == 1


def test_the_rules_of_pages(tmp_path: Path) -> None:
    no_map = b"BT /F2 20 Tf 1 0 0 1 100 700 Tm <" + b"E0010002" * 20 + b"> Tj ET"
    pages = (show(*LINES), show("short"), show("long " * 30, *LINES, size=6), b"", no_map, show(*LINES, y=-50))
    source = write(tmp_path, *pages)
    items = read_all(PDF("pdf", tmp_path, max_characters=90))
    assert [sample.key for sample in kept(items)] == ["0000123.pdf#1"]
    assert len(items) == len(pages)
    assert reasons(items) == {"too_few_characters": 3, "too_many_characters": 1, "unmapped_characters": 1}
    assert reasons(read_all(PDF("pdf", tmp_path, min_side=900))) == {"image_too_small": len(pages)}
    assert reasons(read_all(PDF("pdf", tmp_path, dpi=2000))) == {"image_too_large": len(pages)}
    assert source.min_characters == 20


def test_damaged_files_are_counted_and_named(tmp_path: Path) -> None:
    whole = make_pdf(show(*LINES))
    files = {
        "a.pdf": whole,
        "cut.pdf": whole[: len(whole) // 3],
        "empty.pdf": b"",
        "html.pdf": b"<html>not found</html>",
        "locked.pdf": make_pdf(
            show(*LINES),
            encrypt=b"/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % (b"28" * 32, b"28" * 32),
        ),
        "no_page.pdf": make_pdf(),
        "sub/b.PDF": whole,
        "other.txt": b"",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.pdf").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.pdf")
    source = PDF("pdf", tmp_path, records_per_shard=2)
    assert [shard.name for shard in source.shards()] == [".:0", ".:2", ".:4", ".:6"]
    items = read_all(source)
    assert [sample.key for sample in kept(items)] == ["a.pdf#1", "sub/b.PDF#1"]
    assert reasons(items) == {"unreadable_pdf": 4, "encrypted_pdf": 1}


@pytest.mark.parametrize("cut", range(60, 1100, 83))
def test_a_file_cut_anywhere_never_stops_the_reading(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf(show(*LINES), show(*LINES))[:cut])
    (tmp_path / "b.pdf").write_bytes(make_pdf(show(*LINES)))
    items = read_all(PDF("pdf", tmp_path))
    assert "b.pdf#1" in [item.key for item in items]
    assert set(reasons(items)) <= {"unreadable_pdf", "too_few_characters"}


def test_zips_of_documents_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "zipfiles" / "0000-0999" / "0000.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("0000001.pdf", make_pdf(show(*LINES), show(*LINES)))
        out.writestr("0000000.pdf", make_pdf(show(*LINES)))
        out.writestr("0000002.pdf", b"x")
    keys = ["0000.zip/0000000.pdf#1", "0000.zip/0000001.pdf#1", "0000.zip/0000001.pdf#2"]
    for path in (tmp_path, archive):
        source = PDF("pdf", path, records_per_shard=2)
        assert len(source.shards()) == 2
        assert [sample.key for sample in kept(read_all(source))] == keys
        assert reasons(read_all(source)) == {"unreadable_pdf": 1}
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "c.pdf").write_bytes(b"x" * 101)
    assert reasons(read_all(PDF("pdf", tmp_path)))["document_too_large"] == 1


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        PDF("pdf", tmp_path / "nowhere").shards()
    with pytest.raises(DataError, match=r"no \.pdf file, and no zip of them"):
        PDF("pdf", tmp_path).shards()
    with pytest.raises(DataError, match="dpi is 0"):
        PDF("pdf", tmp_path, dpi=0).shards()
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    with pytest.raises(DataError, match="PDF files need pypdfium2: pip install"):
        PDF("pdf", tmp_path).shards()
