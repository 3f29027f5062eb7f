"""The plan of the quickstart: every step with its commands, in groups whose steps may run side by side.

    raw data -> packed data sets, questions -> pages of the training data
             -> stage 0 -> stages 1, 2, 3 -> blind stages 1, 2
             -> held-out losses, answers, Hugging Face folders

A stage trains at two data-parallel ranks, the fastest layout on two cores. For its last steps it continues from a
checkpoint at another layout. The first command's ``--train-iters`` is the step of that change. ``--lr-decay-iters``
keeps the learning rate of the whole stage. So each command, started again, resumes or has nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vl.cli.quickstart.profiles import Profile
from megatron_vl.cli.quickstart.runner import Step
from megatron_vl.report.records import Model, StageInfo
from megatron_vl.report.requirements import LOSS_TASKS

RECIPES = Path("examples/tiny")
PRESET = "tiny"
FAST_RANKS = 2
INSPECTED_ROWS = 30
ANSWER_TOKENS = 96
"""Enough for the longest answer, a page of two lines with their corners."""
Command = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One training stage of the plan."""

    number: int
    recipe: str
    title: str
    trains: str
    second_ranks: int = 0
    """Number of ranks of the second layout; 0 for none."""
    second_layout: Command = ()

    @property
    def name(self) -> str:
        """stage0 .. stage3."""
        return f"stage{self.number}"

    @property
    def recipe_path(self) -> Path:
        """The recipe, relative to the checkout."""
        return RECIPES / f"{self.recipe}.yaml"


_TENSOR, _PIPELINE = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
_VIRTUAL = "--virtual-pipeline-model-parallel-size"
STAGES = (
    Stage(0, "stage0_text", "Stage 0: text alone", "the language model"),
    Stage(
        1,
        "stage1_pretrain",
        "Stage 1: pre-training",
        "vision tower and resampler",
        second_ranks=4,
        second_layout=(_TENSOR, "2", _PIPELINE, "2"),
    ),
    Stage(
        2,
        "stage2_multitask",
        "Stage 2: multi-task pre-training",
        "everything",
        second_ranks=4,
        second_layout=(_PIPELINE, "2"),
    ),
    Stage(
        3,
        "stage3_sft",
        "Stage 3: supervised fine-tuning",
        "language model and resampler",
        second_ranks=2,
        second_layout=(_PIPELINE, "2", _VIRTUAL, "2"),
    ),
)
BLIND_STAGES = (STAGES[1], STAGES[2])


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint whose held-out loss is measured, and the tasks."""

    model: Model
    stage: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its result, eval/losses/NAME.json."""
        return f"{self.model}_{self.stage}"


EVALUATIONS = (
    Evaluation("model", "stage1", ("caption",)),
    Evaluation("blind", "stage1", ("caption",)),
    Evaluation("model", "stage2", (*LOSS_TASKS, "chat")),
    Evaluation("blind", "stage2", LOSS_TASKS),
    Evaluation("model", "stage3", ("chat",)),
)
EXPORTED_STAGES = (STAGES[0], STAGES[1], STAGES[3])
"""Stages 0 and 1 to compare their language models; stage 3 is the result."""


