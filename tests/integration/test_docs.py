"""The documentation is true where a program can tell: its commands run, its links lead somewhere, its tables are the
code's.

Commands run in a folder that has the checkout's folders as links and room for what they write. ``documented.py`` says
in which form; a command that it does not know fails here.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from megatron_vl.config import synonyms
from tests.helpers.data.published_grounding import write_downloads
from tests.integration.documented import ONE_STEP, PAGES, RECIPES, ROOT, Command, documented_commands
from tests.test_architecture import ORDER
from tests.unit.report.fake_run import write_fake_run

COMMANDS = documented_commands()
LINKED = ("examples", "tools", "tests", "benchmarks", "docs", "megatron_vl", "setup.py", "constraints-cpu.txt")
TOOLS = tuple(f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py")))
FEW = "--num-workers 1 --no-progress --num-scenes"
RAW = f"python tools/make_synthetic_data.py runs/quickstart/raw/{{}} --split {{}} {FEW} 60"
BEFORE = (
    RAW.format("train", "train"),
    RAW.format("heldout", "heldout"),
    f"python tools/make_synthetic_data.py raw {FEW} 40",
    "python tools/prepare_data.py my_data.yaml --model-preset tiny --output data/other --workers 1 --quiet",
    "python make_inputs.py",
)
"""What the commands find: the quickstart's raw data, and the files that the pages speak of."""
STAND_IN = '#!/bin/sh\necho "python $*"\n'


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    output: str


def environment(folder: Path) -> dict[str, str]:
    """Without GPU, and with this interpreter first."""
    launchers = ("SLURM_", "OMPI_", "PMI_", "MPI_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "STAGE", "RECIPE"):
        kept.pop(name, None)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    return kept | own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, with what the commands need to begin."""
    folder = tmp_path_factory.mktemp("docs")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for prefix in ("DATA", "PREFIX", "VISION", "TEXT", "CHATS"):
        (folder / f"{prefix}.json").touch()
    named_block = re.compile(r"^```\w+\n(# (\S+\.(?:yaml|py))\n.*?)^```", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for block in named_block.findall(page.read_text(encoding="utf-8")):
            (folder / block[1]).write_text(block[0], encoding="utf-8")
    write_fake_run(folder / "runs" / "finished")
    write_downloads(folder / "downloads")
    for environment_folder in (".venv", ".venv-newest"):
        stand_in = folder / environment_folder / "bin" / "python"
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text(STAND_IN, encoding="utf-8")
        stand_in.chmod(0o755)
        (stand_in.parent / "activate").write_text(f'PATH="{stand_in.parent}:$PATH"\n', encoding="utf-8")
    return folder


def in_one_process(commands: list[str], folder: Path) -> list[Outcome]:
    """Run ``python SCRIPT ...`` commands in a process of their own."""
    lines = "".join(json.dumps(shlex.split(command)[1:]) + "\n" for command in commands)
    results = folder / "results.jsonl"
    script = [sys.executable, str(ROOT / "tests" / "integration" / "run_tools.py"), str(results)]
    subprocess.run(
        script, input=lines, cwd=folder, env=environment(folder), text=True, timeout=500, check=True, stderr=PIPE
    )
    return [Outcome(*json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]


def in_bash(command: str, folder: Path) -> Outcome:
    """Run a command line."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


def is_tool(command: str) -> bool:
    return command.startswith(("python tools/", "python benchmarks/"))


@pytest.fixture(scope="module")
def outcomes(workplace: Path) -> dict[str, Outcome]:
    """How each thing that was run ended, by its command line."""
    known = [command for command in COMMANDS if command.rule]
    wanted = [command.runs for command in known] + [command.help for command in known if command.help]
    tools = [*BEFORE, *(f"python {tool} --help" for tool in TOOLS), *filter(is_tool, wanted)]
    found = dict(zip(tools, in_one_process(tools, workplace), strict=True))
    return found | {command: in_bash(command, workplace) for command in dict.fromkeys(wanted) if not is_tool(command)}


def test_pages_and_recipes_have_commands() -> None:
    places = {command.where for command in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "docs/data.md"} <= places
    without = {str(path.relative_to(ROOT)) for path in RECIPES} - places
    assert not without, f"no line '# Command   ...' in the header of {without}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}: {command.text[:60]}")
def test_documented_command(command: Command, outcomes: dict[str, Outcome]) -> None:
    rule = command.rule
    assert rule is not None, f"{command.where}: no rule of tests/integration/documented.py knows: {command.text}"
    outcome = outcomes[command.runs]
    assert outcome.status == rule.status and rule.says in outcome.output, f"{command.runs}\n{outcome.output}"
    if command.help:
        listed = outcomes[command.help].output
        assert {option for option in command.options if option not in listed} == set()


def test_what_the_commands_found_was_there(outcomes: dict[str, Outcome]) -> None:
    failed = {command: outcomes[command].output for command in BEFORE if outcomes[command].status}
    assert not failed


@pytest.mark.long
def test_training_under_torchrun(workplace: Path, outcomes: dict[str, Outcome]) -> None:
    trained = [command for command in COMMANDS if command.text.startswith("torchrun") and "tools/train" in command.text]
    assert trained
    for number, command in enumerate(trained):
        text = re.sub(r"--save \S+", f"--save runs/torchrun/{number}", command.text)
        goes_on = "--train-iters 2" if " --load " in text else ""
        text = text.replace("torchrun", "torchrun --standalone", 1)
        outcome = in_bash(f"{text} {ONE_STEP} {goes_on}", workplace)
        assert outcome.status == 0, outcome.output


