"""One rank of ``audit.py``: a training step of real ranks over gloo, with what it holds and what it sends.

torchrun --nproc-per-node SIZE benchmarks/audit_rank.py JOB RESULT
"""

from __future__ import annotations

import json
import pickle
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_vl.backends.platform import prepare_process

prepare_process()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from step import Workload, make_batch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from megatron_vl.config.schema import RunConfig  # noqa: E402
from megatron_vl.data.loading.balance import image_shares  # noqa: E402
from megatron_vl.data.loading.batch import MicroBatch  # noqa: E402
from megatron_vl.parallel.topology import Topology  # noqa: E402
from megatron_vl.training.parallel_model import ParallelModel, build_parallel_model  # noqa: E402
from megatron_vl.training.step import train_step  # noqa: E402


@dataclass
class Found:
    """What one rank held and sent in a step, in bytes."""

    weights: int = 0
    gradients: int = 0
    buckets: int = 0
    """The gradients with the padding of their buckets."""
    masters: int = 0
    moments: int = 0
    received: dict[str, float] = field(default_factory=dict)
    """Bytes that a ring brings to a rank, by what they serve and group, without messages."""
    sent: int = 0
    """Floating-point messages to other pipeline stages."""


_SCALARS = 64
"""Collectives of at most so many bytes exchange counts and norms."""
_KINDS = {
    "_allgather_base_": "layers",
    "_reduce_scatter_base_": "layers",
    "allreduce_": "layers",
    "reduce_scatter_tensor_coalesced_": "buckets",
    "allgather_into_tensor_coalesced_": "buckets",
    "allreduce_coalesced_": "buckets",
}
"""What torch's operators serve in a step: tensor parallelism, or gradients and weights of data parallelism."""


class Recorder(TorchDispatchMode):
    """Counts every collective and message that passes through torch's dispatcher."""

    def __init__(self, groups: dict[str, str]) -> None:
        super().__init__()
        self.groups = groups
        self.received: dict[str, float] = defaultdict(float)
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(one) for one in args if _is_group(one))
        if group.size() == 1:
            return
        kind = f"{_KINDS.get(name, name)} {self.groups.get(group.group_name, 'other')}"
        tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        if name == "send":
            self.sent += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        elif largest <= _SCALARS:
            self.received["scalars"] += largest
        elif name != "recv_":
            passes = 2 if name.startswith("allreduce") else 1
            self.received[kind] += passes * largest * (group.size() - 1) / group.size()


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def run_case(config: RunConfig, images: list[list[int]], topology: Topology) -> Found:
    """Train one step and return what this rank held and sent.

    Args:
        images: of each micro-batch, for each data-parallel rank.
    """
    model = build_parallel_model(config, topology)
    batches = own_images(make_batches(config, images[topology.dp_rank]), config, topology)
    recorder = Recorder(_labels(topology))
    with recorder:
        train_step(model, batches, config=config, topology=topology, step=0)
    found = _state(model)
    found.received, found.sent = dict(recorder.received), recorder.sent
    return found


def make_batches(config: RunConfig, images: list[int]) -> list[MicroBatch]:
    """Return micro-batches of one row each, with so many images; a text-only one has a blank image without slots."""
    return [_batch(config, count) for count in images]


def _batch(config: RunConfig, images: int) -> MicroBatch:
    batch = make_batch(config.model, Workload(1, config.data.seq_length, max(images, 1), None))
    if images:
        return batch
    none = torch.empty(0, dtype=torch.int64)
    return replace(batch, slots=none, span_images=none, num_images=1)


def own_images(batches: list[MicroBatch], config: RunConfig, topology: Topology) -> list[MicroBatch]:
    """Return the micro-batches with the pixels of the images that this rank encodes."""
    if config.parallel.vision_parallel == "pipeline":
        return batches
    counts, group = [batch.work.num_images for batch in batches], topology.mp_group
    shares = image_shares([int(count) for count in counts], rank=group.rank(), size=group.size())
    return [
        replace(batch, pixels=batch.pixels[own.start : own.stop]) for batch, own in zip(batches, shares, strict=True)
    ]


def _labels(topology: Topology) -> dict[str, str]:
    """Return what each group is called; of groups of the same ranks the last name counts."""
    groups = topology.groups
    by_label = {
        "world": dist.group.WORLD,
        "model": groups.mp,
        "pipeline": groups.pp,
        "data": groups.dp_cp,
        "tensor": groups.tp,
    }
    return {group.group_name: label for label, group in by_label.items() if group.size() > 1}


def _state(model: ParallelModel) -> Found:
    found = Found()
    for chunk in model.all_wrapped:
        found.weights += sum(value.nbytes for value in chunk.parameters())
        found.gradients += sum(value.main_grad.nbytes for value in chunk.parameters() if value.requires_grad)
        found.buckets += sum(buffer.grad_data.nbytes for buffer in chunk.buffers)
    for member in model.optimizer.chained_optimizers:
        optimizer = member.optimizer
        if optimizer is None:
            continue
        for values in optimizer.state.values():
            found.moments += sum(one.nbytes for name, one in values.items() if name in ("exp_avg", "exp_avg_sq"))
        own = {id(value) for chunk in model.all_wrapped for value in chunk.parameters()}
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        masters = [value for value in parameters if value.dtype == torch.float32 and id(value) not in own]
        found.masters += sum(value.nbytes for value in masters)
    return found


def main() -> None:
    """Run every case in turn; rank 0 writes what all ranks found."""
    cases: dict[str, tuple[RunConfig, list[list[int]]]] = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - audit.py wrote it
    result: dict[str, list[dict[str, Any]]] = {}
    dist.init_process_group("gloo")  # for all cases; each has its own groups
    for name, (config, images) in cases.items():
        with Topology(config.parallel) as topology:
            place = {"pipeline_rank": topology.pp_rank, "data_rank": topology.dp_rank, "tensor_rank": topology.tp_rank}
            mine = asdict(run_case(config, images, topology)) | place
            every: list[Any] = [None] * topology.world_size
            dist.all_gather_object(every, mine)
            result[name] = every
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
