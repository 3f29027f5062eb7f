"""Images a second of our loader beside megatron-energon, webdataset and Hugging Face datasets.

    python benchmarks/loader.py --environments DIR [--workers 1 2] [--turns 5] [--json FILE]
    python benchmarks/loader.py --smoke

The same photographs, as JPEG files of 640 x 480, lie on a RAM disk in the form that each library reads: tars for
energon and webdataset, parquet for datasets, and a data set that ``tools/prepare_data.py`` made of the tars. A turn
starts a process for each library in an environment of its own (made in DIR if it is not there; ours too), warms up,
and times the next images, by the clock and by the CPU time of the process and its workers. The consumer does nothing
with a batch.

    float          the peers do what their users write: decode, resize to 448 by Pillow's bicubic filter, to float32,
                   normalize, all in the worker. Ours hands out uint8, which the device of the model normalizes.
    uint8          the peers run our transform, compiled resize included: what differs is how a batch comes to the
                   training process.
    uint8, Pillow  the same without the compiler.

So the tables say where a difference comes from. Before anything is timed, the pixels of every reader must be those of
Pillow, bit by bit. Last comes the time to the first batch, at the start and where a run goes on. ``--smoke`` runs our
reader alone, and needs nothing but this project.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from loader_peers.reading import IMAGE_SIZE, to_float
from measure import Row, Spread, describe_machine, ratios, write_rows
from PIL import Image

from megatron_vl.data.dataset.indexed import IndexedFile, write_index
from megatron_vl.data.dataset.manifest import HASHES, FileEntry, read_manifest, write_manifest
from megatron_vl.data.prepare.job import prepare
from megatron_vl.data.prepare.recipe import load_recipe

HERE = Path(__file__).resolve().parent
READERS = HERE / "loader_peers"
OURS, PLAIN = "ours", "ours, Pillow"
PACKAGES = {
    OURS: "pyyaml",
    "energon": "megatron-energon==7.4.1",
    "webdataset": "webdataset==1.0.2",
    "datasets": "datasets==5.2.0",
}
COMPILER = "numba==0.68.1"
SHARED = ("numpy", "pillow")
"""Packages whose version in an environment is that of this one; torch too, which comes first and by name."""
FLOAT_GOALS = {"energon": 2.0, "webdataset": 1.5}
BEST_GOAL = 1.0
"""Of the best peer, where all run our transform."""
SKIP = {OURS: 10**6, "energon": 10**4, "webdataset": 10**4, "datasets": 10**6}
"""Images consumed before the run goes on. Those of less would read them all again to get there."""
SHARDS = 4
WORDS = "a the red small dog house near old street with two people and green tree market boat under bridge".split()


@dataclass(frozen=True)
class Case:
    """One table."""

    transform: str
    workers: int
    compiled: bool = True

    @property
    def title(self) -> str:
        name = self.transform if self.compiled else f"{self.transform}, Pillow"
        return f"{name}, {self.workers} worker{'s' if self.workers > 1 else ''}"


@dataclass(frozen=True)
class Setting:
    """Where everything lies, and how much is read."""

    data: Path
    pythons: dict[str, str]
    """Interpreter of each contender."""
    images: int
    turns: int


def main() -> None:
    """Print the tables."""
    options = _parse()
    print(describe_machine())
    names = (OURS,) if options.smoke else tuple(PACKAGES)
    pythons = {name: sys.executable if options.smoke else _environment(options.environments, name) for name in names}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        files = write_data(Path(place), count=options.files, pythons=pythons)
        setting = Setting(Path(place), pythons, options.images, options.turns)
        size = sum(map(len, files)) / len(files) / 1000
        print(f"{len(files)} photographs of 640 x 480, {size:.0f} kB each")
        check_pixels(files, setting)
        kinds = (("float", True), ("uint8", True), ("uint8", False))[: 1 if options.smoke else 3]
        cases = [Case(transform, workers, compiled) for transform, compiled in kinds for workers in options.workers]
        rows = [row for case in cases for row in measure(case, setting)]
        rows += measure_starts(setting)
    if options.json:
        write_rows(options.json, rows)


# Data


def photographs(count: int) -> list[bytes]:
    """Crops of real photographs, 640 x 480, as JPEG of quality 90."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the photographs are those of scikit-image: pip install scikit-image")
    names = ("astronaut.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg")
    originals = [Image.open(Path(package.origin).parent / "data" / name).convert("RGB") for name in names]
    rng, encoded = random.Random(0), []
    for index in range(count):
        image = originals[index % len(originals)]
        height = int(min(image.height, image.width * 3 / 4) * rng.uniform(0.7, 1.0))
        width = height * 4 // 3
        left, top = rng.randrange(image.width - width + 1), rng.randrange(image.height - height + 1)
        buffer = io.BytesIO()
        crop = image.crop((left, top, left + width, top + height)).resize((640, 480), Image.Resampling.BICUBIC)
        crop.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def write_data(place: Path, *, count: int, pythons: dict[str, str]) -> list[bytes]:
    """Write the photographs in every form; returns the files."""
    files, rng = photographs(count), random.Random(1)
    captions = [" ".join(rng.choices(WORDS, k=14)) for _ in files]
    (place / "tars").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(place / "tars" / f"{shard:05d}.tar", "w") as archive:
            for index in range(shard, count, SHARDS):
                for suffix, data in (("jpg", files[index]), ("txt", captions[index].encode())):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (place / "parquet").mkdir()
    images = [{"bytes": data, "path": f"{index}.jpg"} for index, data in enumerate(files)]
    table = pyarrow.table({"image": images, "caption": captions})
    pyarrow.parquet.write_table(table, place / "parquet" / "part.parquet", row_group_size=100)
    (place / OURS).mkdir()
    source = {"name": "photographs", "type": "img2dataset", "path": str(place / "tars")}
    for name, mode in (("set", "mixed"), ("single", "none")):
        values = {"sources": [source], "num_queries": 256, "num_bpe_tokens": 151643, "pack": {"mode": mode}}
        (place / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
        prepare(load_recipe(place / "recipe.yaml"), place / OURS / name, progress=False)
    _multiply(place / OURS / "single", place / OURS / "many", num_rows=SKIP[OURS] + 10_000)
    if "energon" in pythons:
        _run([pythons["energon"], str(READERS / "prepare_energon.py"), str(place / "tars")])
    return files


def _multiply(source: Path, target: Path, *, num_rows: int) -> None:
    """Write a data set of so many rows, the rows of ``source`` again and again."""
    for suffix, kind in ((".tokens", np.int32), (".keys", np.uint8)):
        with_modes = suffix == ".tokens"
        with IndexedFile(f"{source}{suffix}", with_modes=with_modes) as stored:
            sequences = [stored.read_bytes(index) for index in range(len(stored))]
            chosen = np.arange(num_rows) % len(stored)
            modes = None if stored.modes is None else stored.modes[chosen]
            write_index(f"{target}{suffix}", stored.lengths[chosen], kind, modes)
        with Path(f"{target}{suffix}.bin").open("wb") as data:
            data.writelines(sequences[index] for index in chosen.tolist())
    for end in (".images.bin", ".images.idx", HASHES):
        Path(f"{target}{end}").symlink_to(f"{source}{end}")
    manifest = read_manifest(source)
    entries = [FileEntry(entry.suffix, Path(f"{target}{entry.suffix}").stat().st_size) for entry in manifest.files]
    write_manifest(target, replace(manifest, num_rows=num_rows, files=tuple(entries)))


def _environment(folder: Path, name: str) -> str:
    """The interpreter of an environment for one contender, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"making {folder / name}", flush=True)
        _run([sys.executable, "-m", "venv", str(folder / name)])
        pins = [f"{package}=={importlib.metadata.version(package)}" for package in SHARED]
        torch_pin = f"torch=={torch.__version__.partition('+')[0]}"
        _run([str(python), "-m", "pip", "install", "--quiet", torch_pin])
        _run([str(python), "-m", "pip", "install", "--quiet", torch_pin, *pins, COMPILER, PACKAGES[name]])
    compile_once = "from megatron_vl.data.images.resize import compiled_resize; compiled_resize()"
    _run([str(python), "-c", compile_once])  # is kept
    return str(python)


# Measuring


def read(name: str, case: Case, setting: Setting, *more: str) -> dict[str, Any]:
    """Run the reader of a library; returns what it reports."""
    library = OURS if name == PLAIN else name
    compiled = case.compiled and name != PLAIN
    arguments = ["--transform", case.transform, "--workers", str(case.workers), *more]
    script = str(READERS / f"read_{library}.py")
    command = [setting.pythons[library], "-W", "ignore", script, str(setting.data), *arguments]
    return json.loads(_run([*command, "--started", repr(time.time())], compiled=compiled).splitlines()[-1])


def _run(command: Sequence[str], *, compiled: bool = True) -> str:
    path = [HERE.parent] if compiled else [READERS / "without_numba", HERE.parent]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def check_pixels(files: Sequence[bytes], setting: Setting) -> None:
    """Every reader gives the pixels that Pillow gives; otherwise times would say nothing.

    Raises:
        SystemExit: one does not.
    """
    expected: dict[str, set[str]] = {"uint8": set(), "float": set()}
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        expected["uint8"].add(hashlib.sha256(pixels.tobytes()).hexdigest())
        expected["float"].add(hashlib.sha256(to_float(image).numpy().tobytes()).hexdigest())
    count = "300"  # by then our worker has compiled its resize
    for transform in ("float", "uint8"):
        for name in setting.pythons:
            found = set(read(name, Case(transform, 1), setting, "--check", "--images", count)["hashes"])
            if not found <= expected["uint8" if name == OURS else transform]:
                raise SystemExit(f"{name}, {transform}: other pixels than Pillow's")
    print("pixels are Pillow's, bit by bit, in every reader")


def measure(case: Case, setting: Setting) -> list[Row]:
    """One table: every contender in turn."""
    peers = [name for name in setting.pythons if name != OURS]
    names = [OURS, *([PLAIN] if case.transform == "float" else []), *peers]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(setting.turns):
        for name in names:
            found[name].append(read(name, case, setting, "--images", str(setting.images)))
    print(f"\n{case.title}\n  {'':<14} {'images/s':>24} {'CPU ms/image':>24}")
    for name, results in found.items():
        rate, cpu = (_spread(results, key) for key in ("images_per_second", "cpu_ms_per_image"))
        print(f"  {name:<14} {_text(rate):>24} {_text(cpu):>24}", flush=True)
    best = max(peers, key=lambda name: _spread(found[name], "images_per_second").middle, default=None)
    rows = []
    for name in peers:
        goal = FLOAT_GOALS.get(name) if case.transform == "float" else BEST_GOAL if name == best else None
        rows.append(_compare(f"{case.title}, beside {name}", found[OURS], found[name], goal))
        if case.transform == "float":
            rows.append(_compare(f"{case.title}, by Pillow, beside {name}", found[PLAIN], found[name], None))
    return rows


def measure_starts(setting: Setting) -> list[Row]:
    """Milliseconds to the first batch of eight images: of a new run, and of one that goes on."""
    print(
        f"\n{'first batch, ms':<16} {'from process start':>22} {'from opening':>22} {'same, going on':>22} after images"
    )
    rows, case = [], Case("float", 1)
    for name in setting.pythons:
        fresh, later = [], []
        for _ in range(setting.turns):
            fresh.append(read(name, case, setting, "--images", "0"))
            later.append(read(name, case, setting, "--images", "0", "--skip", str(SKIP[name])))
        start, opening, resumed = (
            _spread(results, key, 1000.0)
            for results, key in ((fresh, "start_seconds"), (fresh, "open_seconds"), (later, "open_seconds"))
        )
        texts = " ".join(f"{_text(spread):>22}" for spread in (start, opening, resumed))
        print(f"{name:<16} {texts} {SKIP[name]:>12,}", flush=True)
        title = f"{name}: ms to the first batch after {SKIP[name]:,} images, beside that of a new run"
        rows.append(Row(title, resumed.middle, opening.middle, resumed.middle / opening.middle, None, None))
    return rows


def _compare(title: str, ours: list[dict[str, float]], peer: list[dict[str, float]], goal: float | None) -> Row:
    """Images a second of ours beside a peer's, turn by turn: more is better."""
    mine, other = ([result["images_per_second"] for result in results] for results in (ours, peer))
    ratio = ratios(mine, other)
    met = None if goal is None else ratio.middle >= goal
    verdict = "" if goal is None else f"; goal >= {goal}: {'met' if met else 'MISSED'}"
    print(f"  {title}: ratio {ratio.middle:.2f} [{ratio.low:.2f} - {ratio.high:.2f}]{verdict}", flush=True)
    return Row(f"{title}, images/s", median(mine), median(other), ratio.middle, goal, met)


def _spread(results: list[dict[str, float]], key: str, factor: float = 1.0) -> Spread:
    return Spread.of([factor * result[key] for result in results])


def _text(spread: Spread) -> str:
    digits = 0 if spread.middle >= 1000 else 1 if spread.middle >= 20 else 2
    return f"{spread.middle:.{digits}f} [{spread.low:.{digits}f} - {spread.high:.{digits}f}]"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where the peers' environments are or go")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--files", type=int, default=400, help="photographs")
    parser.add_argument("--images", type=int, default=400, help="images of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    parser.add_argument("--smoke", action="store_true", help="our reader alone, a few images: shows that it works")
    options = parser.parse_args()
    if options.smoke:
        options.files, options.images, options.turns = 24, 16, 2
    if not options.smoke and options.environments is None:
        parser.error("--environments is needed to compare; --smoke runs without")
    return options


if __name__ == "__main__":
    main()
