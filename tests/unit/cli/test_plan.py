"""The plan command: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest

from megatron_vl.cli.plan import main
from megatron_vl.cli.train import main as train
from megatron_vl.config.load import load_config
from megatron_vl.planning.stage_profile import MicroBatchTimes, StageProfile
from megatron_vl.planning.summary import reasons

ROOT = Path(__file__).resolve().parents[3]
STAGE_2 = str(ROOT / "examples" / "qwen_vl" / "stage2_multitask.yaml")
MACHINE = ["--gpus", "16", "--gpu", "h100", "--samples-per-row", "5.5", "--images-per-row", "5"]


def test_what_is_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe, picture, numbers = tmp_path / "planned.yaml", tmp_path / "schedule.svg", tmp_path / "plans.json"
    files = ["--write", str(recipe), "--timeline", str(picture), "--json", str(numbers)]
    assert main([STAGE_2, *MACHINE, "--plan", "2", *files, "--lr", "1e-5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("model: qwen_vl_7b, 9,655,886,592 parameters; trains vision tower, resampler, language model")
    assert "19,000 steps of 768 rows (the recipe: 4,096 samples)" in out and "(given)" in out
    assert "nothing was calibrated (--measured)" in out and "not published: attention reaches 450 TFLOP/s" in out
    assert "rejected: tensor 1, pipeline 1, no full recomputation: " in out
    record = json.loads(numbers.read_text(encoding="utf-8"))
    assert len(record["plans"]) == 5 and record["rejected"]
    second = record["plans"][1]
    fullest = max(rank["total"] for rank in second["memory_bytes"])
    assert f"{fullest / 1e9:.1f} GB of 80 GB x 0.92" in out
    config = load_config(recipe)
    assert asdict(config.parallel) == second["parallel"]
    assert config.training.micro_batch_size == second["micro_batch_size"]
    assert (config.training.global_batch_samples, config.optimizer.lr) == (4096, 1e-5)
    assert picture.read_text(encoding="utf-8").startswith("<svg ")
    assert train([str(recipe), "--dry-run", "--world-size", "16", "--gpu", "h100"]) == 0
    assert "# pipeline rank 0: " in capsys.readouterr().out


def test_measured_rates_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rates = str(ROOT / "docs" / "results" / "h200_rates.json")
    machine = [
        "--gpus",
        "8",
        "--gpu",
        "h200",
        "--tensor-model-parallel-size",
        "1",
        "--pipeline-model-parallel-size",
        "1",
    ]
    assert main([STAGE_2, *machine, "--measured", rates]) == 0
    out = capsys.readouterr().out
    assert "Measured: matmul_tflops, attention_tflops, memory_gb_per_s" in out and "726 TFLOP/s" in out
    assert "images fill half of a row, one image a sample (4 of each)" in out


def test_in_fp8_it_says_what_is_not_calculated(capsys: pytest.CaptureFixture[str]) -> None:
    machine = [
        "--gpus",
        "8",
        "--gpu",
        "h200",
        "--tensor-model-parallel-size",
        "1",
        "--pipeline-model-parallel-size",
        "1",
    ]
    assert main([STAGE_2, *machine]) == 0
    assert "fp8" not in capsys.readouterr().out
    assert main([STAGE_2, *machine, "--fp8-format", "hybrid"]) == 0
    assert "training.fp8_format: memory counts the FP8 copies of weights" in capsys.readouterr().out


def test_a_profile_is_of_the_planned_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def plan(device: str) -> int:
        row = MicroBatchTimes(11, 0, 5, 2000, 1e6, 1000, (0.5,), (1.5,))
        config = load_config(Path(STAGE_2), ["--tensor-model-parallel-size", "1", "--image-size", "224"])
        profile = StageProfile(device, 8, (), config, (row,))
        path = tmp_path / "times.json"
        path.write_text(json.dumps({"stage_times": asdict(profile)}), encoding="utf-8")
        layout = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        return main([STAGE_2, "--gpus", "8", "--gpu", "h200", *layout, "--measured", str(path)])

    assert plan("NVIDIA H200") == 0
    out = capsys.readouterr().out
    assert out.startswith("profile: steps 11 to 11 on 8 x NVIDIA H200, 1 micro-batches") and "with these factors" in out
    assert "another model than the plan: image_size 224 (the plan: 448)\n" in out
    assert plan("CPU") == 2
    caught = capsys.readouterr()
    assert "a profile of a CPU says nothing about --gpu h200" in caught.err and caught.out == ""


def test_plans_of_equal_time_are_as_fast() -> None:
    def plan(seconds: float) -> Mock:
        losses = ("bubble", "exposed_tensor", "exposed_data", "launches", "vision_launches", "optimizer", "exposed")
        return Mock(seconds_per_row=seconds, time=Mock(seconds=1.0, **dict.fromkeys(losses, 0.0)))

    plans = [plan(1.0), plan(0.999), plan(1.004), plan(1.04)]
    for number, one in enumerate(plans):
        one.candidate.fullest.total = number
    assert [reasons(one, plans)[-1] for one in plans[1:]] == [
        "as fast as plan 1",
        "as fast as plan 1",
        "4% slower than plan 1",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--vision-parallel data", "no language layer is computed twice"),
        ("--vision-parallel data --no-vision-recompute", "no layer is computed twice"),
        ("--vision-parallel data --freeze-vision", "no layer is computed twice"),
        ("--vision-parallel pipeline", "no layer is computed twice"),
    ],
)
def test_what_is_computed_twice_is_named(flags: str, said: str) -> None:
    losses = ("bubble", "exposed_tensor", "exposed_data", "launches", "vision_launches", "optimizer", "exposed")
    plans = [Mock(seconds_per_row=1.0, time=Mock(seconds=1.0, **dict.fromkeys(losses, 0.0))) for _ in range(2)]
    for number, plan in enumerate(plans):
        plan.candidate.fullest.total = number
        plan.candidate.config = load_config(Path(STAGE_2), flags.split())
        plan.candidate.family.recomputes_all = number == 0
    assert said in reasons(plans[1], plans) and len(reasons(plans[0], plans)) == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (f"{STAGE_2} --gpus 8", "--gpus N and --gpu NAME say for which machine"),
        (f"{STAGE_2} --gpus 8 --gpu v100", "--gpu v100 is not known"),
        (f"{STAGE_2} --gpus 0 --gpu h100", "--gpus 0: expected at least 1"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --no-bf16", "training.bf16 is false"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --usable-memory 92", "--usable-memory 92: expected a share above 0, up to 1"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --usable-memory 0", "--usable-memory 0: expected a share above 0, up to 1"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --write {STAGE_2}", "is the recipe itself, and its comments would be lost"),
        (f"{STAGE_2} --gpus 1 --gpu h100", "nothing fits 1 x h100"),
        (f"{STAGE_2} --gpus 8 --gpu h200 --plan 9", "--plan 9: there are"),
        (f"{STAGE_2} --gpus 8 --gpu h200 --micro-batch-sise 2", "Did you mean --micro-batch-size"),
        ("--gpus 8 --gpu h200", "expected one recipe"),
        (
            f"{STAGE_2} --gpus 8 --gpu a100 --fp8-format hybrid",
            "fp8_recipe tensorwise is not for --gpu a100: it has no",
        ),
        (f"{STAGE_2} --gpus 8 --gpu h100 --fp8-format e4m3 --fp8-recipe mxfp8", "it computes tensorwise, delayed"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --micro-batch-size 0", "micro_batch_size"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --tensor-model-parallel-size 0", "tensor_model_parallel_size"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --images-per-row nan", "expected numbers"),
        (f"{STAGE_2} --gpus 8 --gpu h100 --write /proc/x/y.yaml", "--write /proc/x/y.yaml"),
    ],
)
def test_what_is_refused(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    assert said in capsys.readouterr().err


def test_no_file_that_is_read_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, rates = tmp_path / "recipe.yaml", tmp_path / "rates.json"
    text = "# kept\n" + Path(STAGE_2).read_text(encoding="utf-8")
    recipe.write_text(text, encoding="utf-8")
    rates.write_text("{}", encoding="utf-8")
    (tmp_path / "link.yaml").symlink_to(recipe)
    (tmp_path / "hard.yaml").hardlink_to(recipe)
    for name in ("recipe.yaml", "link.yaml", "hard.yaml"):
        assert main([str(recipe), *MACHINE, "--write", str(tmp_path / name)]) == 2
        assert "is the recipe itself, and its comments would be lost; give a new file" in capsys.readouterr().err
    assert main([str(recipe), *MACHINE, "--measured", str(rates), "--json", str(rates)]) == 2
    assert "is the file of --measured" in capsys.readouterr().err
    both = ["--timeline", str(tmp_path / "x"), "--json", str(tmp_path / ".." / tmp_path.name / "x")]
    assert main([str(recipe), *MACHINE, *both]) == 2
    assert "is the file of --timeline as well" in capsys.readouterr().err
    assert recipe.read_text(encoding="utf-8") == text and rates.read_text(encoding="utf-8") == "{}"


def test_a_dry_run_counts_the_micro_batches_of_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One micro-batch on each rank, whose images all ranks keep: more would need more memory."""
    recipe = tmp_path / "planned.yaml"
    flags = (
        "--gpus 64 --gpu h100 --vision-parallel data --no-vision-recompute --pipeline-model-parallel-size 2 "
        "--tensor-model-parallel-size 1 --global-batch-samples 128 --recompute-granularity none"
    )
    assert main([STAGE_2, *flags.split(), "--write", str(recipe)]) == 0
    told = capsys.readouterr().out
    size = told.split("memory of the fullest rank (")[1].split("): ")[1].split(" GB")[0]
    assert train([str(recipe), "--dry-run", "--world-size", "64", "--gpu", "h100"]) == 0
    assert f": {size} GB" in capsys.readouterr().out
    assert train([str(recipe), "--dry-run", "--world-size", "0"]) == 2


def test_a_dry_run_refuses_what_a_gpu_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    dry = [STAGE_2, "--dry-run", "--world-size", "2"]
    assert train([*dry, "--gpu", "a100"]) == 2
    caught = capsys.readouterr()
    assert "--gpu a100 has 80 GB, of which a run may use 92%" in caught.err and "tools/plan.py" in caught.err
    assert "# pipeline rank 0: " in caught.out and "weights 9.75, gradients 19.50, masters 19.50" in caught.out
    assert train([*dry, "--gpu", "h200"]) == 0
    assert train([STAGE_2, "--gpu", "h200"]) == 2
    assert "--gpu is for --dry-run" in capsys.readouterr().err
