"""``benchmarks/gpu.py`` without a GPU: its parts at small sizes, and what it does with parts that fail or hang."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.backends import presence
from megatron_vl.config.validate import validate
from megatron_vl.planning.flops import Work

ROOT = Path(__file__).parents[2]
KEYS = {"name", "ours", "reference", "ratio", "goal", "met"}
FAKE = """
import json, pathlib, sys, time
rows = pathlib.Path(sys.argv[sys.argv.index("--rows") + 1])
rows.write_text(json.dumps([dict(name="first", ours=1.0, reference=2.0, ratio=0.5, goal=1.0, met=True)]))
print("so far so good", flush=True)
{ending}
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module


def test_parts_run_at_small_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--small", "--json", str(tmp_path / "rows.json")]
    command += ["--parts", "machine", "stage2", "--log", str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packages: torch" in done.stdout and "2 of 2 parts ended well" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(set(row) == KEYS for row in rows)
    found = {row["name"].removeprefix("stage2, local, 3 + 3 layers, micro-batch ") for row in rows}
    each = {f"{size}: {name}" for size in (1, 2, 4) for name in ("useful tokens/s", "images/s", "TFLOP/s")}
    wanted = each | {"4: vision, TFLOP/s", "4: language_model, ms a micro-batch", "4: head, TFLOP/s"}
    assert wanted <= found
    # 4,096 samples among 8 ranks, 5 in a row.
    told = [re.search(r"(\d): MFU of a step of (\d+) micro-batches", name) for name in sorted(found)]
    assert [match.groups() for match in told if match] == [("1", "102"), ("2", "51"), ("4", "26")]
    kernels = {row["name"]: row["ours"] for row in rows if "kernels of matmul" in row["name"]}
    assert len(kernels) == 1 and min(kernels.values()) > 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be FP8")
def test_fp8_is_left_out_where_there_is_none(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "hide_unusable_packages", lambda: None)  # it is for a process of its own
    report = module("gpu_parts.report").Report(tmp_path / "rows.json")
    module("gpu_parts.part").run_part("stage2-fp8", report, small=True)
    assert "left out: parallel.backend: transformer_engine" in capsys.readouterr().out


def test_in_fp8_the_language_model_is(module: Any) -> None:
    training = module("gpu_parts.training")
    config = training.stage_config(training.STAGES["stage2"], training.Sizes.of(small=False, backend="auto", fp8=True))
    assert (config.training.fp8_format, config.training.fp8_parts) == ("hybrid", "language")
    validate(config, world_size=1, cuda=True)


def test_every_part_has_something_that_runs_it(module: Any) -> None:
    gpu, training = module("gpu"), module("gpu_parts.training")
    part = module("gpu_parts.part")
    source = Path(part.__file__).read_text()
    for name in (each.name for each in gpu.PARTS):
        assert f'"{name}":' in source or name.partition("-")[0] in training.STAGES, name
    assert sum(each.limit for each in gpu.PARTS if each.name in ("machine", "runs", "stage1", "stage2")) < 360


@pytest.mark.parametrize(
    ("ending", "seconds", "failure"),
    [("raise SystemExit(3)", 30.0, "exit status 3"), ("time.sleep(60)", 3.0, "longer than 3 s"), ("", 30.0, "")],
)
def test_a_part_that_fails_or_hangs_keeps_its_rows(module: Any, ending: str, seconds: float, failure: str) -> None:
    gpu = module("gpu")
    command = [sys.executable, "-c", FAKE.format(ending=ending)]
    with gpu.started(gpu.PARTS[0], small=True, command=command) as running:
        outcome = running.wait(time.monotonic() + seconds)
    assert failure in outcome.failure and bool(failure) == bool(outcome.failure)
    assert [row.name for row in outcome.rows] == ["first"] and "so far so good" in outcome.output
    assert gpu._row_of(outcome).met is not bool(failure)
    assert ("failed: machine" in gpu.summary([outcome], outcome.rows)) == bool(failure)


def test_a_part_without_time_is_named(module: Any) -> None:
    gpu = module("gpu")
    with gpu.started(gpu.PARTS[0], small=True) as running:
        outcome = running.wait(time.monotonic() + 1.0)
    assert outcome.failure == "no time was left for it" and not outcome.rows


def test_stages_are_compared_with_text_alone(module: Any) -> None:
    gpu, measure = module("gpu"), module("measure")

    def outcome(name: str, utilization: float) -> Any:
        row = measure.Row(f"{name}: MFU (data sheet)", utilization, 0.48, 1.0, 1.0, True)
        return gpu.Outcome(gpu.Part(name, 1.0, ""), [row], 1.0)

    rows = gpu.compared([outcome("text", 0.5), outcome("stage2", 0.49), outcome("stage3", 0.4)])
    assert [(row.name, row.met) for row in rows] == [
        ("stage2: MFU beside text alone", True),
        ("stage3: MFU beside text alone", False),
    ]
    assert gpu.compared([outcome("stage2", 0.49)]) == []


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_kernel0_0", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norm"),
        ("void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<...>", "norm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>", "copies"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "cross-entropy"),
        ("aten::addmm", "matmul"),
        ("aten::mm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("Optimizer.step#Something", "other"),
    ],
)
def test_kernels_have_a_class(module: Any, kernel: str, name: str) -> None:
    assert module("gpu_parts.kernels").class_of(kernel) == name


