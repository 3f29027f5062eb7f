"""Hugging Face datasets: parquet, a transform on access, and torch's DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Image, load_dataset
from reading import BATCH, read_task, report, to_float, to_uint8
from torch.utils.data import DataLoader, RandomSampler


def floats(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Images come as Pillow's."""
    return {"pixels": [to_float(image.convert("RGB")) for image in rows["image"]], "caption": rows["caption"]}


def small(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Images come as files."""
    return {"pixels": [to_uint8(image["bytes"]) for image in rows["image"]], "caption": rows["caption"]}


class _Rest:
    """The order behind what an earlier run has consumed."""

    def __init__(self, order: RandomSampler, skip: int) -> None:
        self.order, self.skip = order, skip

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.order, self.skip, None)


def main() -> None:
    """Measure."""
    task = read_task()

    def batches() -> Iterator[torch.Tensor]:
        rows = load_dataset(
            "parquet", data_files=str(task.data / "parquet" / "*.parquet"), split="train", cache_dir=task.data / "cache"
        )
        rows = rows.cast_column("image", Image(decode=task.transform == "float"))
        rows = rows.with_transform(floats if task.transform == "float" else small)
        order = RandomSampler(rows, replacement=True, num_samples=2 * 10**6)  # one epoch is too short to measure
        left = _Rest(order, task.skip)
        for batch in DataLoader(rows, batch_size=BATCH, sampler=left, num_workers=task.workers):
            yield batch["pixels"]

    report(task, batches, warm_up=2 * task.workers * BATCH)


if __name__ == "__main__":
    main()
