"""The quickstart: what its script lists, and its runner (what is done again, what is not, what is counted)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vl import folder_lock
from megatron_vl.cli.quickstart.ledger import Ledger, StepState
from megatron_vl.cli.quickstart.main import main
from megatron_vl.cli.quickstart.run_info import STAGES
from megatron_vl.cli.quickstart.runner import Runner, StepFailed, condense
from megatron_vl.cli.quickstart.steps import Step, read_steps

ROOT = Path(__file__).resolve().parents[3]


class _Bench:
    """A run directory whose steps append a line to a file each time they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "run")
        self.ledger.run_dir.mkdir()
        self.said: list[str] = []

    def output(self, name: str) -> Path:
        """The file that a step makes."""
        return self.folder / f"{name}.txt"

    def step(self, name: str, code: str = "", words: Sequence[str] = ()) -> Step:
        """A step that adds a line to its output and then runs ``code``."""
        output = self.output(name)
        script = f"open({str(output)!r}, 'a').write('ran\\n'); {code}"
        return Step(name, (("python", "-c", script, *words),), (output,))

    def run(self, *steps: Step) -> None:
        """Run the steps in a new runner."""
        Runner(self.ledger, self.folder, self.said.append).run(steps)

    def lines(self, name: str) -> int:
        """How often a step ran since its output was last removed."""
        return len(self.output(name).read_text().splitlines())

    def ran(self, name: str) -> bool:
        """Whether the last runs said that the step finished."""
        found = any(f"{name}: finished" in line for line in self.said)
        self.said.clear()
        return found


@pytest.fixture
def bench(tmp_path: Path) -> _Bench:
    return _Bench(tmp_path)


def test_a_finished_step_is_not_run_again(bench: _Bench) -> None:
    bench.run(bench.step("a"))
    assert bench.ran("a")
    bench.run(bench.step("a"))
    assert not bench.ran("a")
    assert [timing.step for timing in bench.ledger.times()] == ["a"]


def test_changed_commands_recipes_or_predecessors_start_a_step_over(bench: _Bench) -> None:
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text("x: 1")
    first, second = bench.step("a", words=["recipe.yaml"]), bench.step("b", words=[str(bench.output("a"))])
    bench.run(first, second)
    bench.run(first, second)
    assert (bench.lines("a"), bench.lines("b")) == (1, 1)
    bench.ran("a")
    recipe.write_text("x: 2")
    bench.run(first, second)
    assert "a: finished" in str(bench.said)
    assert bench.ran("b")
    assert (bench.lines("a"), bench.lines("b")) == (1, 1)
    assert [timing.step for timing in bench.ledger.times()] == ["a", "b"]
    bench.run(first, bench.step("b", "pass", words=[str(bench.output("a"))]))
    assert "a: done before" in str(bench.said)
    assert bench.ran("b")


def test_a_removed_output_is_made_again(bench: _Bench) -> None:
    bench.run(bench.step("a"))
    (bench.folder / "a.txt").unlink()
    bench.run(bench.step("a"))
    assert bench.lines("a") == 1


@pytest.mark.parametrize(("resumes", "lines"), [(False, 1), (True, 2)])
def test_after_a_failure_outputs_are_removed_or_gone_on_with(bench: _Bench, resumes: bool, lines: int) -> None:
    code = f"import os; os.path.exists({str(bench.folder / 'go')!r}) or exit('error: no go')"
    step = bench.step("a", code, words=["--auto-resume"] if resumes else [])
    with pytest.raises(StepFailed, match=r"(?s)a: exit status 1 of.*error: no go"):
        bench.run(step)
    (bench.folder / "go").touch()
    bench.run(step)
    assert bench.lines("a") == lines
    assert [timing.finished for timing in bench.ledger.times()] == [False, True]


