"""Give every rank its micro-batches, from the loaders of the ranks that read.

The first rank of each tensor-parallel group reads the rows of its data-parallel rank. It sends the group the shapes and
types of the tensors; the contents follow when a micro-batch is due (``parallel/arrival.py``). Each pipeline stage reads
for itself, and only stages with the patch embedding decode images. So no data travels between stages. A field is
missing on a rank only if nothing on that rank would use it.

Under ``vision_parallel data`` every rank reads the rows, since every rank decodes its share of the images. The tensors
of a micro-batch without its pixels, a few kB, still come from the first rank of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.config.schema import RunConfig
from megatron_vl.data.loading.batch import MicroBatch
from megatron_vl.data.loading.loader import DataShare, ImageShare, RowLoader, StepBatch
from megatron_vl.parallel.agreement import together
from megatron_vl.parallel.collectives import share_outlines
from megatron_vl.parallel.topology import Topology
from megatron_vl.planning.flops import FrozenParts, image_cost
from megatron_vl.planning.layout import resolve_layout


@dataclass(frozen=True)
class Feed:
    """The data of a run on this rank; ``loader`` is None on ranks that receive what another rank has read."""

    loader: RowLoader | None
    topology: Topology
    read_everywhere: bool = False
    """Whether each rank of a tensor-parallel group reads for itself."""

    def steps(self, consumed_rows: int) -> Iterator[list[MicroBatch]]:
        """Yield training steps without end."""
        return self._share(self.loader.steps(consumed_rows) if self.loader else None)

    def one_pass(self, data_set: int = 0, *, max_steps: int = 0) -> Iterator[list[MicroBatch]]:
        """Yield every row of a data set once; ``max_steps`` 0 stands for no limit."""
        return self._share(self.loader.one_pass(data_set, max_steps=max_steps) if self.loader else None)

    def describe(self, num_rows: int) -> list[str]:
        """Describe the data sets, and how often a run of ``num_rows`` rows reads each; empty on ranks that receive."""
        if self.loader is None:
            return []
        return self.loader.data_sets.plan.describe(num_rows)

    def name_rows(self, consumed_rows: int, places: Sequence[tuple[int, int]]) -> str:
        """Name the rows of a step, or of some of its micro-batches, by data set. Empty on ranks that receive."""
        return "; ".join(self.loader.name_rows(consumed_rows, places)) if self.loader else ""

    def close(self) -> None:
        """Stop the decode workers."""
        if self.loader is not None:
            self.loader.close()

    def _share(self, steps: Iterator[StepBatch] | None) -> Iterator[list[MicroBatch]]:
        while True:
            step = next(steps, None) if steps is not None else None
            batches = None if step is None else list(step.micro_batches)
            if not self.read_everywhere:
                batches = share_outlines(batches, topology=self.topology)
            if batches is None:
                return
            yield batches


def open_feed(config: RunConfig, topology: Topology, *, data_path: Sequence[str]) -> Feed:
    """Open the data sets on the ranks that read them; every rank calls it.

    Raises:
        ConfigError, DataError: on all ranks, under the conditions of ``RowLoader``.
    """
    loader = together(lambda: _open_loader(config, topology, data_path))
    return Feed(loader, topology, read_everywhere=config.parallel.vision_parallel == "data")


def _open_loader(config: RunConfig, topology: Topology, data_path: Sequence[str]) -> RowLoader | None:
    shared = config.parallel.vision_parallel == "data"
    if topology.tp_rank != 0 and not shared:
        return None
    stages = resolve_layout(config).stages_of_rank(topology.pp_rank)
    images = ImageShare(topology.mp_group.rank(), topology.mp_group.size()) if shared else None
    return RowLoader(
        config,
        share=DataShare(topology.dp_rank, topology.dp_size, images),
        with_pixels=shared or any(stage.patch_embed for stage in stages),
        data_path=data_path,
        image_cost=image_cost(config.model, FrozenParts.of(config.training)),
    )
