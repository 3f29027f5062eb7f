"""Generation of a whole synthetic data set: parts in parallel processes, one JSON per family, then ``meta.json``.

Everything is made in ``OUT.partial``. This folder is renamed to ``OUT`` at the end and removed on an error, so an
existing folder is complete. A second call with the same configuration finds it and does nothing. A call with another
configuration raises an error.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vl.data.synthetic.config import FAMILIES, SyntheticConfig
from megatron_vl.data.synthetic.families import FINISH, MAKE, Json, Part
from megatron_vl.data.synthetic.fonts import find_fonts
from megatron_vl.data.synthetic.geometry import MAX_ELASTIC
from megatron_vl.data.synthetic.lexicon import Corpus
from megatron_vl.data.synthetic.photos import PHOTOS, find_photos
from megatron_vl.data.synthetic.texture import find_pictures
from megatron_vl.data.synthetic.writers import write_json
from megatron_vl.errors import ConfigError, DataError
from megatron_vl.files import whole_folder

FORMAT_VERSION = 1
META = "meta.json"


@dataclass(frozen=True)
class Summary:
    """Summary of a generated data set."""

    folder: Path
    counts: dict[str, int]
    """Samples of each family (vqa: questions; refexp: expressions)."""
    answers: dict[str, float]
    """Share of each VQA answer, the most frequent first."""
    notes: tuple[str, ...]
    """Missing resources of the machine: Chinese fonts, photographs."""
    reused: bool = False
    """Whether the folder already existed, made with the same configuration."""


def generate(config: SyntheticConfig, out: Path, *, num_workers: int = 1, progress: bool = True) -> Summary:
    """Write the data set of ``config`` into the new folder ``out``; it depends only on ``config`` and the fonts.

    Raises:
        ConfigError: ``out`` exists and holds anything but this data set, or the configuration is wrong.
        DataError: ``out`` cannot be written.
    """
    check(config)
    try:
        if out.exists():
            return _existing(config, out)
        _check_inputs(config)
        return _generate(config, out, num_workers, progress)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror or error})") from error


def _generate(config: SyntheticConfig, out: Path, num_workers: int, progress: bool) -> Summary:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with whole_folder(out, partial):
        summary = _fill(config, partial, num_workers, progress)
    return replace(summary, folder=out)


def _fill(config: SyntheticConfig, folder: Path, num_workers: int, progress: bool) -> Summary:
    counts: dict[str, int] = {}
    answers: Counter[str] = Counter()
    with (
        tqdm(total=_total(config), unit="items", desc=folder.stem, disable=not progress) as bar,
        closing(_make_families(config, folder, num_workers, bar)) as families,
    ):
        for family, records, count in families:
            counts[family] = count
            if family in FINISH:
                FINISH[family](folder / family, records, config.split)
            if family == "vqa":
                answers.update(record["answer"] for record in records)
    shares = {answer: round(n / answers.total(), 4) for answer, n in answers.most_common()}
    notes = _notes(config, counts)
    meta = {"format_version": FORMAT_VERSION, "config": _plain(config), "counts": counts, "answers": shares}
    fonts = [font.name for font in find_fonts("en", config.page.num_fonts, config.font_dirs)]
    write_json(folder / META, {**meta, "fonts": fonts, "notes": notes})
    return Summary(folder, counts, shares, tuple(notes))


def check(config: SyntheticConfig) -> None:
    """Raise ConfigError if a configuration cannot work."""
    for family, count in config.counts:
        if family not in FAMILIES:
            raise ConfigError(f"counts: unknown family {family!r}; known are {', '.join(FAMILIES)}")
        if count < 0:
            raise ConfigError(f"counts.{family} is {count}, expected 0 or more")
    if not 0 < config.heldout_percent < 100:
        raise ConfigError(f"heldout_percent is {config.heldout_percent}, expected 1 to 99")
    if config.samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {config.samples_per_shard}, expected at least 1")
    if not 0 <= config.page.elastic < MAX_ELASTIC:
        raise ConfigError(f"page.elastic is {config.page.elastic}, expected 0 to less than {MAX_ELASTIC:g} pixels")
    for name, side in config.scene.sizes:
        if not 0 < side <= config.scene.image_size:
            raise ConfigError(f"scene.sizes: {name!r} is {side} pixels in an image of {config.scene.image_size}")


def _check_inputs(config: SyntheticConfig) -> None:
    """Raise ConfigError for unusable folders and files of the user, before anything is made."""
    for folder in config.font_dirs:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise ConfigError(f"--font-dir {folder}: there is no such folder; give one that holds fonts")
    page = config.page
    if page.background_dir:
        find_pictures(Path(page.background_dir))
    for flag, file in (("--corpus-en", page.corpus_en), ("--corpus-zh", page.corpus_zh)):
        if file:
            Corpus.read(Path(file), flag)


def _make_families(
    config: SyntheticConfig, folder: Path, num_workers: int, bar: tqdm[Any]
) -> Generator[tuple[str, list[Json], int], None, None]:
    """Yield (family, records, samples) for each family, in order, as soon as its last part is done."""
    parts = [part for family in FAMILIES for part in _parts(config, folder, family)]
    left = Counter(part.family for part in parts)
    found: dict[str, list[Json]] = defaultdict(list)
    made: Counter[str] = Counter()
    with ExitStack() as stack:
        results: Iterator[list[Json]] = map(make_part, parts)
        if num_workers > 1:
            pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error, the other parts are not needed
            results = pool.map(make_part, parts)
        for part, records in zip(parts, results, strict=True):
            found[part.family] += records
            made[part.family] += part.count
            left[part.family] -= 1
            bar.update(part.count)
            if not left[part.family]:
                records = found.pop(part.family)
                yield part.family, records, len(records) or made[part.family]


def make_part(part: Part) -> list[Json]:
    """Make one part, in a worker process."""
    return MAKE[part.family](part)


def _parts(config: SyntheticConfig, folder: Path, family: str) -> list[Part]:
    count, size = config.count(family), config.samples_per_shard
    if family == "photos":
        count = len(find_photos(config.split)) if count else 0
        size = max(count, 1)
    if not count:
        return []
    (folder / family).mkdir(parents=True, exist_ok=True)
    return [
        Part(config, folder / family, family, index, first, min(size, count - first))
        for index, first in enumerate(range(0, count, size))
    ]


def _total(config: SyntheticConfig) -> int:
    return config.num_images + config.count("text") + (len(find_photos(config.split)) if config.count("photos") else 0)


def _notes(config: SyntheticConfig, counts: dict[str, int]) -> list[str]:
    notes = []
    if config.page.chinese_share and not find_fonts("zh", 1, config.font_dirs):
        pages = round(config.page.chinese_share * counts.get("ocr", 0))
        notes.append(
            f"no Chinese font, about {pages} pages are English instead: install the Debian "
            "package fonts-noto-cjk or fonts-wqy-microhei, or give --font-dir"
        )
    wanted = sum(photo.split == config.split for photo in PHOTOS) if config.count("photos") else 0
    if counts.get("photos", 0) < wanted:
        missing = wanted - counts.get("photos", 0)
        notes.append(f"{missing} of {wanted} photographs are missing: install the package scikit-image")
    return notes


def _existing(config: SyntheticConfig, out: Path) -> Summary:
    try:
        meta = json.loads((out / META).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out}: exists and is no synthetic data set ({error}); give another folder") from error
    if meta.get("config") != _plain(config) or meta.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{out}: holds a synthetic data set of another configuration; remove it or give another folder"
        )
    return Summary(out, meta["counts"], meta["answers"], tuple(meta["notes"]), reused=True)


def _plain(config: SyntheticConfig) -> Any:
    """Return the configuration as JSON reads it back."""
    return json.loads(json.dumps(asdict(config)))
