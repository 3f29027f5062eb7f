"""webdataset, as its documentation shows it: shards, a shuffle buffer, decode, map, batches made in the workers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import webdataset as wds
from reading import BATCH, read_task, report, to_float, to_uint8


def main() -> None:
    """Measure."""
    task = read_task()
    shards = sorted(str(path) for path in (task.data / "tars").glob("*.tar"))

    def batches() -> Iterator[torch.Tensor]:
        # Nothing remembers a position: what was consumed is read again, though not decoded.
        samples = wds.WebDataset(shards, resampled=True).slice(task.skip // task.workers, 2**60).shuffle(100)
        if task.transform == "float":
            samples = samples.decode("pil").to_tuple("jpg", "txt").map_tuple(to_float, lambda text: text)
        else:
            samples = samples.to_tuple("jpg", "txt").map_tuple(to_uint8, bytes.decode)
        loader = wds.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=task.workers)
        for pixels, _ in loader:
            yield pixels

    report(task, batches, warm_up=2 * task.workers * BATCH)


if __name__ == "__main__":
    main()
