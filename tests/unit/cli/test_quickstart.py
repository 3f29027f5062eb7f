"""The quickstart's runner (what is done again, what is not, what is counted) and its plan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.cli.quickstart.ledger import Ledger, StepState
from megatron_vl.cli.quickstart.plan import STAGES, Plan
from megatron_vl.cli.quickstart.profiles import PROFILES
from megatron_vl.cli.quickstart.runner import Runner, Step, StepFailed, condense

ROOT = Path(__file__).resolve().parents[3]


class _Bench:
    """A run directory whose steps append a line to a file each time they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder / "run")
        self.ledger.run_dir.mkdir()
        self.said: list[str] = []

    def step(self, name: str, code: str = "", **fields: object) -> Step:
        """A step that adds a line to its output and then runs ``code``."""
        output = self.folder / f"{name}.txt"
        script = f"open({str(output)!r}, 'a').write('ran\\n'); {code}"
        step = Step(name, (("python", "-c", script),), outputs=(output,))
        return replace(step, **fields)

    def run(self, *steps: Step) -> None:
        """Run each step as a group, in a new runner."""
        runner = Runner(self.ledger, self.folder, self.said.append)
        for step in steps:
            runner.run_group([step])

    def lines(self, name: str) -> int:
        """How often a step ran since its output was last removed."""
        return len((self.folder / f"{name}.txt").read_text().splitlines())

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


def test_changed_commands_files_or_predecessors_start_a_step_over(bench: _Bench) -> None:
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text("x: 1")
    first, second = bench.step("a", reads=(recipe,)), bench.step("b", after=("a",))
    bench.run(first, second)
    bench.run(bench.step("a", reads=(recipe,)), second)
    assert (bench.lines("a"), bench.lines("b")) == (1, 1)
    bench.ran("a")
    recipe.write_text("x: 2")
    bench.run(first, second)
    assert "a: finished" in str(bench.said)
    assert bench.ran("b")
    assert (bench.lines("a"), bench.lines("b")) == (1, 1)
    assert [timing.step for timing in bench.ledger.times()] == ["a", "b"]


def test_a_removed_output_is_made_again(bench: _Bench) -> None:
    bench.run(bench.step("a"))
    (bench.folder / "a.txt").unlink()
    bench.run(bench.step("a"))
    assert bench.lines("a") == 1


@pytest.mark.parametrize(("resumes", "lines"), [(False, 1), (True, 2)])
def test_after_a_failure_outputs_are_removed_or_gone_on_with(bench: _Bench, resumes: bool, lines: int) -> None:
    code = f"import os; os.path.exists({str(bench.folder / 'go')!r}) or exit('error: no go')"
    step = bench.step("a", code, resumes=resumes)
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
        Runner(bench.ledger, bench.folder, bench.said.append).run_group(steps)
    # Two run at a time. The worker that ran the failed step may take one more before the runner hears of the failure.
    assert 2 <= len(bench.ledger.times()) <= 3
    Runner(bench.ledger, bench.folder, bench.said.append).run_group(steps[1:])
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


def test_a_terminated_quickstart_stops_its_command_and_counts_the_time(tmp_path: Path) -> None:
    script = tmp_path / "drive.py"
    script.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_vl.cli.quickstart.ledger import Ledger\n"
        "from megatron_vl.cli.quickstart.main import leave_on_terminate\n"
        "from megatron_vl.cli.quickstart.runner import Runner, Step\n"
        "leave_on_terminate()\n"
        "step = Step('sleep', (('python', '-c', 'import time; print(\"up\", flush=True); time.sleep(60)'),))\n"
        "Runner(Ledger(Path(sys.argv[1])), Path(sys.argv[1]), lambda line: print(line, flush=True)).run_group([step])\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "up":
            break
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    (timing,) = Ledger(tmp_path).times()
    assert not timing.finished


def test_training_lines_are_shortened_and_others_kept() -> None:
    line = (
        " [2026-11-23 08:33:42.5] iteration       10/      60 | consumed samples:         2291 | "
        "lm loss: 7.293795E+00 | loss scale: 1.0 | tokens/s: 6618 | images/s: 0 |\n"
    )
    assert condense(line) == "step 10 of 60, loss 7.294, 6,618 tokens/s"
    assert condense("prepared it\n") == "prepared it"


@pytest.fixture(params=sorted(PROFILES))
def plan(request: pytest.FixtureRequest) -> Plan:
    return Plan(PROFILES[request.param], Path("runs/x"), ROOT)


def test_every_step_comes_after_what_it_uses(plan: Plan) -> None:
    done: set[str] = set()
    for group in plan.groups():
        assert all(name in done for step in group for name in step.after)
        done |= {step.name for step in group}
    outputs = [path for group in plan.groups() for step in group for path in step.outputs]
    assert len(outputs) == len(set(outputs))


def test_commands_name_files_of_the_checkout_that_exist(plan: Plan) -> None:
    commands = [command for group in plan.groups() for step in group for command in step.commands]
    named = [word for command in commands for word in command if word.startswith(("tools/", "examples/"))]
    assert len(named) > 40
    assert not [word for word in named if not (ROOT / word).is_file()]


def test_blind_run_differs_only_by_blank_images(plan: Plan) -> None:
    steps = {step.name: step for group in plan.groups() for step in group}
    for number in (1, 2):
        full, blind = steps[f"stage {number}"].commands, steps[f"blind stage {number}"].commands
        whole = [word.replace("blind/", "model/") for word in blind[-1] if word != "--blank-images"]
        assert "--blank-images" in blind[-1]
        assert list(full[-1][4 : -len(STAGES[number].second_layout)]) == whole[4:]


def test_each_stage_hands_over_at_another_layout_for_its_last_steps(plan: Plan) -> None:
    steps = {step.name: step for group in plan.groups() for step in group}
    for number in (1, 2, 3):
        first, second = steps[f"stage {number}"].commands
        total = plan.profile.stage_steps[number]
        assert _value(first, "--train-iters") == total - plan.profile.hand_over
        assert _value(first, "--lr-decay-iters") == _value(second, "--train-iters") == total
        assert second[-len(STAGES[number].second_layout) :] == STAGES[number].second_layout
    if plan.profile.name != "smoke":
        assert plan.profile.hand_over >= 30


def _value(command: tuple[str, ...], flag: str) -> int:
    return int(command[command.index(flag) + 1])
