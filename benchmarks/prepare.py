"""The time of preparing data against iterating over the same raw files.

    python benchmarks/prepare.py [--samples 400] [--turns 7] [--json FILE] [--smoke]

The reference is the loop that one would write without this project: go through the files with the standard library,
decode every image with Pillow to RGB, encode the text with tiktoken, keep nothing. Ours does that and checks, cleans,
renders prompts, hashes and writes. ``worker`` is what every core does, raw shard to part on disk, for which there is a
goal; ``whole`` is ``prepare`` from raw files to a data set in one process, packing and writing included. Both run on
one core, from files in the page cache to the same folder. Ours computes no pixels where no filter asks for them;
``eighths`` is the loop that saves as much.

The tokenizer is timed by itself: documents to tokenized samples beside tiktoken's ``encode_ordinary``.

``--memory`` measures something else: the peak memory of preparing sources of growing size, each in a fresh process; and
``--rows`` how long finished parts take to become a data set with one and with two workers. (On a RAM disk with
``TMPDIR=/dev/shm``; otherwise the disk is measured.)
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Row, Times, compare, describe_machine, ratios, take_turns, write_rows
from PIL import Image

from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.parts import plan_units, write_part
from megatron_vl.data.prepare.recipe import DataRecipe, load_recipe
from megatron_vl.data.prepare.workers import Pool, open_pool, this_process
from megatron_vl.data.prompting.tokenize import TokenizeOptions, tokenize_sample
from megatron_vl.data.prompting.tokenizer import QwenTokenizer
from megatron_vl.data.sample import Sample

GOAL = 1.3
ROOT = Path(__file__).resolve().parents[1]
WORDS = tuple(" ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))).split())
"""Prose to cut texts from: a vocabulary of a few words would be tokenized from a cache."""
CLEANING = {
    "min_side": 64, "max_aspect_ratio": 4, "min_characters": 3, "letters": "latin_han", "drop_emoji": True,
    "strip_html": True, "strip_irregular": True,
}  # fmt: skip


Decode = Callable[[bytes], None]


@dataclass(frozen=True)
class Workload:
    """One source: its raw files, its entry in a recipe, and the plain loop over them."""

    name: str
    entry: dict[str, Any]
    iterate: Callable[[Any, Decode], None]
    """Goes through the files; takes tiktoken's encoding and what to do with an image."""
    samples: int


def photographs(count: int) -> Iterator[bytes]:
    """Different crops of real photographs, 512 x 384, as JPEG of quality 90 (about 50 kB).

    From the 401st on the pixels repeat, but not the bytes: a few follow the end of the picture.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the photographs are those of scikit-image: pip install scikit-image")
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "brick.png")
    originals = [Image.open(Path(package.origin).parent / "data" / name).convert("RGB") for name in names]
    rng = random.Random(0)
    encoded: list[bytes] = []
    for index in range(min(count, 400)):
        image = originals[index % len(originals)]
        scale = rng.uniform(0.4, 1.0)
        width, height = int(image.width * scale), int(image.height * scale)
        left, top = rng.randrange(image.width - width + 1), rng.randrange(image.height - height + 1)
        buffer = io.BytesIO()
        crop = image.crop((left, top, left + width, top + height)).resize((512, 384), Image.Resampling.BICUBIC)
        crop.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
        yield encoded[-1]
    for index in range(400, count):
        yield encoded[index % 400] + index.to_bytes(8, "big")


def words(rng: random.Random, count: int) -> str:
    begin = rng.randrange(len(WORDS) - count)
    return " ".join(WORDS[begin : begin + count])


def decode_to_pixels(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")


def decode_to_eighths(data: bytes) -> None:
    """What preparation does: all of the file is read, an eighth of the pixels in a row and a column is computed."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (1, 1))
        image.convert("RGB")


def captions(folder: Path, samples: int) -> Workload:
    """An img2dataset tar: image, caption and metadata of each pair."""
    rng = random.Random(1)
    path = folder / "captions" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for index, image in enumerate(photographs(samples)):
            caption = words(rng, 14)
            meta = {"caption": caption, "similarity": 0.31, "url": "http://x", "width": 512, "height": 384}
            for suffix, data in (("jpg", image), ("txt", caption.encode()), ("json", json.dumps(meta).encode())):
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def iterate(encoding: Any, decode: Decode) -> None:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                data = stream.read()
                if member.name.endswith(".jpg"):
                    decode(data)
                elif member.name.endswith(".txt"):
                    encoding.encode_ordinary(data.decode())
                else:
                    json.loads(data)

    entry = {"type": "laion_en", "path": str(path.parent), "filters": CLEANING}
    return Workload("captions (tar)", entry, iterate, samples)


