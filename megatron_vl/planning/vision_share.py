"""What a rank does beside the pipeline where it holds the vision part whole (``parallel.vision_parallel data``).

Each rank of a model-parallel group encodes its share of a step's images before the schedule, at tensor size 1. The
first stage receives the features of all of them, 2 q h bytes an image in bf16, and sends back as many bytes of
gradients after the schedule. With ``vision_recompute`` a trained tower keeps nothing meanwhile: it encodes again for
its backward pass, ``vision_micro_batch_size`` images at a time. Or it keeps the inputs of its layers, and computes the
layers again. Gradients and optimizer of the vision part belong to all ranks of the world. Nothing hides their exchange
(``training/image_encoder.py``, ``training/parallel_model.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_vl.config.batch import model_parallel_size
from megatron_vl.config.schema import RunConfig
from megatron_vl.planning.activations import Keeping, chunk_bytes, working_bytes
from megatron_vl.planning.flops import FrozenParts, Work
from megatron_vl.planning.gpus import Gpu
from megatron_vl.planning.layout import vision_part
from megatron_vl.planning.stage_cost import PassCost, UnitCosts


@dataclass(frozen=True)
class VisionShare:
    """The images that a rank encodes in a step."""

    config: RunConfig
    images: float
    """Images of the rank's share."""
    all_images: float
    """Images of its model-parallel group."""
    trained: float
    """Elements of the vision part that train."""

    @classmethod
    def of(cls, config: RunConfig, work: Work, micro_batches: int, trained: float) -> VisionShare | None:
        """Return the share of a step of micro-batches of ``work``, or None where stages hold the vision part."""
        if config.parallel.vision_parallel == "pipeline":
            return None
        total = work.num_images * micro_batches
        return cls(config, total / model_parallel_size(config.parallel), total, trained)

    @property
    def recomputes(self) -> bool:
        """Whether images are encoded again for the backward pass."""
        return encodes_again(self.config)

    @property
    def feature_bytes(self) -> float:
        """Bytes of the features of all images, and of their gradients."""
        model, element = self.config.model, Keeping.of(self.config).element
        return self.all_images * model.resampler.num_queries * model.language.hidden_size * element

    @property
    def own_bytes(self) -> float:
        """Bytes of the features of the rank's share."""
        return self.feature_bytes / model_parallel_size(self.config.parallel)

    def sent_bytes(self, sender: int, receiver: int) -> float:
        """Return the bytes that a rank of one stage sends to those of another in a step: features, or gradients."""
        tensor = self.config.parallel.tensor_model_parallel_size
        if receiver == 0:
            return self.own_bytes * (tensor - 1 if sender == 0 else tensor)
        return self.own_bytes if sender == 0 and not self._trains_nothing else 0.0

    @property
    def kept_bytes(self) -> float:
        """Bytes that the vision part keeps while the schedule runs."""
        if self.recomputes:
            return 0.0
        return chunk_bytes(self.config, vision_part(self.config.model), Work(self.images), self._keeping)

    @property
    def backward_bytes(self) -> tuple[float, float]:
        """Bytes that the backward pass of the images at a time keeps, and what it needs besides."""
        largest = Work(max((images for images, _ in self._parts), default=0.0))
        part = vision_part(self.config.model)
        kept = self.kept_bytes or chunk_bytes(self.config, part, largest, self._keeping)
        return kept, working_bytes(self.config, part, largest, self._keeping)

    def seconds(self, gpu: Gpu) -> float:
        """Return the time in which the rank encodes its share and goes backward through it."""
        return sum(times * one.seconds(gpu) for one, times in self._passes(gpu))

    def launch_seconds(self, gpu: Gpu) -> float:
        """Return the part of it in which the GPU waits for the CPU."""
        return sum(times * (one.seconds(gpu) - one.gpu_seconds(gpu)) for one, times in self._passes(gpu))

    def _passes(self, gpu: Gpu) -> Iterator[tuple[PassCost, float]]:
        """Yield each kind of pass, and how often a step has it."""
        part = vision_part(self.config.model)
        for images, times in self._parts:
            cost = self._units(images).stage(part, trained=self.trained, factors=gpu.factors)
            yield cost.forward, times * (2 if self.recomputes else 1)
            yield cost.backward, times

    def exchange_seconds(self, gpu: Gpu, far_stages: int) -> float:
        """Return the time of features on their way to the first stage, and of gradients on their way back.

        A rank of the first stage receives from all ranks at once, so the slower link decides. It sends gradients to one
        rank after another.

        Args:
            far_stages: stages on another host than the first one.
        """
        parallel = self.config.parallel
        far = parallel.tensor_model_parallel_size * far_stages * self.own_bytes
        there = max(gpu.nvlink.seconds(self.exchanged_bytes[0] - far), gpu.network.seconds(far))
        if self._trains_nothing:
            return there
        near_stages = parallel.pipeline_model_parallel_size - 1 - far_stages
        back = gpu.nvlink.seconds(near_stages * self.own_bytes, near_stages)
        return there + back + gpu.network.seconds(far_stages * self.own_bytes, far_stages)

    @property
    def exchanged_bytes(self) -> tuple[float, float]:
        """Bytes of features that a rank of the first stage receives in a step, and of gradients that it sends back.

        Every rank of the first stage needs all features. Their gradients are the same on each of them. So each sends
        those of a share of the other stages' ranks, and those of the first stage are there already.
        """
        group, tensor = model_parallel_size(self.config.parallel), self.config.parallel.tensor_model_parallel_size
        there = self.feature_bytes * (group - 1) / group
        back = self.feature_bytes * (group - tensor) / group / tensor
        return there, 0.0 if self._trains_nothing else back

    @property
    def _trains_nothing(self) -> bool:
        frozen = FrozenParts.of(self.config.training)
        return frozen.vision and frozen.resampler

    @property
    def _keeping(self) -> Keeping:
        keeping, parallel = replace(Keeping.of(self.config), tensor=1, sequence=False), self.config.parallel
        if not parallel.vision_recompute:
            return keeping
        # Images that are encoded again are so as a whole, not layer by layer.
        return replace(keeping, recompute="full" if parallel.vision_recompute_granularity == "layers" else None)

    @property
    def parts(self) -> int:
        """How often images are encoded together; a rank without images encodes none."""
        return math.ceil(self.images / self.config.parallel.vision_micro_batch_size)

    @property
    def units(self) -> UnitCosts:
        """The mean cost of the units for images that are encoded together."""
        return self._units(self.images / max(1, self.parts))

    @property
    def _parts(self) -> list[tuple[float, float]]:
        """How many images are encoded together, and how often: full parts, and the rest."""
        size = self.config.parallel.vision_micro_batch_size
        full, rest = divmod(self.images, size)
        return [(images, times) for images, times in ((size, full), (rest, 1)) if images and times]

    def _units(self, images: float) -> UnitCosts:
        return UnitCosts.of(self.config, Work(images), self._keeping)


def encodes_again(config: RunConfig) -> bool:
    """Return whether the images of a trained tower are encoded a second time, as a whole."""
    parallel = config.parallel
    whole = parallel.vision_recompute and parallel.vision_recompute_granularity == "images"
    return whole and not config.training.freeze_vision