def test_steps_side_by_side_stop_beginning_after_a_failure(bench: _Bench) -> None:
    """The others last until half a second after the failure is recorded, so that those which began are counted."""
    recorded = bench.ledger.run_dir / "timings.jsonl"
    wait = f"import os, time\nwhile not os.path.exists({str(recorded)!r}): time.sleep(0.01)\ntime.sleep(0.5)"
    steps = [bench.step("bad", "exit(3)"), *(bench.step(f"s{i}", wait) for i in range(6))]
    with pytest.raises(StepFailed, match="bad: exit status 3"):
        bench.run(*steps)
    assert [timing.step for timing in bench.ledger.times()] == ["bad", "s0"], "two run at a time"
    bench.run(*steps[1:])
    assert all(bench.lines(f"s{i}") == 1 for i in range(6))


def test_the_time_of_a_killed_attempt_is_counted_up_to_its_last_word(bench: _Bench) -> None:
    log = bench.ledger.log_path("a")
    log.parent.mkdir()
    log.write_text("step 3")
    os.utime(log, (1000.0, 1000.0))
    bench.ledger.write("a", StepState("old", running_since=940.0))
    bench.ledger.settle("a")
    bench.ledger.settle("a")
    (timing,) = bench.ledger.times()
    assert (timing.seconds, timing.began, timing.finished) == (60.0, 940.0, False)


