"""``tools/plan.py RECIPE --gpus N --gpu NAME``: which layout fits these GPUs, and how long the stage takes.

Everything is calculated, from the recipe and from published rates of the GPU. Neither a GPU nor torch is needed. Flags
of training are those of ``tools/train.py``. Those that set a part of the layout keep the plans to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from megatron_vl.cli.command import check_at_least, exit_status
from megatron_vl.cli.output import check_writable, write_whole
from megatron_vl.config.batch import ROUNDING
from megatron_vl.config.load import FlagParser, add_flags, dump_config, parse_flags, resolve
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import check_ranges
from megatron_vl.errors import ConfigError
from megatron_vl.log import write_line
from megatron_vl.planning.gpus import GPUS, Gpu, check_fp8, find_gpu, read_rates, with_rates
from megatron_vl.planning.memory import USABLE
from megatron_vl.planning.plans import Answer, Plan, Question
from megatron_vl.planning.rows import Row, assumed_row, make_row
from megatron_vl.planning.search import search


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 after an error of the user."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _build_parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="tools/plan.py",
        usage="%(prog)s RECIPE --gpus N --gpu NAME [flags]",
        description="Plan a training run: layouts that fit, their memory, time and GPU-hours. All numbers are "
        "calculated from published rates. The flags of tools/train.py override the recipe; one that sets a part of "
        "the layout keeps the plans to it.",
        epilog="Example: python tools/plan.py examples/qwen_vl/stage2_multitask.yaml --gpus 32 --gpu h100 "
        "--images-per-row 5 --samples-per-row 5.5",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the run (required)")
    parser.add_argument("--gpu", metavar="NAME", help=f"their kind: {', '.join(GPUS)} (required)")
    row = "without it the data sets say it, or images are assumed to fill half of a row"
    parser.add_argument("--images-per-row", type=float, metavar="X", help=f"mean images of a row; {row}")
    parser.add_argument("--samples-per-row", type=float, metavar="X", help="mean samples of a row; likewise")
    parser.add_argument(
        "--batch-tolerance", type=float, default=ROUNDING, metavar="X",
        help="share by which the samples of a step may differ from the recipe's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--usable-memory", type=float, default=USABLE, metavar="X",
        help=f"share of the memory that may be planned; CUDA, NCCL, fragments need the rest (default: {USABLE})",
    )  # fmt: skip
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="JSON of rates of your machine, or what --profile of tools/train.py has written (docs/scale.md)",
    )
    parser.add_argument("--plan", type=int, default=1, metavar="K", help="plan to describe and write (default: 1)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the recipe with the plan's layout")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="draw the plan's schedule as SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of the plans")
    add_flags(parser)
    return parser


def _run(argv: Sequence[str]) -> None:
    options, words = parse_flags(_build_parser(), argv)
    if len(words) != 1:
        raise ConfigError(f"command line: expected one recipe, found {', '.join(words) or 'none'}")
    if options.gpus is None or options.gpu is None:
        raise ConfigError("command line: --gpus N and --gpu NAME say for which machine to plan; give both")
    check_at_least("--gpus", options.gpus, 1)
    check_at_least("--plan", options.plan, 1)
    _check_outputs(options, Path(words[0]))
    question, measured = _question(options, resolve(Path(words[0]), options))
    answer = search(question)
    if options.plan > len(answer.plans):
        raise ConfigError(f"--plan {options.plan}: there are {len(answer.plans)} plans")
    _report(options, question, answer, measured)
    _write(options, question, answer.plans[options.plan - 1])


def _check_outputs(options: argparse.Namespace, recipe: Path) -> None:
    """Raise an error if a file that will be written cannot be, or is one that is read or written already."""
    taken = {"the recipe itself, and its comments would be lost": recipe, "the file of --measured": options.measured}
    for flag in ("write", "timeline", "json"):
        path: Path | None = getattr(options, flag)
        if path is None:
            continue
        for what, other in taken.items():
            if other is not None and _is_same(path, other):
                raise ConfigError(f"--{flag} {path} is {what}; give a new file, such as planned.yaml")
        check_writable(path, flag=f"--{flag}")
        taken[f"the file of --{flag} as well"] = path


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two paths name one file, also through links."""
    return one.samefile(other) if one.exists() and other.exists() else one.resolve() == other.resolve()


