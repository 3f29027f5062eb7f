"""The train command without training: dry run, checks, and how errors reach the user."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.cli import command, train
from megatron_vl.cli.train import main
from megatron_vl.config.load import load_config
from megatron_vl.config.presets import PRESETS
from megatron_vl.config.schema import ModelConfig, RunConfig
from megatron_vl.data.dataset.manifest import FORMAT_VERSION, Manifest, write_manifest
from megatron_vl.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[3]


def _write_manifest(path: Path, model: ModelConfig, **fields: Any) -> str:
    """Write the manifest of a data set without files; return its prefix."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "tokenizer_sha256": "", "num_bpe_tokens": model.num_bpe_tokens,
        "num_queries": model.resampler.num_queries, "seq_length": 2048, "max_sample_length": 2048, "packing": "mixed",
        "num_rows": 100, "num_samples": 300, "num_segments": 300, "num_tokens": 200_000, "num_images": 0,
        "num_stored_images": 0, "images_per_row": (100,), "sources": (), "counts": (), "skips": (), "files": (),
        "amounts_factor": 1.0, "scarcest_group": "", "hashes_sha256": "",
    }  # fmt: skip
    write_manifest(path, Manifest(**values | fields))
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return _write_manifest(tmp_path / "rows", PRESETS["tiny"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Configurations that would have been trained."""
    configs: list[RunConfig] = []

    def start(config: RunConfig) -> ExitStatus:
        configs.append(config)
        return ExitStatus.DONE

    monkeypatch.setattr(train, "_start", start)
    return configs


def test_dry_run_prints_a_recipe_and_the_parameters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = "--preset tiny --freeze-vision --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()
    assert main([*argv, "--dry-run", "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(out, encoding="utf-8")
    assert load_config(tmp_path / "printed.yaml") == load_config(None, argv)
    assert "# 8 ranks = tensor 2 x pipeline 2 x data 2; a step = 8 rows = 4 micro-batches x 1 rows x data 2" in out
    ranks = re.findall(r"^# +(\d+) +(\d+) +([\d,]+) +([\d,]+)   (.*)$", out, flags=re.MULTILINE)
    assert [(pipeline, tensor) for pipeline, tensor, *_ in ranks] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert all(frozen == "0" for *_, trained, frozen, units in ranks if "V" not in units)
    assert any(int(frozen.replace(",", "")) > 0 for *_, frozen, _ in ranks)


def test_dry_run_plans_the_7b_model_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "examples" / "qwen_vl" / "stage1_pretrain.yaml")
    assert main([recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "9,655,886,592 parameters" in out
    assert "30,720 samples" in out


def test_recipe_may_stand_anywhere(started: list[RunConfig], data: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: tiny}\ntraining: {seed: 5}\n", encoding="utf-8")
    for argv in (
        [str(recipe), "--data-path", data, "--train-iters", "3"],
        ["--data-path", data, "--train-iters", "3", str(recipe)],
    ):
        assert main(argv) == 0
    assert started[0] == started[1]
    assert (started[0].training.seed, started[0].training.train_iters) == (5, 3)


def test_check_starts_nothing(started: list[RunConfig], data: str) -> None:
    argv = ["--preset", "tiny", "--data-path", data, "--check"]
    assert main(argv) == 0
    assert main([*argv, "--world-size", "3"]) == 2
    assert started == []


STAGE_3 = str(ROOT / "examples" / "qwen_vl" / "stage3_sft.yaml")


def test_check_and_dry_run_count_a_batch_of_samples_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 3's own recipe on 4 x 8 GPUs: 128 samples are 44 rows, which 16 data-parallel ranks do not divide."""
    monkeypatch.setattr(train, "has_cuda_device", lambda: True)
    data = _write_manifest(tmp_path / "rows", PRESETS["qwen_vl_7b"])
    for world_size, said in (
        ("8", "a step of 128 samples = 44 rows of 3.00 samples\n"),
        ("32", "48 rows of 3.00 samples (about 144 samples, +12%; 44 rows would be nearest"),
    ):
        assert main([STAGE_3, "--data-path", data, "--check", "--world-size", world_size]) == 0
        assert main([STAGE_3, "--data-path", data, "--dry-run", "--world-size", world_size]) == 0
        out = capsys.readouterr().out
        assert said in out and f"micro-batches x 1 rows x data {int(world_size) // 2}" in out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_bpe_tokens": 256}, "was prepared for model.num_bpe_tokens = 256, this run has 2048"),
        ({"num_queries": 4}, "was prepared for model.resampler.num_queries = 4, this run has 16"),
        ({"seq_length": 4096}, "has rows of up to 4096 tokens, but data.seq_length is 2048"),
        ({"num_rows": 0}, "holds no rows"),
        ({"format_version": 1}, "format_version is 1, expected"),
    ],
)
@pytest.mark.parametrize("flag", ["--data-path", "--valid-data-path"])
def test_check_refuses_data_of_another_model(
    tmp_path: Path, data: str, fields: dict[str, int], said: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _write_manifest(tmp_path / "other", PRESETS["tiny"], **fields)
    argv = ["--preset", "tiny", "--check", "--eval-interval", "5"]
    paths = {"--data-path": data, "--valid-data-path": data, flag: other}
    assert main([*argv, *(word for pair in paths.items() for word in pair)]) == 2
    assert f"{other}" in (error := capsys.readouterr().err) and said in error
    if flag == "--data-path" and "format_version" not in fields and "num_rows" not in fields:
        assert main(["--preset", "tiny", "--dry-run", flag, other]) == 2


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("--train-itres 5", "--train-iters"),
        ("--preset tiny", "bash examples/quickstart.sh"),
        ("--preset tiny --world-size 2", "--world-size is for --dry-run"),
        ("--preset tiny --build", "--build is for --dry-run"),
        ("a.yaml b.yaml", "one recipe, found a.yaml, b.yaml"),
        ("nowhere.yaml", "nowhere.yaml"),
        ("--preset tiny --dry-run --pipeline-model-parallel-size 9", "9 stages"),
        ("--preset tiny --dry-run --world-size 3 --tensor-model-parallel-size 2", "3 ranks"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    argv: str, part: str, started: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv.split()) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ") and part in found.err and "Traceback" not in found.err
    assert not found.out and started == []


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_checkpoint_that_is_not_there_is_refused_before_anything_starts(
    flag: str, data: str, started: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    for check in (["--check"], []):
        assert main(["--preset", "tiny", "--data-path", data, flag, "nowhere", *check]) == 2
        assert "error: nowhere does not exist" in capsys.readouterr().err and not started


def test_7b_without_cuda_is_refused(
    tmp_path: Path, started: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _write_manifest(tmp_path / "rows", PRESETS["qwen_vl_7b"])
    argv = [str(ROOT / "examples" / "qwen_vl" / "stage1_pretrain.yaml"), "--data-path", data]
    monkeypatch.setattr(train, "has_cuda_device", lambda: False)
    assert main(argv) == 2
    assert "9,655,886,592 parameters and no CUDA" in (error := capsys.readouterr().err)
    assert "examples/quickstart.sh" in error and started == []
    monkeypatch.setattr(train, "has_cuda_device", lambda: True)
    assert main(argv) == 0 and len(started) == 1


def test_other_ranks_wait_for_rank_0_to_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(command.time, "sleep", waits.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local in (("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert main(["--preset", "none"]) == 2
        assert f"error on rank {rank}: model.preset" in capsys.readouterr().err
    assert 0 < waits[0] < waits[1]


@pytest.mark.parametrize(
    "argv",
    [
        "--help",
        "--preset tiny --dry-run",
        "--preset tiny --dry-run --data-path DATA",
        "--preset tiny --dry-run --data-path nowhere",
        "--preset tiny --check",
        "--preset tiny --check --data-path DATA --load nowhere",
    ],
)
def test_nothing_heavy_is_imported(argv: str, data: str) -> None:
    code = (
        "import sys; sys.argv[1:] = sys.argv[2:]\n"
        "from megatron_vl.cli.train import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'transformers', 'PIL', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, "-", *argv.replace("DATA", data).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_is_grouped_and_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "checkpoint: Where checkpoints go to and come from. --save" in text
    assert "--train-iters N Steps of the whole run. (default: 1000)" in text


@pytest.mark.parametrize("flags", [[], ["--deterministic-mode"]])
def test_a_deterministic_run_says_so_before_torch_is_imported(data: str, flags: list[str]) -> None:
    """Where cuBLAS and Transformer Engine read it; the run ends at the import of torch."""
    code = (
        "import os, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit('CUBLAS_WORKSPACE_CONFIG' in os.environ)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from megatron_vl.cli import train\n"
        "train._refuse_early = lambda *_: None\n"
        f"train.main(['--preset', 'tiny', '--data-path', {data!r}, *{flags!r}])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert ended.returncode == len(flags)