def test_a_profile_adds_up(module: Any) -> None:
    profile = module("gpu_parts.kernels").summarize([("aten::mm", 3.0), ("aten::add", 1.0), ("nothing", 0.0)])
    assert profile.by_class["matmul"] == 3.0 and profile.total == 4.0 and profile.longest[0] == ("aten::mm", 3.0)


def test_the_rows_are_those_of_the_recipes(module: Any) -> None:
    training, rows = module("gpu_parts.training"), module("gpu_parts.rows")
    sizes = training.Sizes(micro_batches=1, steps=1, small=False, backend="local")
    stage1, stage2, stage3, text = (training.stage_config(stage, sizes) for stage in training.STAGES.values())
    assert (stage1.model.image_size, stage1.data.attention_span, stage1.training.freeze_language_model) == (
        224, "segment", True,
    )  # fmt: skip
    assert (stage2.model.image_size, stage2.parallel.tensor_model_parallel_size, stage2.training.bf16) == (448, 1, True)
    assert stage3.training.freeze_vision and not stage3.training.freeze_resampler
    assert (text.model.vision.num_layers, text.model.language.num_layers) == (1, 32)
    works = {}
    for name, config in zip(training.STAGES, (stage1, stage2, stage3, text), strict=True):
        batches = rows.make_batches(config, rows.SHAPES[name], count=1)
        assert len(batches[0].tokens) == 2048
        works[name] = batches[0].work
    # As the log of a training counts them, without padding: 104 positions of stage 1, 3 of stage 2, 2 of stage 3.
    assert works["stage1"] == Work(6, 1944, 6 * 324.0**2, 6 * 66)
    assert works["stage2"].num_images == 5 and works["stage2"].sum_squared_spans == 2045.0**2
    assert works["stage3"].num_images == 3 and works["stage3"].num_tokens == 2046
    assert works["text"] == Work(0, 2048, 2048.0**2, 2047)


def test_the_ladder_goes_down_until_it_fits(module: Any) -> None:
    training, depth = module("gpu_parts.training"), module("gpu_parts.depth")
    sizes = training.Sizes(micro_batches=1, steps=1, small=False, backend="local")
    work = Work(5, 2048, 2048.0**2, 680)
    stage1, stage2 = (training.stage_config(training.STAGES[name], sizes) for name in ("stage1", "stage2"))
    first = {name: next(depth.ladder(stage2, work, free_bytes=size)) for name, size in
             (("80", 84_000_000_000), ("141", 150_000_000_000), ("all", 0))}  # fmt: skip
    assert str(first["all"]) == "48 + 32 layers"
    assert 4 <= first["80"].language_layers < first["141"].language_layers < 32
    assert all(2 * size.vision_layers == 3 * size.language_layers for size in first.values())
    whole = next(depth.ladder(stage1, Work(6, 2048, 0.0, 396), free_bytes=84_000_000_000))
    assert (whole.vision_layers, whole.language_layers) == (48, 32), "stage 1 is measured at its full size"

    tried = []

    def run(attempt: Any) -> str:
        tried.append(attempt)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "ran"

    attempt, result, failed = depth.first_that_fits(depth.ladder(stage2, work, free_bytes=0), run)
    assert result == "ran" and attempt == tried[2] and len(failed) == 2
    with pytest.raises(torch.OutOfMemoryError, match="2 layers"):
        depth.first_that_fits(iter(tried[:1]), lambda _: run_out())


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_rates_count_the_other_way_round(module: Any, tmp_path: Path) -> None:
    report = module("gpu_parts.report").Report(tmp_path / "rows.json")
    report.rate("MFU", 0.5, 0.48)
    report.cost("seconds", 2.0, 1.0)
    report.cost("bits", 0.0, 0.0)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["met"], round(row["ratio"], 2)) for row in rows] == [(True, 0.96), (False, 2.0), (True, 0.0)]
