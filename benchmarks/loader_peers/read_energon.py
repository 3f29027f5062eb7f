"""megatron-energon: a captioning data set through a task encoder and the loader that can be saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    SavableDataLoader,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from reading import BATCH, read_task, report, to_float, to_uint8


class FloatEncoder(DefaultTaskEncoder[CaptioningSample, CaptioningSample, Any, Any]):
    """Images come as Pillow's, and leave as normalized floats."""

    decoder = SampleDecoder(image_decode="pil")

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        sample.image = to_float(sample.image)
        return sample


class BytesEncoder(DefaultTaskEncoder[CaptioningSample, CaptioningSample, Any, Any]):
    """Images come as files, and leave as uint8."""

    decoder = None

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        sample.image = to_uint8(sample.image)
        return sample


class IdleEncoder(BytesEncoder):
    """Images stay files: to get to a position."""

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        return sample


def main() -> None:
    """Measure."""
    task = read_task()

    def open_loader(encoder: DefaultTaskEncoder[Any, Any, Any, Any]) -> SavableDataLoader[Any]:
        data_set = get_train_dataset(
            str(task.data / "tars"),
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=task.workers),
            batch_size=BATCH,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            task_encoder=encoder,
        )
        # From a state kept by the way, here after every batch (usually once a minute), the loader reads again what came
        # between it and the position.
        return get_savable_loader(data_set, checkpoint_every_sec=0 if task.skip else 60)

    state = None
    if task.skip:
        consumed = open_loader(IdleEncoder())
        for _ in itertools.islice(consumed, task.skip // BATCH):
            pass
        state = consumed.save_state_rank()

    def batches() -> Iterator[torch.Tensor]:
        loader = open_loader(FloatEncoder() if task.transform == "float" else BytesEncoder())
        loader.restore_state_rank(state)
        for batch in loader:
            yield batch.image

    report(task, batches, warm_up=2 * task.workers * BATCH)


if __name__ == "__main__":
    main()
