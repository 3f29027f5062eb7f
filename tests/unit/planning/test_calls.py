"""The steps of every rank are those of Megatron-Core's own schedules, whose messages are written down here."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from megatron_vl.config.schema import ParallelConfig, RunConfig
from megatron_vl.planning.calls import Call, Step, Wait, message, rank_program
from megatron_vl.planning.schedule import Pass, Pipeline
from tests.helpers.ranks import RankPools, Start

if TYPE_CHECKING:
    import torch

SIZES = [
    (2, 1, 1), (2, 1, 4), (4, 1, 2), (4, 1, 7),
    (2, 2, 2), (2, 2, 4), (2, 3, 6), (3, 2, 9), (4, 2, 4), (4, 2, 8), (4, 3, 8),
]  # fmt: skip


@pytest.mark.parametrize(("size", "virtual", "count"), SIZES)
def test_the_steps_are_those_of_megatron_core(ranks: RankPools, size: int, virtual: int, count: int) -> None:
    pipeline = Pipeline(size, virtual, count)
    (found,) = ranks(1).run(write_down, pipeline)
    for rank in range(size):
        expected = rank_program(pipeline, rank)
        if version("megatron-core").startswith("0.16."):
            assert found[rank] == expected
        else:  # a later version waits earlier for what it has sent
            assert _without_sent(found[rank]) == _without_sent(expected)


def test_a_single_rank_calls_nobody() -> None:
    assert rank_program(Pipeline(1, 1, 2), 0) == [
        Pass(0, 0, False), Pass(0, 0, True), Pass(1, 0, False), Pass(1, 0, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "virtual", "count"), [*SIZES, (8, 4, 32)])
def test_two_ranks_call_for_every_message(size: int, virtual: int, count: int) -> None:
    """Of all ranks together, each message is sent once and received once, in the same order by both."""
    pipeline = Pipeline(size, virtual, count)
    calls = [[step for step in rank_program(pipeline, rank) if isinstance(step, Call)] for rank in range(size)]
    for rank in range(size):
        for peer in {(rank + 1) % size, (rank - 1) % size}:
            received = [one for call in calls[peer] for one in call.receives]
            sent = [one for call in calls[rank] for one in call.sends if one in set(received)]
            assert [one for one in received if one in set(sent)] == sent
    given = [one for own in calls for call in own for one in call.sends]
    taken = [one for own in calls for call in own for one in call.receives]
    assert sorted(given) == sorted(taken) and len(set(given)) == len(given) == 2 * count * (pipeline.num_stages - 1)


def _without_sent(steps: list[Step]) -> list[Step]:
    sent = {one for step in steps if isinstance(step, Call) for one in step.sends}
    kept = [
        Wait(tuple(one for one in step[0] if one not in sent)) if isinstance(step, Wait) else step for step in steps
    ]
    return [step for step in kept if step != Wait(())]


def write_down(start: Start, pipeline: Pipeline) -> list[list[Step]]:
    """On a process of its own: run the schedule of each rank alone, and return what it does."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pipeline.size,
        virtual_pipeline_model_parallel_size=pipeline.virtual if pipeline.virtual > 1 else None,
    )
    # Megatron-Core asks a group for its rank only where there is a process group.
    with start.topology(ParallelConfig()):
        return [_Diary(pipeline, rank).of(RunConfig(parallel=parallel)) for rank in range(pipeline.size)]