def questions(folder: Path, samples: int) -> Workload:
    """VQA in GQA's format: each image has one question."""
    rng, root = random.Random(2), folder / "vqa"
    (root / "images").mkdir(parents=True)
    records = {}
    for index, image in enumerate(photographs(samples)):
        (root / "images" / f"{index}.jpg").write_bytes(image)
        records[str(index)] = {"imageId": str(index), "question": words(rng, 9) + "?", "answer": words(rng, 2)}
    (root / "questions.json").write_text(json.dumps(records))

    def iterate(encoding: Any, decode: Decode) -> None:
        for record in json.loads((root / "questions.json").read_bytes()).values():
            decode((root / "images" / f"{record['imageId']}.jpg").read_bytes())
            encoding.encode_ordinary(record["question"] + record["answer"])

    entry = {"type": "gqa", "questions": str(root / "questions.json"), "image_root": str(root)}
    return Workload("questions (json)", entry, iterate, samples)


def pages(folder: Path, samples: int) -> Workload:
    """OCR: pages with thirty lines and their quadrilaterals."""
    rng, root = random.Random(3), folder / "ocr"
    root.mkdir()
    lines = []
    for index, image in enumerate(photographs(samples)):
        (root / f"{index}.jpg").write_bytes(image)
        quads = [[[5, 12 * n], [300, 12 * n], [300, 12 * n + 11], [5, 12 * n + 11]] for n in range(30)]
        content = [{"text": words(rng, 4), "quad": quad} for quad in quads]
        lines.append(json.dumps({"file_name": f"{index}.jpg", "size": [512, 384], "lines": content}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    def iterate(encoding: Any, decode: Decode) -> None:
        with (root / "metadata.jsonl").open() as stream:
            for line in stream:
                record = json.loads(line)
                decode((root / record["file_name"]).read_bytes())
                for item in record["lines"]:
                    encoding.encode_ordinary(item["text"] + str(item["quad"]))

    return Workload("pages (jsonl)", {"type": "ocr", "path": str(root)}, iterate, samples)


def dialogues(folder: Path, samples: int) -> Workload:
    """Dialogues of six turns about an image."""
    rng, root = random.Random(4), folder / "chat"
    root.mkdir()
    records = []
    for index, image in enumerate(photographs(samples)):
        (root / f"{index}.jpg").write_bytes(image)
        turns = []
        for turn in range(6):
            prefix = f"Picture 1: <img>{index}.jpg</img>\n" if turn == 0 else ""
            value = prefix + words(rng, 40 if turn % 2 else 10)
            turns.append({"from": ("user", "assistant")[turn % 2], "value": value})
        records.append({"id": str(index), "conversations": turns})
    (root / "chat.json").write_text(json.dumps(records))

    def iterate(encoding: Any, decode: Decode) -> None:
        for index, record in enumerate(json.loads((root / "chat.json").read_bytes())):
            decode((root / f"{index}.jpg").read_bytes())
            for turn in record["conversations"]:
                encoding.encode_ordinary(turn["value"])

    entry = {"type": "qwen_vl_chat", "path": str(root / "chat.json"), "image_root": str(root)}
    return Workload("dialogues (json)", entry, iterate, samples)


def documents(folder: Path, samples: int) -> Workload:
    """Text alone: documents of about 4 kB."""
    rng, path = random.Random(5), folder / "text.jsonl"
    with path.open("w") as stream:
        for _ in range(samples):
            stream.write(json.dumps({"text": words(rng, 800)}) + "\n")

    def iterate(encoding: Any, decode: Decode) -> None:
        with path.open() as stream:
            for line in stream:
                encoding.encode_ordinary(json.loads(line)["text"])

    return Workload("documents (jsonl)", {"type": "text", "path": str(path)}, iterate, samples)


def recipe_of(workload: Workload, folder: Path) -> DataRecipe:
    path = folder / "recipe.yaml"
    values = {"sources": [{"name": "s", **workload.entry}], "num_queries": 256, "num_bpe_tokens": 151643}
    path.write_text(json.dumps(values))
    return load_recipe(path)


def run_source(workload: Workload, folder: Path, *, turns: int) -> list[Row]:
    """Time a source three ways; returns the rows of worker and whole."""
    recipe = recipe_of(workload, folder)
    units = plan_units(recipe)
    encoding = QwenTokenizer(recipe.num_bpe_tokens)._encoding
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    times = take_turns(
        {
            "plain": lambda: workload.iterate(encoding, decode_to_pixels),
            "eighths": lambda: workload.iterate(encoding, decode_to_eighths),
            "worker": lambda: [write_part(recipe, unit, parts) for unit in units],
            "whole": lambda: prepare(recipe, folder / "set", progress=False),
        },
        turns=turns,
    )
    rows = []
    comparisons = (("worker", "plain", GOAL), ("worker", "eighths", None), ("whole", "plain", None))
    for kind, reference, goal in comparisons:
        name = f"{workload.name}, {kind}" + (" ÷ eighths" if reference == "eighths" else "")
        rows.append(compare(name, times[kind], times[reference], goal=goal))
        tell(rows[-1], times[kind], times[reference], f"{workload.samples / rows[-1].ours:.0f} samples/s")
    return rows


def run_tokenizer(samples: int, *, turns: int) -> Row:
    """Documents to tokenized samples beside bare tiktoken."""
    rng = random.Random(6)
    texts = [words(rng, 800) for _ in range(samples)]
    tokenizer, options = QwenTokenizer(151643), TokenizeOptions(256, 2048)
    documents = [Sample(str(index), "s", "text", text=text) for index, text in enumerate(texts)]
    size = sum(len(text.encode()) for text in texts)
    times = take_turns(
        {
            "plain": lambda: [tokenizer._encoding.encode_ordinary(text) for text in texts],
            "ours": lambda: [tokenize_sample(document, tokenizer, options) for document in documents],
        },
        turns=turns,
    )
    row = compare("tokenizer", times["ours"], times["plain"], goal=GOAL)
    tell(row, times["ours"], times["plain"], f"{size / row.ours / 1e6:.2f} MB/s")
    return row


def tell(row: Row, ours: Times, reference: Times, rate: str) -> None:
    spread = ratios(ours.wall, reference.wall)
    verdict = f"goal <= {row.goal}: {'met' if row.met else 'missed'}" if row.goal else ""
    times = f"{row.ours:8.3f} s {row.reference:8.3f} s"
    print(f"{row.name:<38} {times}   {row.ratio:.3f} [{spread.low:.3f} - {spread.high:.3f}]   {rate:>16}   {verdict}")


MEMORY_SOURCES: dict[str, Callable[[Path, int], Workload]] = {"captions": captions, "documents": documents}


def measure_memory(sizes: list[int]) -> None:
    """Peak memory of a fresh process that prepares a source of each size, in one shard and in this very process."""
    for name in MEMORY_SOURCES:
        for size in sizes:
            command = [sys.executable, __file__, "--peak", name, str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name:<12} {size:>10} samples   {done.stdout.strip()}")


def peak(name: str, size: int) -> None:
    """Prepare one source in this process and print its peak memory; the raw files are made by a child."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        code = f"import prepare, pathlib; prepare.MEMORY_SOURCES[{name!r}](pathlib.Path({scratch!r}), {size})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
        file, entry = {
            "captions": (folder / "captions" / "00000.tar", {"type": "laion_en", "path": str(folder / "captions")}),
            "documents": (folder / "text.jsonl", {"type": "text", "path": str(folder / "text.jsonl")}),
        }[name]
        entry["records_per_shard"] = size
        if name == "captions":
            del entry["records_per_shard"]
        recipe = recipe_of(Workload(name, entry, lambda encoding, decode: None, size), folder)
        before = peak_memory()
        prepare(recipe, folder / "set", progress=False)
        print(f"{file.stat().st_size / 2**20:9.0f} MiB raw   peak {peak_memory():.0f} MiB, {before:.0f} before")


def measure_rows(samples: int, *, turns: int) -> None:
    """Captions whose parts are there, to rows."""
    with tempfile.TemporaryDirectory() as scratch, open_pool(2) as two:
        assert two is not None
        recipe = recipe_of(captions(Path(scratch), samples), Path(scratch))

        def write(pool: Pool) -> None:
            prepare(recipe, Path(scratch) / "set", pool=pool, progress=False, keep_parts=True)

        write(two)
        size = sum(path.stat().st_size for path in Path(scratch).glob("set.*.bin"))
        times = take_turns({"one": lambda: write(this_process()), "two": lambda: write(two)}, turns=turns)
        row = compare(f"{size / 1e9:.2f} GB of rows, two workers", times["two"], times["one"], goal=None)
        tell(row, times["two"], times["one"], f"{size / row.ours / 1e9:.2f} GB/s")


def peak_memory() -> float:
    """MiB that this program has held at most; getrusage would count what its parent held when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="samples of each source")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--smoke", action="store_true", help="few samples, two turns: shows that it works")
    parser.add_argument("--memory", type=int, nargs="+", metavar="SAMPLES", help="measure peak memory instead")
    parser.add_argument("--rows", type=int, metavar="SAMPLES", help="measure one and two workers instead")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
        return
    print(describe_machine())
    if options.memory:
        measure_memory(options.memory)
        return
    if options.rows:
        measure_rows(options.rows, turns=options.turns)
        return
    samples, turns = (20, 2) if options.smoke else (options.samples, options.turns)
    print(f"{'source':<38} {'ours':>10} {'plain':>10}   ours / plain [quartiles]")
    rows = []
    for make in (captions, questions, pages, dialogues, documents):
        with tempfile.TemporaryDirectory() as scratch:
            count = 10 * samples if make is documents else samples
            rows += run_source(make(Path(scratch), count), Path(scratch), turns=turns)
    rows.append(run_tokenizer(samples, turns=turns))
    if options.json:
        write_rows(options.json, rows)


if __name__ == "__main__":
    main()
