"""``tools/train.py RECIPE [flags]``: train a stage, or describe what would be trained.

Everything that can be refused is refused before torch is imported. So a wrong flag, a missing data set or a model that
this machine cannot hold is reported in a second on every rank. Errors of a user are one message and an exit status.
Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.config.batch import data_parallel_size, model_parallel_size, num_microbatches, with_rows
from megatron_vl.config.data_files import check_data_files
from megatron_vl.config.load import FlagParser, add_flags, dump_config, parse_flags, resolve
from megatron_vl.config.outputs import check_outputs
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import check_device, validate
from megatron_vl.errors import ConfigError, DataError, ExitStatus
from megatron_vl.launch import has_cuda_device, hide_devices, read_launch, set_device_environment
from megatron_vl.log import setup_logging, silence_dependency_warnings, write_line
from megatron_vl.training.ending import recording_refusals

if TYPE_CHECKING:
    from megatron_vl.planning.layout import PipelineLayout
    from megatron_vl.planning.rows import Row

_LESS_MEMORY = (
    "Less is needed with a smaller --micro-batch-size, --recompute-granularity full, --bf16, a larger "
    "--tensor-model-parallel-size or --pipeline-model-parallel-size, more ranks with --use-distributed-optimizer, or a "
    "smaller --vision-micro-batch-size with --vision-parallel data"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return exit_status(
        lambda: _run(sys.argv[1:] if argv is None else argv),
        # During the steps the trainer handles the signal itself.
        if_interrupted="interrupted outside the steps; nothing was saved that is not in the log",
        less_memory=_LESS_MEMORY,
    )


def _run(argv: Sequence[str]) -> ExitStatus:
    launch, parser = read_launch(), _build_parser()
    options, words = parse_flags(parser, argv)
    if len(words) > 1:
        raise ConfigError(f"command line: expected one recipe, found {', '.join(words)}")
    config = resolve(Path(words[0]) if words else None, options)
    if options.world_size is not None and not (options.dry_run or options.check):
        raise ConfigError("command line: --world-size is for --dry-run and --check; a run takes it from its launcher")
    if options.gpu is not None and not options.dry_run:
        raise ConfigError("command line: --gpu is for --dry-run; a run takes the GPUs that are here")
    if options.build and not options.dry_run:
        raise ConfigError("command line: --build is for --dry-run; a run builds its model by itself")
    if options.world_size is not None:
        check_at_least("--world-size", options.world_size, 1)
    if options.dry_run:
        world_size = options.world_size or model_parallel_size(config.parallel)
        counted = _dry_run(config, world_size, options.gpu)
        if options.build:
            _rehearse(counted, world_size)
        return ExitStatus.DONE
    if options.check:
        _refuse_early(config, options.world_size or launch.world_size)
        return ExitStatus.DONE
    with recording_refusals(config, launch.rank):
        _refuse_early(config, launch.world_size)
    return _start(config)


def _build_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="tools/train.py",
        usage="%(prog)s RECIPE [flags]",
        description="Train Qwen-VL. Flags override the recipe; each is also a key of the recipe, under the section "
        "whose name heads its group. Sizes shown as defaults are those of qwen_vl_7b.",
        epilog="Example: python tools/train.py examples/qwen_vl/stage2_multitask.yaml --dry-run "
        "--pipeline-model-parallel-size 4",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration, layout and parameters, and stop")
    parser.add_argument("--check", action="store_true", help="check configuration, data and device, and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks that --dry-run and --check assume")
    parser.add_argument(
        "--build", action="store_true", help="with --dry-run, build each rank's model and run a step without contents"
    )
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run, refuse what this GPU cannot hold, such as h100")
    add_flags(parser)
    return parser


def _refuse_early(config: RunConfig, world_size: int) -> None:
    """Raise ``ConfigError`` for a run that cannot work here, before torch is imported."""
    from megatron_vl.planning.layout import resolve_layout

    cuda = has_cuda_device()
    check_data_files(config)
    check_device(_num_parameters(config), cuda=cuda)
    validate(config, world_size=world_size, cuda=cuda)
    resolve_layout(config)
    if read_launch().rank == 0:
        check_outputs(config)
    _check_files(config, world_size, cuda=cuda)


def _check_files(config: RunConfig, world_size: int, *, cuda: bool) -> None:
    """Refuse what the manifests and the checkpoint's small files show, and rows that do not divide."""
    from megatron_vl.data.loading.plan import DataPlan
    from megatron_vl.training.start import check_start

    plan = DataPlan.read(config)
    counted, _ = plan.count_rows(config, world_size)
    validate(counted, world_size=world_size, cuda=cuda)
    if config.data.valid_data_path:
        DataPlan.read(config, key="valid_data_path")
    check_start(config, plan.fingerprint)


def _num_parameters(config: RunConfig) -> int:
    from megatron_vl.planning.parameters import count_parameters

    return sum(count_parameters(config.model).values())


def _start(config: RunConfig) -> ExitStatus:
    setup_logging()
    silence_dependency_warnings()
    set_device_environment(
        tensor_parallel=config.parallel.tensor_model_parallel_size > 1,
        deterministic=config.training.deterministic_mode,
    )
    import torch

    # A torch without CUDA on a machine with a GPU passes the early check.
    check_device(_num_parameters(config), cuda=torch.cuda.is_available())
    from megatron_vl.backends.platform import prepare_process

    prepare_process()
    from megatron_vl.training.trainer import train

    return train(config)