def _start_runner(folder: Path, code: str, names: str) -> subprocess.Popen[str]:
    """Start a runner with a step for each letter of ``names``, in a process of its own."""
    script = folder / "drive.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from megatron_vl.cli.quickstart.ledger import Ledger\n"
        "from megatron_vl.cli.quickstart.main import leave_on_terminate\n"
        "from megatron_vl.cli.quickstart.runner import Runner\n"
        "from megatron_vl.cli.quickstart.steps import Step\n"
        "leave_on_terminate()\n"
        f"steps = [Step(name, (('python', '-c', {code!r}),)) for name in {names!r}]\n"
        "Runner(Ledger(Path(sys.argv[1])), Path(sys.argv[1]), lambda line: print(line, flush=True)).run(steps)\n"
    )
    command = [sys.executable, str(script), str(folder)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_signal_ends_the_steps_that_run_and_their_time_counts(tmp_path: Path, names: str) -> None:
    """The first one to end leaves the list of those that run while the others are still to be told."""
    process = _start_runner(
        tmp_path, "import time; print('up', flush=True); time.sleep(60); open('worked', 'w')", names
    )
    assert process.stdout is not None
    seen: set[str] = set()
    while len(seen) < len(names):
        line = process.stdout.readline().strip()
        seen |= {line} if line.endswith("up") else set()
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert [timing.finished for timing in Ledger(tmp_path).times()] == [False] * len(names)
    assert not (tmp_path / "worked").exists()


def test_a_second_start_into_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with folder_lock.hold(tmp_path, ".lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(""))
        patch.setattr("signal.signal", lambda *_: None)
        assert main([str(tmp_path)]) == 2
    assert f"error: {tmp_path}: another quickstart runs here (process " in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_what_others_have_made_is_not_removed(bench: _Bench) -> None:
    bench.output("a").write_text("mine\n")
    with pytest.raises(StepFailed, match=r"a: .*a\.txt is not of this run; move it away, or choose another --output"):
        bench.run(bench.step("a"))
    assert bench.output("a").read_text() == "mine\n"


def test_training_lines_are_shortened_and_others_kept() -> None:
    line = (
        " [2026-11-23 08:33:42.5] iteration       10/      60 | consumed samples:         2291 | "
        "lm loss: 7.293795E+00 | loss scale: 1.0 | tokens/s: 6618 | images/s: 0 |\n"
    )
    assert condense(line) == "step 10 of 60, loss 7.294, 6,618 tokens/s"
    assert condense("prepared it\n") == "prepared it"


def test_steps_run_together_unless_one_needs_the_other_or_trains(bench: _Bench) -> None:
    """Each step notes when it begins and when it ends; none ends before two have begun."""
    notes = bench.folder / "notes"
    code = (
        f"import sys, time; note = lambda what: open({str(notes)!r}, 'a').write(sys.argv[1] + what + ' '); note('+')\n"
        "for _ in range(6000):\n"
        f"    if open({str(notes)!r}).read().count('+') >= 2: break\n"
        "    time.sleep(0.01)\n"
        "note('-')"
    )
    steps = [bench.step(name, code, [name]) for name in "abc"]
    steps.append(bench.step("d", code, ["d", str(bench.output("c"))]))
    bench.run(*steps)
    order = notes.read_text().split()
    assert set(order[:2]) == {"a+", "b+"}
    assert order.index("c-") < order.index("d+")
    bench.said.clear()
    bench.run(bench.step("f"), Step("training", (("torchrun", "--help"),)), bench.step("g"))
    said = [line.partition("] ")[2].partition(" in ")[0] for line in bench.said if line.startswith("[")]
    assert said == ["f", "f: finished", "training", "training: finished", "g", "g: finished"]


@pytest.fixture(params=["smoke", "quickstart", "learn"], scope="module")
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """The steps that the script lists: a stand-in for the interpreter keeps them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "setup.py", "constraints-cpu.txt"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={programs}:$PATH")
    (programs / "python").write_text(f"#!/bin/sh\ncase $* in *cli.quickstart*) cat > {folder}/steps; esac\n")
    (programs / "python").chmod(0o755)
    options = [] if request.param == "quickstart" else [f"--{request.param}"]
    command = ["bash", str(folder / "examples" / "quickstart.sh"), *options, "--output", str(folder / "a run")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {step.name: step for step in read_steps((folder / "steps").read_text().split("\0"))}


def test_what_a_step_uses_was_made_before(plan: dict[str, Step]) -> None:
    made: set[Path] = set()
    for step in plan.values():
        assert made.isdisjoint(step.outputs)
        made |= set(step.outputs) | {path.with_suffix("") for path in step.outputs if path.suffix == ".json"}
        words = [Path(word) for command in step.commands for word in command if word.startswith("a run/")]
        assert words
        assert not [path for path in words if path not in made]


def test_the_report_describes_the_stages_of_the_plan(plan: dict[str, Step]) -> None:
    for stage in STAGES:
        number = stage.name.removeprefix("stage")
        (output,) = plan[f"stage {number}"].outputs
        assert output == Path("a run", stage.folder)
        assert plan[f"stage {number}"].recipes[0] == Path(stage.recipe)
        blind = plan.get(f"blind stage {number}")
        assert (blind.outputs[0] if blind else None) == (stage.blind_folder and Path("a run", stage.blind_folder))


def test_commands_name_files_of_the_checkout_that_exist(plan: dict[str, Step]) -> None:
    words = [word for step in plan.values() for command in step.commands for word in command]
    named = [word for word in words if word.startswith(("tools/", "examples/"))]
    assert len(named) > 40
    assert not [word for word in named if not (ROOT / word).is_file()]


def test_blind_run_differs_only_by_blank_images(plan: dict[str, Step]) -> None:
    for number in (1, 2):
        full, blind = plan[f"stage {number}"].commands[-1], plan[f"blind stage {number}"].commands[-1]
        assert "--blank-images" in blind
        others = {word.replace("/blind/", "/model/") for word in blind} - set(full)
        assert others <= {"--blank-images", "2"}, "two ranks, with which the other begins"
        assert _value(full, "--train-iters") == _value(blind, "--train-iters")


def test_each_stage_hands_over_at_another_layout_for_its_last_steps(plan: dict[str, Step]) -> None:
    for number in (1, 2, 3):
        first, second = plan[f"stage {number}"].commands
        total = _value(second, "--train-iters")
        assert _value(first, "--lr-decay-iters") == total
        assert _value(first, "--train-iters") < total
        assert not any("parallel-size" in word for word in first)
        assert any("parallel-size" in word for word in second)


def _value(command: tuple[str, ...], flag: str) -> int:
    return int(command[command.index(flag) + 1])


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--help"], 0, "bash examples/quickstart.sh [--smoke | --learn] [--output DIR]"),
        (["--smok"], 2, "error: --smok is not a known option; known are --smoke, --learn, --output DIR and --help"),
        (["--output"], 2, "error: --output needs a folder"),
    ],
)
def test_options_are_read_before_anything_is_installed(options: list[str], status: int, says: str) -> None:
    command = ["bash", str(ROOT / "examples" / "quickstart.sh"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    assert done.returncode == status
    assert says in done.stdout + done.stderr