def _question(options: argparse.Namespace, config: RunConfig) -> tuple[Question, list[str]]:
    """Return what is asked, and the names of the rates that the user has measured."""
    check_ranges(config)
    if not config.training.bf16:
        raise ConfigError("training.bf16 is false, and the rates of the GPUs are those of bf16; add --bf16")
    if not 0 <= options.batch_tolerance <= 1:
        raise ConfigError(f"--batch-tolerance {options.batch_tolerance:g}: expected a share from 0 to 1")
    if not 0 < options.usable_memory <= 1:
        raise ConfigError(f"--usable-memory {options.usable_memory:g}: expected a share above 0, up to 1")
    gpu, measured = _measured(options, config)
    check_fp8(gpu, config.training)
    question = Question(
        config=config,
        row=_row(options, config),
        gpu=gpu,
        num_gpus=options.gpus,
        fixed=frozenset(name for name in vars(options) if name.startswith(("parallel.", "training."))),
        usable=options.usable_memory,
        tolerance=options.batch_tolerance,
    )
    return question, measured


def _measured(options: argparse.Namespace, config: RunConfig) -> tuple[Gpu, list[str]]:
    """Return the GPU with what was measured of it, and what to say of that."""
    gpu = find_gpu(options.gpu)
    if options.measured is None:
        return gpu, []
    rates = read_rates(options.measured)
    gpu = with_rates(gpu, rates)
    names = [item.name for item in fields(rates) if getattr(rates, item.name) is not None]
    if rates.stage_times is None:
        return gpu, names
    from megatron_vl.planning.calibration import calibrate, check_profile_is_of, describe

    check_profile_is_of(rates.stage_times, gpu, config)
    found = calibrate(rates.stage_times, gpu)
    for line in describe(rates.stage_times, found, config.model):
        write_line(line)
    return replace(gpu, factors=found.factors), names


def _row(options: argparse.Namespace, config: RunConfig) -> Row:
    """Return the mean row: as the flags say, as the data sets say, or as it is assumed."""
    base = assumed_row(config) if not config.data.data_path else row_of_data(config)
    images, samples = options.images_per_row, options.samples_per_row
    if images is None and samples is None:
        return base
    given = make_row(
        config,
        images=base.images if images is None else images,
        samples=base.samples if samples is None else samples,
        tokens=base.tokens,
    )
    missing = [name for name, value in (("images", images), ("samples", samples)) if value is None]
    return replace(given, source=f"given; {missing[0]} {base.source}") if missing else given


def row_of_data(config: RunConfig) -> Row:
    """Return the mean row of the data sets from their manifests."""
    from megatron_vl.data.loading.blend import mean_over
    from megatron_vl.data.loading.plan import DataPlan

    plan = DataPlan.read(config)

    def mean(name: str) -> float:
        return mean_over([getattr(item, name) / item.num_rows for _, item in plan.data_sets], plan.blend)

    row = make_row(config, images=mean("num_images"), samples=plan.samples_per_row, tokens=mean("num_tokens"))
    return replace(row, source="from the manifests of the data")


def _report(options: argparse.Namespace, question: Question, answer: Answer, measured: Sequence[str]) -> None:
    from megatron_vl.planning import summary

    plan = answer.plans[options.plan - 1]
    sections = (
        [*summary.describe_run(question, plan), f"machine: {question.num_gpus} x {question.gpu.name}"],
        summary.describe_plans(answer.plans),
        summary.describe_best(question, plan, options.plan),
        [
            f"{answer.num_fitting} of {answer.num_valid} valid combinations fit, in {answer.num_fitting_families} "
            "families; a plan is the best of its family",
            *(f"rejected: {line}" for line in answer.rejected),
        ],
        summary.describe_assumptions(question, measured=measured),
    )
    write_line("\n\n".join("\n".join(section) for section in sections))
    if options.json is not None:
        write_whole(options.json, json.dumps(summary.record(question, answer), indent=1) + "\n")


def _write(options: argparse.Namespace, question: Question, plan: Plan) -> None:
    """Write the recipe and the picture, if they were asked for."""
    if options.write is not None:
        chosen = plan.candidate.config
        training = replace(
            question.config.training,
            micro_batch_size=chosen.training.micro_batch_size,
            recompute_granularity=chosen.training.recompute_granularity,
        )
        written = replace(question.config, parallel=chosen.parallel, training=training)
        header = f"# Planned for {question.num_gpus} x {question.gpu.name} by tools/plan.py, plan {options.plan}.\n"
        write_whole(options.write, header + dump_config(written))
        write_line(f"\nRecipe: {options.write}")
    if options.timeline is not None:
        from megatron_vl.planning.timeline import draw_plan

        write_whole(options.timeline, draw_plan(plan, question.gpu.name))
        write_line(f"\nTimeline: {options.timeline}")
