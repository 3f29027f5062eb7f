"""The commands of the documentation, and in what form each kind of them runs in a test.

A command is a line of a ```` ```bash ```` block in a Markdown file, or what stands behind ``Command`` in the header of
a recipe. The first rule of ``RULES`` that matches says what is run in its place: the command itself with fewer steps,
or up to the answer that it gives on a machine without GPU. Nothing runs that no rule knows.

Rules are in the order in which a user works, and commands are run in that order: data before training before export.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "megatron_vl/data/README.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
RECIPES = sorted(ROOT.glob("examples/**/*.yaml"))

_BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"^# Command +([^\\\n]*(?:\\\n# +[^\\\n]*)*)", re.MULTILINE)

ONE_STEP = "--train-iters 1 --lr-warmup-iters 0 --global-batch-size 4 --micro-batch-size 2 --log-interval 1"
NO_GPU = "9,655,886,592 parameters and no CUDA"


@dataclass(frozen=True)
class Command:
    """One documented command."""

    text: str
    """Without comment, in one line."""
    where: str

    @cached_property
    def rule(self) -> Rule | None:
        """The first rule that knows it."""
        return next((rule for rule in RULES if re.fullmatch(rule.pattern, self.text)), None)

    @property
    def runs(self) -> str:
        """What is run in its place."""
        assert self.rule is not None
        return re.sub(self.rule.pattern, self.rule.runs, self.text)

    @property
    def help(self) -> str:
        """What lists its options, or nothing if running it checks them."""
        assert self.rule is not None
        return re.sub(self.rule.pattern, self.rule.help, self.text)

    @property
    def options(self) -> set[str]:
        """Its long options."""
        return {word.partition("=")[0] for word in shlex.split(self.text) if word.startswith("--")}


@dataclass(frozen=True)
class Rule:
    """How a kind of command is run; see the module."""

    pattern: str
    """Regular expression of the whole command."""
    runs: str
    """Replacement of the pattern."""
    status: int = 0
    says: str = ""
    """What is in the output."""
    help: str = ""
    """Replacement of the pattern: a command that lists the options, where what is run does not check them."""


RULES = (
    Rule(r"(python tools/make_synthetic_data\.py .*)", r"\1 --num-scenes 40 --num-workers 1 --no-progress"),
    Rule(
        r"(python tools/prepare_data\.py .* --skip-missing)",  # none of the published data sets is here
        r"\1 --workers 1 --quiet",
        status=2,
        says="the files of all sources are missing",
    ),
    Rule(r"(python tools/prepare_data\.py (?!.*--(?:verify|phase)).*)", r"\1 --workers 1 --quiet", says="samples and"),
    Rule(r"(python tools/prepare_data\.py .*--phase parts.*)", r"\1 --workers 1 --quiet", says="parts are there"),
    Rule(r"(python tools/prepare_data\.py .*--phase plan.*)", r"\1 --quiet", says="rows are planned"),
    Rule(r"(python tools/prepare_data\.py .*--phase rows.*)", r"\1 --workers 1 --quiet", says="data/mine"),
    Rule(r"(python tools/prepare_data\.py .* --verify)", r"\1", says="as the manifest says"),
    Rule(r"(python tools/inspect_data\.py .* --output .*)", r"\1", says="Page: page.html"),
    Rule(r"(python tools/inspect_data\.py .* --summary)", r"\1", says="left out"),
    Rule(r"(python tools/make_questions\.py .*)", r"\1 --limit 2"),
    Rule(r"(python tools/doctor\.py .*)", r"\1", says="0 wrong"),
    # Two ranks are started by tests/integration/test_doctor.py.
    Rule(r"torchrun --nproc-per-node \d+ (tools/doctor\.py)", r"python \1 --help", says="usage:"),
    Rule(r"(python tools/\w+\.py --help)", r"\1", says="usage:"),
    Rule(r"(python tools/plan\.py (?!.*--measured runs/).*)", r"\1", says="combinations fit"),
    Rule(r"(python tools/train\.py .*--data-path .*--dry-run)", r"\1", says="the run takes each row"),
    # The published depth takes minutes: tests/integration/test_rehearsal.py.
    Rule(
        r"(python tools/train\.py .*--dry-run) --world-size \d+ (--build.*)",
        r"\1 --world-size 16 \2 --vision-num-layers 4 --num-layers 4",
        says="no rank waits for ever",
    ),
    Rule(r"(python tools/train\.py .*--dry-run.*)", r"\1", says="pipeline layout"),
    # Several ranks take seconds to start: test_training_under_torchrun does, here one process trains a step.
    Rule(
        r"(?:python tools/)?torchrun(?:\.py)? --nproc-per-node \d+ (tools/train\.py (?!.*--\w+-model-parallel-size).*)",
        rf"python \1 {ONE_STEP}",
        says="lm loss",
    ),
    Rule(r"(python tools/train\.py .*)", rf"\1 {ONE_STEP}", says="lm loss"),
    Rule(  # there is a profile of a CPU, which one of them wrote
        r"(python tools/plan\.py .*--measured runs/.*)", r"\1", status=2, says="a profile of a CPU says nothing about"
    ),
    # Checked when the checkpoints are there that the others have written.
    Rule(
        r"torchrun --nproc-per-node (\d+) (tools/train\.py .*--\w+-model-parallel-size.*)",
        r"python \2 --check --world-size \1",
    ),
    Rule(r"(python tools/evaluate_loss\.py .*)", r"\1", says='"num_tokens"'),
    Rule(r"(python tools/generate\.py .*)", r"\1 --max-new-tokens 2"),
    Rule(r"(python tools/tokenize_text\.py .*)", r"\1", says="12 tokenize, 4 sft, 2 chat"),
    Rule(r"python tools/make_report\.py runs/quickstart", r"python tools/make_report.py runs/finished", says="Report:"),
    Rule(r"(python tools/convert_checkpoint\.py export .*)", r"\1", says="bytes of weights"),
    Rule(
        r"(python tools/convert_checkpoint\.py import --vision .*)",  # there are no such files here
        r"\1",
        status=2,
        says="open_clip_pytorch_model.bin: no such file",
    ),
    Rule(r"(python tools/convert_checkpoint\.py import .*)", r"\1", says="iter_0000000"),
    Rule(r"(python tools/convert_checkpoint\.py check .*)", r"\1", says="sound"),
    Rule(r"(python make_inputs\.py)", r"\1"),
    Rule(r"(python tools/forward\.py .*)", r"\1"),
    # Two ranks are started by tests/integration/test_forward.py.
    Rule(r"torchrun --nproc-per-node 2 (tools/forward\.py .*) --tensor-model-parallel-size 2", r"python \1"),
    Rule(r"(python compare\.py)", r"\1", says="logits"),
    # At the published sizes: up to the answer of a machine without GPU.
    Rule(
        r"torchrun --nproc-per-node (\d+) (examples/pretrain_qwenvl\.sh .*)",
        r"python \2 --check --world-size \1",
        status=2,
        says=NO_GPU,
    ),
    Rule(
        r"(STAGE=\d )?(?:GPUS_PER_NODE=\d )?(bash examples/pretrain_qwenvl\.sh .*)",
        r"\1 GPUS_PER_NODE=8 \2",
        status=2,
        says=NO_GPU,
    ),
    # What it holds is checked by tests/integration/test_kubernetes.py.
    Rule(
        r"kubectl apply -f (examples/k8s/\w+\.yaml)",
        r"""python -c "import yaml; print(*(item['kind'] for item in yaml.safe_load_all(open('\1'))))" """,
        says="Job",
    ),
    # Scripts that install: with a stand-in for the interpreter of .venv, which says what it is asked to do.
    Rule(
        r"(bash examples/(?:quickstart|tiny/learn)\.sh.*)",
        r"\1",
        says="-m megatron_vl.cli.quickstart",
        help="bash examples/quickstart.sh --help",
    ),
    Rule(r"(bash tests/run\.sh.*)", r"\1", says="-m pytest"),
    Rule(r"(bash tests/newest_core\.sh)", r"\1", says="-m tests.parallel.exchange read"),
    Rule(r"(python benchmarks/\w+\.py).*", r"\1 --help", says="usage:", help=r"\1 --help"),
    # tests/run.sh collects them with all others, and skips them.
    Rule(r"python -m pytest (tests/gpu)", r"ls \1", says="test_device.py"),
    # Into another folder than the checkout's, which the result has to equal.
    Rule(
        r"python tests/golden/regenerate\.py",
        'python -c \'from pathlib import Path; from tests.golden import regenerate as it; it.GOLDEN = Path("golden"); '
        "it.main()' && diff -r golden tests/golden/recipes && echo the same",
        says="the same",
    ),
)


def documented_commands() -> list[Command]:
    """Every documented command once, in the order in which they are run; unknown ones first."""
    commands: dict[str, Command] = {}
    for path in RECIPES:
        for match in _HEADER.finditer(path.read_text(encoding="utf-8")):
            _add(commands, match[1].replace("\\\n#", " "), path)
    for path in PAGES:
        for match in _BLOCK.finditer(path.read_text(encoding="utf-8")):
            for line in match[2].replace("\\\n", " ").splitlines():
                _add(commands, line, path)
    order = {rule: number for number, rule in enumerate(RULES)}
    return sorted(commands.values(), key=lambda command: -1 if command.rule is None else order[command.rule])


def _add(commands: dict[str, Command], line: str, path: Path) -> None:
    words = shlex.split(line, comments=True)
    if words:
        assignments = [word for word in words if re.fullmatch(r"[A-Z_]+=\S*", word)]
        text = " ".join([*assignments, shlex.join(words[len(assignments) :])])
        commands.setdefault(text, Command(text, str(path.relative_to(ROOT))))