# --- links, names and tables ------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link can point at: headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_text_exist(page: Path) -> None:
    top = "|".join(("megatron_vl", "tests", "tools", "examples", "benchmarks", "docs"))
    named = re.findall(rf"`((?:{top})/[\w./-]+)`", prose(page))
    made = {"docs/results/learn.md", "docs/results/learn.json"}
    assert {name for name in named if not (ROOT / name).exists()} - made == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_in_the_text_exist(page: Path, outcomes: dict[str, Outcome]) -> None:
    known = "".join(outcomes[f"python {tool} --help"].output for tool in TOOLS)
    known += "".join(outcomes[command.help].output for command in COMMANDS if command.help)
    known += " --all --smoke --output --release --format --reference --vocab-file --vision --language --no-deps "
    known += " --resize_mode --save_additional_columns --kill-on-bad-exit --max-restarts "  # not our flags
    known += " --requeue --signal --dependency --capture-range "
    known += "".join(f" --{name.replace('_', '-')} " for name in synonyms.NOTES)  # refused with a reason
    named = re.findall(r"(--[a-z][\w-]+)", " ".join(re.findall(r"`([^`\n]+)`", prose(page))))
    assert {flag for flag in named if not re.search(rf"{flag}\b(?!-)", known)} == set()


def tables(page: str) -> Iterator[list[list[str]]]:
    """The tables of a page as rows of cells, the heading first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("- :")]


def column(page: str, first: str) -> dict[str, list[str]]:
    """The table whose first heading is ``first``: its rows by their first cell."""
    table = next(table for table in tables(page) if table[0][0] == first)
    return {row[0]: row[1:] for row in table[1:]}


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_ranks_are_those_of_the_architecture_test() -> None:
    ranks = column("docs/architecture.md", "rank")
    assert {int(rank): tuple(code(cells[0])) for rank, cells in ranks.items()} == dict(enumerate(ORDER))


def test_sources_have_the_options_of_their_readers() -> None:
    from megatron_vl.data.sources.base import Source
    from megatron_vl.data.sources.registry import SOURCES

    documented = {code(kind)[0]: set(code(cells[2])) for kind, cells in column("docs/data.md", "type").items()}
    found = {kind: {item.name for item in dataclasses.fields(reader)} for kind, reader in SOURCES.items()}
    common = {item.name for item in dataclasses.fields(Source)}
    assert documented == {kind: options - common for kind, options in found.items()}
    (sentence,) = re.findall(r"^Every source has .*", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert common <= set(code(sentence))


def test_recipe_keys_and_defaults_are_those_of_the_code() -> None:
    from megatron_vl.data.prepare.recipe import DataRecipe, MixtureOptions, PackOptions

    documented = {key: cells[0] for cell, cells in column("docs/data.md", "key").items() for key in code(cell)}
    fields = {item.name: item.default for item in dataclasses.fields(DataRecipe)}
    for name, options in (("pack", PackOptions), ("mixture", MixtureOptions)):
        del fields[name]
        fields |= {f"{name}.{item.name}": item.default for item in dataclasses.fields(options)}
    assert set(documented) == set(fields)
    stated = {key: value.strip("`") for key, value in documented.items() if re.fullmatch(r"\d+|`\w+`", value)}
    stated.pop("max_sample_length")
    assert stated == {key: str(fields[key]).lower() for key in stated} and len(stated) >= 5


def test_filters_are_those_of_the_code() -> None:
    from megatron_vl.data.filters.options import FilterOptions

    documented = {name.partition(":")[0] for cell in column("docs/data.md", "filter") for name in code(cell)}
    assert documented - {"near", "han", "latin_han"} == {item.name for item in dataclasses.fields(FilterOptions)}


def test_reasons_are_those_of_the_code() -> None:
    documented = [reason for cell in column("docs/data.md", "reason") for reason in code(cell)]
    assert sorted(documented) == sorted(set(documented)) and set(documented) == set(skip_reasons())


REASON_PLACES = {"SkipSample": 0, "Skipped": 1, "_numbers": 2, "Rule": 0, "Dropped": 0, "leave_out": 0}
"""Which argument is a reason: of the error, of the records, and of functions that pass it on."""


def skip_reasons() -> Iterator[str]:
    """Strings that stand where the data package gives a reason: arguments of the calls above, ``problem=``, and what
    the checks of archive members return."""
    for path in sorted((ROOT / "megatron_vl" / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            places: list[ast.expr | None] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = REASON_PLACES.get(node.func.id)
                places = [keyword.value for keyword in node.keywords if keyword.arg == "problem"]
                places += node.args[place : place + 1] if place is not None else []
            elif isinstance(node, ast.FunctionDef) and node.name == "_problem":
                places = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
            yield from (
                place.value
                for place in places
                if isinstance(place, ast.Constant) and isinstance(place.value, str) and place.value
            )


def test_messages_of_the_quickstart_page_are_in_the_code() -> None:
    sources = [*ROOT.glob("megatron_vl/**/*.py"), *ROOT.glob("examples/**/*.sh")]
    text = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    messages = [message for cell in column("docs/quickstart.md", "message") for message in code(cell)]
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert len(messages) > 15 and {part for part in parts if part not in text} == set()
