"""This project's loader: what a training process reads, rows packed with text included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from reading import BATCH, IMAGE_SIZE, read_task, report

from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import DataConfig, RunConfig, TrainingConfig
from megatron_vl.data.loading.loader import DataShare, RowLoader

WARM_UP = 400
"""Images of each worker until it uses compiled code, where it can."""


def main() -> None:
    """Measure."""
    task = read_task()
    model = PRESETS["qwen_vl_7b"]
    assert model.image_size == IMAGE_SIZE
    # Packed rows of seven images each; where a run begins is measured with the many rows of one image.
    name, rows = ("set", 1) if task.images else ("many", BATCH)
    config = RunConfig(
        model=model,
        data=DataConfig(data_path=(str(task.data / "ours" / name),), num_workers=task.workers),
        training=TrainingConfig(micro_batch_size=rows, global_batch_size=rows),
    )

    def batches() -> Iterator[torch.Tensor]:
        for step in RowLoader(config, share=DataShare(0, 1)).steps(task.skip):
            for batch in step.micro_batches:
                assert batch.pixels is not None
                yield batch.pixels

    report(task, batches, warm_up=WARM_UP * task.workers)


if __name__ == "__main__":
    main()