class _Diary:
    """What one rank does.

    A tensor that is sent holds the number of its message. One that is received holds a serial number, until the pass
    that takes it says which message it was.
    """

    def __init__(self, pipeline: Pipeline, rank: int) -> None:
        self.pipeline, self.rank = pipeline, rank
        self.steps: list[Step] = []
        self.received = 0
        self.names: dict[int, int] = {}
        """Messages, by the serial number with which they were received, which is negative."""

    def of(self, config: RunConfig) -> list[Step]:
        """Run the schedule with neighbors that are always there."""
        import torch
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron_vl.model.configs import Target, core_configs

        core = core_configs(config, Target("cpu", transformer_engine=False)).schedule
        virtual, count = self.pipeline.virtual, self.pipeline.micro_batches
        chunks = [_chunk(self, core, number) for number in range(virtual)]
        group = SimpleNamespace(size=lambda: self.pipeline.size, rank=lambda: self.rank)
        alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        names = ("tp", "cp", "embd", "pos_embd", "dp_cp")
        plain = virtual == 1
        schedule = (
            schedules.forward_backward_pipelining_without_interleaving
            if plain
            else schedules.forward_backward_pipelining_with_interleaving
        )

        def step(numbers: Any, chunk: Any) -> Any:
            return chunk(next(numbers)), lambda output: (output.sum(), torch.ones((), dtype=torch.int), {})

        iterators = [iter(range(count)) for _ in chunks]
        schedule(
            forward_step_func=step,
            data_iterator=iterators[0] if plain else iterators,
            model=chunks[0] if plain else chunks,
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
            p2p_communicator=_communicator(self, core, group),
            pg_collection=ProcessGroupCollection(pp=group, **dict.fromkeys(names, alone)),
        )
        return [self._named(step) for step in self.steps]

    def _named(self, step: Step) -> Step:
        if isinstance(step, Pass):
            return step
        return type(step)(*(tuple(self.names.get(one, one) for one in field) for field in step))

    def compute(self, what: Pass, taken: torch.Tensor | None) -> int:
        """Note a pass and what it takes; return the number of what it gives."""
        stage = what.chunk * self.pipeline.size + self.rank
        self.steps.append(what)
        if taken is not None and taken.flatten()[0] < 0:
            before = stage + 1 if what.is_backward else stage - 1
            self.names[int(taken.flatten()[0])] = message(self.pipeline, before, what)
        return message(self.pipeline, stage, what)

    def receive(self) -> int:
        """Return the serial number of a message."""
        self.received += 1
        return -self.received


def _chunk(diary: _Diary, core: Any, number: int) -> Any:
    import torch
    from megatron.core.enums import ModelType

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor, micro_batch: int) -> torch.Tensor:
            ctx.micro_batch = micro_batch
            return torch.full_like(value, diary.compute(Pass(micro_batch, number, False), value))

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            given = diary.compute(Pass(ctx.micro_batch, number, True), gradients[0])
            return torch.full_like(gradients[0], given), None

    class Chunk(torch.nn.Module):
        model_type = ModelType.encoder_or_decoder
        share_embeddings_and_output_weights = False
        config = core
        vp_stage = number if diary.pipeline.virtual > 1 else None
        input: torch.Tensor | None = None

        def set_input_tensor(self, received: Any) -> None:
            self.input = received[0] if isinstance(received, list) else received

        def forward(self, micro_batch: int) -> torch.Tensor:
            value = torch.zeros(1, 1, 1, requires_grad=True) if self.input is None else self.input
            output: torch.Tensor = Note.apply(value, micro_batch)
            return output

    return Chunk()


def _communicator(diary: _Diary, core: Any, group: Any) -> Any:
    import torch
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    class Request:
        def __init__(self, number: int) -> None:
            self.number = number

        def wait(self) -> None:
            diary.steps.append(Wait((self.number,)))

    class Communicator(P2PCommunicator):
        def __init__(self) -> None:
            self.pp_group, self.config = group, core
            self.virtual_pipeline_model_parallel_size = core.virtual_pipeline_model_parallel_size

        def _communicate(
            self,
            *,
            tensor_send_next: torch.Tensor | None,
            tensor_send_prev: torch.Tensor | None,
            recv_prev: bool,
            recv_next: bool,
            tensor_shape: Any,
            wait_on_reqs: bool = True,
        ) -> Any:
            sent = {"send_next": tensor_send_next, "send_prev": tensor_send_prev}
            sends = {name: int(one.flatten()[0]) for name, one in sent.items() if one is not None}
            wanted = {"recv_prev": recv_prev, "recv_next": recv_next}
            receives = {name: diary.receive() for name, is_wanted in wanted.items() if is_wanted}
            numbers = (*sends.values(), *receives.values())
            if numbers:
                diary.steps.append(Call(tuple(sends.values()), tuple(receives.values())))
                if wait_on_reqs:
                    diary.steps.append(Wait(numbers))
            received = [
                torch.full((1, 1, 1), float(receives[name]), requires_grad=True) if name in receives else None
                for name in wanted
            ]
            requests = None if wait_on_reqs else {name: Request(one) for name, one in (sends | receives).items()}
            return *received, requests

    return Communicator()
