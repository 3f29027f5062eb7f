"""Speed and memory of conversion, beside a plain copy of the same bytes.

    python benchmarks/convert.py [--size 2.0] [--turns 5] [--disk DIR] [--json FILE]
    python benchmarks/convert.py --memory 2 6 [--disk DIR] [--json FILE]

A synthetic folder in the published layout (layers of half Qwen-7B's width, shards of 1 GB) is imported into a
checkpoint and exported again. The reference reads and writes the same shards with ``safetensors``, or with
``torch.load`` and ``torch.save``: no conversion can do less. Speed is measured in this process, on a RAM disk unless
``--disk`` names another place. Import also computes and records the SHA-256 of what it writes, which the reference
does not.

``--memory`` measures the peak of the commands themselves, each in a process of its own, for folders of several sizes:
it must not exceed 1.3 x the largest shard + 1.5 GB, and must not grow with the model. Files on a RAM disk count as
memory of the machine, not of a process; so these folders lie on a disk.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from measure import Row, describe_machine, ratios, take_turns, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vl.backends.platform import prepare_process
from megatron_vl.checkpoint.tensors import open_checkpoint
from megatron_vl.config.schema import LanguageConfig, ModelConfig, ResamplerConfig, VisionConfig
from megatron_vl.conversion.checkpoints import write_checkpoint
from megatron_vl.conversion.convert import ExportOptions, export_folder, import_folder
from megatron_vl.planning.parameters import model_tensors

GB = 10**9
SHARD_BYTES = 10**9
SPEED_GOAL = 0.5
"""Of the speed of a plain copy, at least."""
GROWTH_GOAL = 1.05
"""Peak of the largest folder by that of the smallest, at most."""
PEAK_RUNS = 3
"""A peak is the median of so many: threads read ahead, and once in a while two large tensors meet, or never do."""
TOOL = Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"


class Synthetic(Mapping[str, Tensor]):
    """Tensors of a model in bf16 that take no memory until they are read; finite, and unlike each other."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self._shapes = {spec.name: spec.shape for spec in model_tensors(model)}
        self._block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        size, start = torch.Size(shape).numel(), len(name)
        repeated = self._block[start:].repeat(-(-size // (len(self._block) - start)))
        return repeated[:size].reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    @property
    def num_bytes(self) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in self._shapes.values())


def synthetic_model(num_bytes: float) -> ModelConfig:
    """A model of about so many bytes in bf16; only its number of language layers depends on it."""
    model = ModelConfig(
        preset="synthetic",
        num_bpe_tokens=31_000,
        vision=VisionConfig(num_layers=2),
        resampler=ResamplerConfig(num_attention_heads=16),
        language=LanguageConfig(
            num_layers=1, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16, vocab_size=32_000
        ),
    )
    two = replace(model, language=replace(model.language, num_layers=2))
    one_layer = Synthetic(two).num_bytes - Synthetic(model).num_bytes
    layers = 1 + max(0, round((num_bytes - Synthetic(model).num_bytes) / one_layer))
    return replace(model, language=replace(model.language, num_layers=layers))


def main() -> None:
    """Print one line for each comparison."""
    options = _parse()
    prepare_process()
    print(describe_machine())
    with tempfile.TemporaryDirectory(dir=options.disk or _default_disk(options)) as place:
        rows = _memory(Path(place), options.memory) if options.memory else _speed(Path(place), options)
    if options.json:
        write_rows(options.json, rows)


def _speed(place: Path, options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for file_format in ("safetensors", "bin"):
        source = Synthetic(synthetic_model(options.size * GB))
        export_options = ExportOptions(file_format=file_format, max_shard_bytes=SHARD_BYTES)
        export_folder(source, source.model, place / "hf", options=export_options)
        checkpoint = write_checkpoint(import_folder(place / "hf"), place / "checkpoint")
        copy = _copier(place / "hf", place / "copy", file_format)
        contenders: dict[str, Callable[[], object]] = {
            "import": lambda: write_checkpoint(import_folder(place / "hf"), _fresh(place / "imported")),
            "export": _exporter(checkpoint, place / "exported", export_options),
            "copy": copy,
        }
        times = take_turns(contenders, turns=options.turns, warm_up=1)
        size = source.num_bytes / GB
        rows += [
            _report_speed(f"{name}, {file_format}, {size:.2f} GB", size, times[name].wall, times["copy"].wall)
            for name in ("import", "export")
        ]
        for path in list(place.iterdir()):
            shutil.rmtree(path)
    return rows


def _copier(source: Path, target: Path, file_format: str) -> Callable[[], object]:
    """What reads and writes every shard with its own library, and nothing more."""

    def copy() -> None:
        _fresh(target).mkdir()
        for shard in sorted(source.glob(f"*.{file_format}")):
            if file_format == "safetensors":
                save_file(load_file(shard), target / shard.name)
            else:
                torch.save(torch.load(shard, weights_only=True), target / shard.name)

    return copy


def _exporter(checkpoint: Path, target: Path, options: ExportOptions) -> Callable[[], object]:
    def export() -> None:
        tensors = open_checkpoint(checkpoint)
        export_folder(tensors, tensors.model, _fresh(target), options=options)

    return export


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _report_speed(name: str, size: float, ours: tuple[float, ...], reference: tuple[float, ...]) -> Row:
    spread = ratios(reference, ours)  # of speeds
    mine, other = (size / sorted(times)[len(times) // 2] for times in (ours, reference))
    met = spread.middle >= SPEED_GOAL
    print(
        f"{name}: ours {mine:.2f} GB/s, plain copy {other:.2f} GB/s; ratio {spread.middle:.2f} "
        f"[{spread.low:.2f} .. {spread.high:.2f}]; goal >= {SPEED_GOAL}: {'met' if met else 'MISSED'}",
        flush=True,
    )
    return Row(name, mine, other, spread.middle, SPEED_GOAL, met)


def _memory(place: Path, sizes: list[float]) -> list[Row]:
    rows: list[Row] = []
    peaks: dict[str, list[float]] = {}
    for size in sizes:
        source = Synthetic(synthetic_model(size * GB))
        export_folder(source, source.model, place / "hf", options=ExportOptions(max_shard_bytes=SHARD_BYTES))
        largest = max(path.stat().st_size for path in (place / "hf").iterdir())
        limit = 1.3 * largest / GB + 1.5
        commands = {"import hf checkpoint": "checkpoint", "export checkpoint out": "out", "check checkpoint": ""}
        for command, made in commands.items():
            name, *arguments = command.split()
            peak = median(_peak(place, name, *arguments, made=made) for _ in range(PEAK_RUNS))
            peaks.setdefault(name, []).append(peak)
            rows.append(_report_peak(f"peak of {name}, {source.num_bytes / GB:.2f} GB", peak, limit, 1.0))
        for path in list(place.iterdir()):
            shutil.rmtree(path)
    for name, found in peaks.items():
        if len(found) > 1:
            rows.append(_report_peak(f"growth of {name}'s peak", found[-1], found[0], GROWTH_GOAL))
    return rows


def _peak(place: Path, *arguments: str, made: str) -> float:
    """Peak memory of a command in GB; the system's figure for finished children is that of the largest one."""
    if made:
        _fresh(place / made)
    script = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, sys.executable, str(TOOL), *arguments]
    run = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
    return int(run.stdout.split()[-1]) * 1024 / GB


def _report_peak(name: str, ours: float, limit: float, goal: float) -> Row:
    ratio = ours / limit
    met = ratio <= goal
    print(
        f"{name}: {ours:.3f} GB beside {limit:.3f} GB; ratio {ratio:.3f}; goal <= {goal}: {'met' if met else 'MISSED'}",
        flush=True,
    )
    return Row(name, ours, limit, ratio, goal, met)


def _default_disk(options: argparse.Namespace) -> str | None:
    ram_disk = Path("/dev/shm")
    return str(ram_disk) if ram_disk.is_dir() and not options.memory else None


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2.0, metavar="GB", help="of the folder whose speed is measured")
    parser.add_argument("--turns", type=int, default=5, help="measured runs of each contender")
    parser.add_argument("--memory", type=float, nargs="+", metavar="GB", help="measure peaks, for these sizes")
    parser.add_argument("--disk", metavar="DIR", help="where files lie (default: RAM disk; with --memory: disk)")
    parser.add_argument("--json", type=Path, help="write name, ours, reference, ratio, goal, met of each comparison")
    return parser.parse_args()


if __name__ == "__main__":
    main()
