"""What every reader of ``benchmarks/loader.py`` does the same way: its arguments, its transform, its clock.

A reader is a script that opens one library's loader over the data in a folder and hands its batches to ``report``,
which prints one line of JSON. It runs in the environment of that library, so nothing is imported here but what all of
them have; of this project only what makes uint8 pixels, which imports numpy and Pillow, and numba if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vl.data.images.decode import to_pixels
from megatron_vl.data.images.pixels import IMAGE_MEAN, IMAGE_STD
from megatron_vl.data.images.resize import Resize, compiled_resize, resize

IMAGE_SIZE = 448
BATCH = 8
"""Images in a batch of those that count images. Ours are rows of at most seven."""


@dataclass(frozen=True)
class Task:
    """What to read, and what to measure."""

    data: Path
    transform: str
    """``float`` or ``uint8``."""
    workers: int
    images: int
    """To measure, after those of the warm-up."""
    started: float
    """Unix time at which this process was asked for."""
    check: bool
    """Report hashes of the pixels in place of times."""
    skip: int
    """Records that an earlier run has consumed: the first batch is the one behind them."""


def read_task() -> Task:
    """The arguments of a reader."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--transform", choices=("float", "uint8"), default="uint8")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    torch.set_num_threads(1)
    task = Task(**vars(parser.parse_args()))
    if task.transform == "uint8":
        best_resize()  # before there are workers
    return task


def to_float(image: Image.Image) -> torch.Tensor:
    """float32[3, H, W]: the usual Resize, ToTensor, Normalize, operation by operation as torchvision does them."""
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    values = pixels.to(torch.float32).div(255).clone()
    mean, deviation = (torch.tensor(three, dtype=torch.float32).view(3, 1, 1) for three in (IMAGE_MEAN, IMAGE_STD))
    return values.sub_(mean).div_(deviation)


def to_uint8(data: bytes) -> torch.Tensor:
    """uint8[3, H, W]: this project's transform; the device of the model normalizes."""
    return torch.from_numpy(to_pixels(data, IMAGE_SIZE, resize=best_resize()))


@functools.cache
def best_resize() -> Resize:
    """What our decode workers use after a while: compiled code, if there is a compiler."""
    return compiled_resize() or resize


def report(task: Task, open_loader: Callable[[], Iterator[torch.Tensor]], *, warm_up: int) -> None:
    """Open, read and print: times and the CPU time of all processes, or hashes of pixels.

    ``open_loader`` gives batches of pixels without end; ``warm_up`` is at least the images that it may have ready.
    """
    opened = time.time()
    batches = open_loader()
    first = next(batches)
    now = time.time()
    result: dict[str, object] = {"start_seconds": now - task.started, "open_seconds": now - opened}
    if task.check:
        result["hashes"] = _hashes(first, batches, task.images)
    elif task.images:
        result |= _rate(batches, images=task.images, warm_up=warm_up)
    print(json.dumps(result), flush=True)
    for pid in _family()[1:]:  # how long a library takes to end its workers is not measured
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _rate(batches: Iterator[torch.Tensor], *, images: int, warm_up: int) -> dict[str, object]:
    while warm_up > 0:
        warm_up -= len(next(batches))
    count, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while count < images:
        count += len(next(batches))
    seconds = time.perf_counter() - start
    return {"images_per_second": count / seconds, "cpu_ms_per_image": 1e3 * (_cpu_seconds() - cpu) / count}


def _hashes(batch: torch.Tensor, batches: Iterator[torch.Tensor], count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        found += [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch]
        batch = next(batches)
    return found


def _cpu_seconds() -> float:
    """CPU time of this process and of all processes under it."""
    ticks = 0
    for pid in _family():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _family() -> list[int]:
    """This process, and all processes under it."""
    pids = [os.getpid()]
    for pid in pids:
        for children in Path(f"/proc/{pid}").glob("task/*/children"):
            pids += [int(child) for child in children.read_text(encoding="utf-8").split()]
    return pids