@dataclass(frozen=True)
class Plan:
    """Builds the steps of one run directory at one profile."""

    profile: Profile
    run_dir: Path
    root: Path

    def groups(self) -> list[list[Step]]:
        """Return all steps; a group may begin when the previous one has ended."""
        training = [[self._train("model", stage)] for stage in STAGES]
        control = [[self._train("blind", stage)] for stage in BLIND_STAGES]
        answers = [self._answer("model"), self._answer("blind"), self._reply()]
        losses = [self._losses(evaluation) for evaluation in EVALUATIONS]
        exports = [self._export(stage) for stage in EXPORTED_STAGES]
        return [[self._raw()], self._data(), [self._inspect()], *training, *control, [*answers, *losses, *exports]]

    def stage_infos(self) -> tuple[StageInfo, ...]:
        """Return the description of the stages for the report."""
        return tuple(
            StageInfo(
                name=stage.name,
                title=stage.title,
                trains=stage.trains,
                starts_from="random weights" if stage.number == 0 else f"stage {stage.number - 1}",
                folder=f"model/{stage.name}",
                recipe=str(stage.recipe_path),
                blind_folder=f"blind/{stage.name}" if stage in BLIND_STAGES else None,
            )
            for stage in STAGES
        )

    def checkpoints(self, model: Model, stage: Stage) -> Path:
        """Return the directory where a stage saves; stage 0 is common to both models."""
        return self.run_dir / ("model" if stage.number == 0 else model) / stage.name

    def losses_path(self, evaluation: Evaluation) -> Path:
        """Return the file of the held-out losses of a checkpoint."""
        return self.run_dir / "eval" / "losses" / f"{evaluation.name}.json"

    def heldout_prefix(self, task: str) -> Path:
        """Return the packed held-out data set of a task."""
        return self.run_dir / "data" / f"heldout_{task}"

    def exported(self, stage: Stage) -> Path:
        """Return the Hugging Face folder of a stage."""
        return self.run_dir / "hf" / stage.name

    def _raw(self) -> Step:
        raw = self.run_dir / "raw"

        def make(split: str, seed: int, scenes: int) -> Command:
            return (
                *("python", "tools/make_synthetic_data.py", str(raw / split), "--split", split),
                *("--seed", str(seed), "--num-scenes", str(scenes), "--num-workers", "2", "--no-progress"),
            )

        commands = (
            make("train", 1, self.profile.train_scenes),
            make("heldout", 2, self.profile.heldout_scenes),
        )
        return Step("raw data", commands, outputs=(raw / "train", raw / "heldout"))

    def _data(self) -> list[Step]:
        heldout = (*LOSS_TASKS, "chat")
        return [
            self._prepare("training data", "train", tuple(stage.recipe for stage in STAGES)),
            self._prepare("held-out data", "heldout", tuple(f"heldout_{task}" for task in heldout)),
            self._ask("held-out questions", "heldout", "questions"),
            self._ask("held-out dialogues", "heldout_chat", "dialogues"),
        ]

    def _ask(self, name: str, recipe: str, output: str) -> Step:
        path, questions = RECIPES / "data" / f"{recipe}.yaml", self.run_dir / "eval" / f"{output}.jsonl"
        command: Command = (
            *("python", "tools/make_questions.py", str(path)),
            *("--model-preset", PRESET, "--root", str(self.run_dir / "raw" / "heldout")),
            *("--output", str(questions), "--limit", str(self.profile.questions)),
        )
        return Step(name, (command,), outputs=(questions,), reads=(self.root / path,), after=("raw data",))

    def _prepare(self, name: str, split: str, recipes: tuple[str, ...]) -> Step:
        def prepare(recipe: str) -> Command:
            return (
                *("python", "tools/prepare_data.py", str(RECIPES / "data" / f"{recipe}.yaml")),
                *("--model-preset", PRESET, "--root", str(self.run_dir / "raw" / split)),
                *("--output", str(self.run_dir / "data" / recipe), "--quiet"),
            )

        return Step(
            name,
            tuple(prepare(recipe) for recipe in recipes),
            outputs=tuple(self.run_dir / "data" / f"{recipe}.json" for recipe in recipes),
            reads=tuple(self.root / RECIPES / "data" / f"{recipe}.yaml" for recipe in recipes),
            after=("raw data",),
        )

    def _inspect(self) -> Step:
        prefixes = [self.run_dir / "data" / stage.recipe for stage in STAGES]
        return Step(
            "pages of the training data",
            tuple(
                ("python", "tools/inspect_data.py", str(prefix), "--rows", str(INSPECTED_ROWS), "--seed", "0")
                for prefix in prefixes
            ),
            outputs=tuple(Path(f"{prefix}.html") for prefix in prefixes),
            after=("training data",),
        )

    def _train(self, model: Model, stage: Stage) -> Step:
        steps = self.profile.stage_steps[stage.number]
        turn = steps - self.profile.hand_over
        if model == "blind" or not stage.second_ranks:
            commands: tuple[Command, ...] = (self._torchrun(model, stage, FAST_RANKS, steps),)
        else:
            first = (*self._torchrun(model, stage, FAST_RANKS, turn), "--lr-decay-iters", str(steps))
            second = (*self._torchrun(model, stage, stage.second_ranks, steps), *stage.second_layout)
            commands = (first, second)
        before = "training data" if stage.number == 0 else _step_name(model, STAGES[stage.number - 1])
        return Step(
            _step_name(model, stage),
            commands,
            outputs=(self.checkpoints(model, stage),),
            reads=(self.root / stage.recipe_path,),
            after=("training data", before),
            resumes=True,
        )

    def _torchrun(self, model: Model, stage: Stage, ranks: int, train_iters: int) -> Command:
        command: Command = (
            *("torchrun", "--standalone", "--nproc-per-node", str(ranks), "tools/train.py"),
            *(str(stage.recipe_path), "--data-path", str(self.run_dir / "data" / stage.recipe)),
            *("--save", str(self.checkpoints(model, stage)), "--auto-resume"),
            *("--save-interval", str(self.profile.save_interval), "--keep-last", "2"),
            *("--train-iters", str(train_iters)),
        )
        if stage.number:
            before = self.checkpoints(model, STAGES[stage.number - 1])
            command = (*command, "--pretrained-checkpoint", str(before))
        return (*command, "--blank-images") if model == "blind" else command

    def _answer(self, model: Model) -> Step:
        output = self.run_dir / "eval" / f"predictions_{model}.jsonl"
        command: Command = (
            *("python", "tools/generate.py", "--checkpoint", str(self.checkpoints(model, STAGES[2]))),
            *("--inputs", str(self.run_dir / "eval" / "questions.jsonl"), "--output", str(output)),
            *("--max-new-tokens", str(ANSWER_TOKENS)),
        )
        return Step(
            f"answers, {model}",
            ((*command, "--blank-images") if model == "blind" else command,),
            outputs=(output,),
            after=("held-out questions", _step_name(model, STAGES[2])),
        )

    def _reply(self) -> Step:
        output = self.run_dir / "eval" / "replies.jsonl"
        command: Command = (
            *("python", "tools/generate.py", "--checkpoint", str(self.checkpoints("model", STAGES[3]))),
            *("--inputs", str(self.run_dir / "eval" / "dialogues.jsonl"), "--output", str(output)),
            *("--chat-format", "chatml"),
        )
        after = ("held-out dialogues", _step_name("model", STAGES[3]))
        return Step("replies", (command,), outputs=(output,), after=after)

    def _losses(self, evaluation: Evaluation) -> Step:
        stage = next(stage for stage in STAGES if stage.name == evaluation.stage)
        output = self.losses_path(evaluation)
        prefixes = [str(self.heldout_prefix(task)) for task in evaluation.tasks]
        command: Command = (
            *("python", "tools/evaluate_loss.py"),
            *("--checkpoint", str(self.checkpoints(evaluation.model, stage))),
            *("--data-path", *prefixes, "--output", str(output)),
        )
        return Step(
            f"held-out losses, {_step_name(evaluation.model, stage)}",
            ((*command, "--blank-images") if evaluation.model == "blind" else command,),
            outputs=(output,),
            after=("held-out data", _step_name(evaluation.model, stage)),
        )

    def _export(self, stage: Stage) -> Step:
        release = ("--release", "chat", "--vocab-file") if stage.number == 3 else ()
        command: Command = (
            *("python", "tools/convert_checkpoint.py", "export"),
            *(str(self.checkpoints("model", stage)), str(self.exported(stage)), *release),
        )
        return Step(
            f"Hugging Face folder, {_step_name('model', stage)}",
            (command,),
            outputs=(self.exported(stage),),
            after=(_step_name("model", stage),),
        )


def _step_name(model: Model, stage: Stage) -> str:
    return f"stage {stage.number}" if model == "model" or stage.number == 0 else f"blind stage {stage.number}"
