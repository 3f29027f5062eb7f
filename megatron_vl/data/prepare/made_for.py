"""What a plan was made for: the recipe and the raw files, so that a later phase refuses others by name.

The name of a unit holds the size and time of its files and the options of its source (parts.py). The rest of the
recipe, such as the packing, is in no part, so it is kept beside the names, one line for each value. So is the state of
the benchmark images, which planning compares with those of the parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vl import __version__
from megatron_vl.data.formats.shard import hash_of_files
from megatron_vl.data.prepare.parts import Unit
from megatron_vl.data.prepare.recipe import DataRecipe


@dataclass(frozen=True)
class MadeFor:
    """A recipe and its raw files."""

    recipe: Mapping[str, str]
    """Every value of the recipe by its place, such as ``pack.seed``, and the version of this package."""
    units: tuple[str, ...]
    """Names of the units, in order."""

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits. Equal fingerprints mean equal recipes and equal files."""
        facts = json.dumps([dict(self.recipe), self.units])
        return hashlib.sha256(facts.encode()).hexdigest()[:32]


def made_for(recipe: DataRecipe, units: Sequence[Unit]) -> MadeFor:
    """Return what a preparation of these units depends on."""
    kinds = {f"sources[{i}].type": type(entry.source).__name__ for i, entry in enumerate(recipe.sources)}
    values = dict(_leaves(dataclasses.asdict(recipe), ""))
    facts = {"version of megatron_vl": __version__, **kinds, **values, **dict(_benchmarks(recipe))}
    return MadeFor(facts, tuple(unit.name for unit in units))


def _benchmarks(recipe: DataRecipe) -> Iterator[tuple[str, str]]:
    """Yield the state of every list or folder of benchmark images, with its place."""
    for index, entry in enumerate(recipe.sources):
        place = entry.filters.benchmark_images
        if place is not None:
            below = sorted(place.rglob("*")) if place.is_dir() else [place]
            files = ((path.name if path == place else str(path.relative_to(place)), path) for path in below)
            yield f"state of the files of sources[{index}].filters.benchmark_images", hash_of_files(files)


def difference(before: MadeFor, now: MadeFor, units: Sequence[Unit]) -> str:
    """Return the first thing that differs from what was before, in words; empty if nothing does.

    ``units`` are those of ``now``.
    """
    if before.fingerprint == now.fingerprint:
        return ""
    for place in sorted(before.recipe.keys() | now.recipe.keys()):
        old, new = before.recipe.get(place, "absent"), now.recipe.get(place, "absent")
        if old != new:
            return f"{place} was {old}, and is now {new}"
    known = set(before.units)
    changed = [unit for unit in units if unit.name not in known]
    if changed:
        return f"of {len(units)} shards, {len(changed)} are new or have changed since, first {changed[0]}"
    return f"there were {len(before.units)} shards, and now there are {len(now.units)}"


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield every value within dictionaries, lists and tuples, with its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")
    else:
        yield place, repr(str(value) if isinstance(value, Path) else value)