def _dry_run(config: RunConfig, world_size: int, gpu: str | None) -> RunConfig:
    """Print what ``world_size`` ranks would do; return the run with its batch in rows, if its data are here.

    The output is itself a recipe, since all additions are comments.
    """
    from megatron_vl.planning.layout import resolve_layout
    from megatron_vl.planning.parameters import parameters_by_rank

    validate(config, world_size=world_size, cuda=True)  # the plan may be for another machine
    layout = resolve_layout(config)
    data_lines, counted = _plan_data(config, world_size)
    validate(counted, world_size=world_size, cuda=True)
    write_line(dump_config(config))
    parallel = config.parallel
    data_parallel = data_parallel_size(parallel, world_size)
    write_line(
        f"# {world_size} ranks = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {data_parallel}; {_describe_batch(counted, data_parallel)}"
    )
    for line in data_lines:
        write_line(f"# {line}")
    write_line(f"# model: {_num_parameters(config):,} parameters; pipeline layout {layout}")
    write_line("#")
    write_line("# pipeline rank   tensor rank          trained           frozen   stages")
    for rank in parameters_by_rank(config, layout):
        write_line(
            f"# {rank.pipeline_rank:13}   {rank.tensor_rank:11}   {rank.trained:14,}   {rank.frozen:14,}   {rank.units}"
        )
    _describe_memory(counted, layout, world_size, gpu)
    return counted


def _rehearse(config: RunConfig, world_size: int) -> None:
    """Run a step of every rank that differs, without contents, and print what each holds, sends and waits for.

    Raises:
        ConfigError: if the trainer refuses the run, ranks would hang or fail, or they do not do what is planned.
    """
    from megatron_vl.planning.layout import resolve_layout
    from megatron_vl.rehearsal.run import rehearse

    hide_devices()
    outcome = rehearse(config, resolve_layout(config), _mean_row(config), world_size)
    for line in ("", *outcome.lines):
        write_line(f"# {line}".rstrip())
    if outcome.faults:
        raise ConfigError("the rehearsal failed; do not start this run:\n  " + "\n  ".join(outcome.faults))


def _mean_row(config: RunConfig) -> Row:
    """Return the mean row of the data if they are here, else the assumed one."""
    from megatron_vl.cli.plan import row_of_data
    from megatron_vl.planning.rows import assumed_row

    try:
        return row_of_data(config) if config.data.data_path else assumed_row(config)
    except DataError:
        return assumed_row(config)


def _describe_memory(config: RunConfig, layout: PipelineLayout, world_size: int, gpu: str | None) -> None:
    """Print the calculated memory of each pipeline rank on a GPU; raises ``ConfigError`` if ``gpu`` cannot hold it."""
    from megatron_vl.planning.gpus import check_fp8, find_gpu
    from megatron_vl.planning.memory import USABLE, Layout, rank_memories
    from megatron_vl.planning.rows import assumed_row
    from megatron_vl.planning.summary import memory_line

    data_parallel = data_parallel_size(config.parallel, world_size)
    row = assumed_row(config)
    counted = with_rows(config, row.samples, world_size)  # by the assumed row, if the data are not here
    micro_batches = num_microbatches(counted.training, data_parallel)
    memories = rank_memories(
        config,
        Layout.of(config, layout),
        row.computed(config),
        world_size=world_size,
        micro_batches=micro_batches,
    )
    write_line("#")
    write_line(f"# memory of a GPU, calculated for data-parallel size {data_parallel}; rows {row.source}")
    for number, memory in enumerate(memories):
        write_line(f"# {memory_line(number, memory)}")
    if gpu is not None:
        check_fp8(find_gpu(gpu), config.training)
    fullest = max(memory.total for memory in memories)
    if gpu is not None and fullest > USABLE * find_gpu(gpu).memory:
        raise ConfigError(
            f"--gpu {gpu} has {find_gpu(gpu).memory / 1e9:.0f} GB, of which a run may use {USABLE:.0%}, and the "
            f"fullest rank needs {fullest / 1e9:.1f} GB; tools/plan.py finds layouts that fit"
        )


def _describe_batch(config: RunConfig, data_parallel: int) -> str:
    training = config.training
    if training.global_batch_samples is not None:
        return f"a step = {training.global_batch_samples:,} samples, in rows as the data set's manifest says"
    return (
        f"a step = {training.global_batch_size} rows = {num_microbatches(training, data_parallel)} micro-batches x "
        f"{training.micro_batch_size} rows x data {data_parallel}"
    )


def _plan_data(config: RunConfig, world_size: int) -> tuple[list[str], RunConfig]:
    """Describe what the run reads from its data, and convert its batch to rows, if the data are here.

    A plan for another machine is made without them; data that are here and do not fit are refused.
    """
    if not config.data.data_path:
        return [], config
    from megatron_vl.data.loading.plan import DataPlan

    try:
        plan = DataPlan.read(config)
    except DataError as error:
        return [f"data: how often their rows are taken is not known; {' '.join(str(error).split())}"], config
    counted, said = plan.count_rows(config, world_size)
    num_rows = counted.training.train_iters * counted.training.global_batch_size
    return ([said] if said else []) + plan.describe(num_rows), counted
