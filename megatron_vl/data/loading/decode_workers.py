"""Processes that decode images into pixels.

A decode worker is ``python -m megatron_vl.data.loading.decode_workers IMAGE_SIZE PREFIX...``. The trainer talks to it
over its standard input and output. It is a new interpreter that imports only numpy and Pillow, so it starts in a
fraction of a second. A fork of a process that runs torch threads and process groups may hang, and the spawn method of
multiprocessing would import the training script again. Requests name images by (data set, index). The worker reads the
images from disk itself and answers with pixels. It ends when its input ends, so it never outlives the trainer. It
ignores the signals that ask the trainer to save and stop, because the trainer still needs it then.

One thread per worker reads its answers, so neither side can block the other. Images are sent one by one through a pipe
that holds more than one of them. With the usual 64 kB, the two sides would wake each other ten times per image, which
costs more than the copy. A worker that dies or does not answer in time is reported as an error.

After its first images, a worker loads compiled code for the resize, which takes most of its time. It uses this code as
soon as it is loaded (``resize.py``; the pixels are the same). In a short run, the loading time of one second would not
pay off.

    request   u64 ticket | u64 number of images | (u64 data set, u64 image) ...
    answer    u64 ticket | u64 number of images, and for each image, up to the first that cannot be read:
              u8 status | u64 size | pixels (status 0) or message (status 1)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_vl.data.dataset.indexed import IndexedFile
from megatron_vl.data.images.decode import to_pixels
from megatron_vl.data.images.resize import Resize, compiled_resize, resize
from megatron_vl.errors import DataError, SkipSample

_HEADER = struct.Struct("<QQ")
"""Header of a request and of an answer: ticket, number of images."""
_IMAGE = struct.Struct("<BQ")
_OK, _FAILED = 0, 1
_GRACE_SECONDS = 5.0
_PIPE_BYTES = 1 << 20
_COMPILE_AFTER = 100
"""Number of images after which compiled code is loaded."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # By default, the C library returns megabytes to the system when they are freed. Every image would then cause a
    # thousand page faults, a quarter of its decoding time. Other C libraries ignore these variables.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
}


class Decoder:
    """Decode images in this process."""

    def __init__(self, prefixes: Sequence[str], image_size: int) -> None:
        """Open the image files of the data sets. Raises DataError as ``IndexedFile`` does."""
        self._prefixes = tuple(prefixes)
        self._files = [IndexedFile(f"{prefix}.images") for prefix in prefixes]
        self._image_size = image_size
        self.shape = (3, image_size, image_size)
        """Shape of the pixels of an image."""
        self._resize: Resize = resize

    def compile(self) -> None:
        """Load compiled code if there is a compiler, and use it. Takes seconds; another thread may decode meanwhile."""
        self._resize = compiled_resize() or self._resize

    def decode(self, data_set: int, image: int) -> npt.NDArray[np.uint8]:
        """Return an image as uint8[3, H, W]. Raises DataError with its name if it cannot be read."""
        try:
            return to_pixels(self._files[data_set].read_bytes(image), self._image_size, resize=self._resize)
        except (SkipSample, IndexError) as error:
            raise DataError(
                f"{self._prefixes[data_set]}.images: image {image}: {error}. It could be read when the data set was "
                "prepared; verify the files with tools/prepare_data.py --verify."
            ) from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


@dataclass(frozen=True)
class _Answer:
    ticket: int
    pixels: npt.NDArray[np.uint8] | None = None
    error: str = ""


class _Worker:
    """A decode process and the thread that reads its answers."""

    def __init__(self, number: int, prefixes: Sequence[str], image_size: int) -> None:
        self.name = f"decode worker {number}"
        self._shape = (3, image_size, image_size)
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_vl.data.loading.decode_workers", str(image_size), *prefixes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # only the trainer receives Ctrl-C of the terminal
        )
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # above the limit of this user: the default size works too
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._answers: queue.Queue[_Answer] = queue.Queue()
        self._thread = threading.Thread(target=self._drain, name=self.name, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, ticket: int, images: npt.NDArray[np.int64]) -> None:
        """Send a request for int64[n, 2] (data set, image). If the worker has died, ``answer`` reports it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the reading thread reports a broken pipe and exit status
            self._process.stdin.write(_HEADER.pack(ticket, len(images)) + images.astype("<u8").tobytes())
            self._process.stdin.flush()

    def answer(self, ticket: int, timeout: float) -> npt.NDArray[np.uint8]:
        """Wait for the answer to a request and return uint8[n, 3, H, W]; drop answers to earlier requests."""
        while True:
            try:
                answer = self._answers.get(timeout=timeout)
            except queue.Empty:
                raise DataError(
                    f"{self.name} (process {self.pid}) did not answer within {timeout:g} s; is the storage hanging?"
                ) from None
            if answer.error:
                self._answers.put(answer)
                raise DataError(answer.error)
            if answer.ticket == ticket:
                assert answer.pixels is not None
                return answer.pixels

    def close(self) -> None:
        """End the process: close its input first, and kill it if it does not end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone already
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(_GRACE_SECONDS)

    def _drain(self) -> None:
        """Move answers from the pipe to the queue until the pipe ends."""
        assert self._process.stdout is not None
        with self._process.stdout as stream, contextlib.suppress(EOFError):
            while True:
                self._answers.put(self._read_answer(stream))
        status = self._process.wait()
        self._answers.put(_Answer(0, error=f"{self.name} (process {self.pid}) ended with status {status}"))

    def _read_answer(self, stream: IO[bytes]) -> _Answer:
        """Read the answer to one request. Raises EOFError if the pipe ends too early."""
        ticket, count = _HEADER.unpack(_read(stream, _HEADER.size))
        pixels = np.empty((count, *self._shape), dtype=np.uint8)
        for image in pixels:
            status, size = _IMAGE.unpack(_read(stream, _IMAGE.size))
            if status == _FAILED:
                return _Answer(ticket, error=_read(stream, size).decode("utf-8", "replace"))
            if stream.readinto(image.data) != size:  # type: ignore[attr-defined]
                raise EOFError
        return _Answer(ticket, pixels)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


class DecodePool:
    """Decode requests in order, in ``num_workers`` processes; with 0, in this process when a result is needed."""

    def __init__(self, prefixes: Sequence[str], image_size: int, *, num_workers: int, timeout: float = 300.0) -> None:
        self._timeout = timeout
        self._decoder = Decoder(() if num_workers else prefixes, image_size)
        self._workers = [_Worker(number, prefixes, image_size) for number in range(num_workers)]
        self._next_ticket = 0
        self._requests: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, images: npt.NDArray[np.int64]) -> int:
        """Request the images int64[n, 2] (data set, image); return the ticket to collect them with."""
        ticket = self._next_ticket
        self._next_ticket += 1
        if self._workers and len(images):
            self._workers[ticket % len(self._workers)].ask(ticket, images)
        else:
            self._requests[ticket] = images
        return ticket

    def result(self, ticket: int) -> npt.NDArray[np.uint8]:
        """Return the images of a request as uint8[n, 3, H, W]. Tickets must be collected in the order of the requests.

        Raises:
            DataError: An image cannot be read, or a worker has died or does not answer in time.
        """
        if ticket in self._requests:
            images = self._requests.pop(ticket).tolist()
            pixels = np.empty((len(images), *self._decoder.shape), dtype=np.uint8)
            for position, (data_set, image) in enumerate(images):
                pixels[position] = self._decoder.decode(data_set, image)
            return pixels
        return self._workers[ticket % len(self._workers)].answer(ticket, self._timeout)

    def forget(self) -> None:
        """Drop all requests whose results were not collected."""
        self._requests.clear()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._decoder.close()


def serve(decoder: Decoder, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more: the main loop of a worker."""
    asked = 0
    while header := requests.read(_HEADER.size):
        _, count = _HEADER.unpack(header)
        if asked < _COMPILE_AFTER <= asked + count:
            threading.Thread(target=decoder.compile, daemon=True).start()
        asked += count
        images = np.frombuffer(requests.read(16 * count), dtype="<u8").reshape(-1, 2).tolist()
        answers.write(header)
        try:
            for data_set, image in images:
                pixels = decoder.decode(data_set, image)
                answers.write(_IMAGE.pack(_OK, pixels.nbytes))
                answers.write(pixels.data)
        except DataError as error:
            message = str(error).encode("utf-8")
            answers.write(_IMAGE.pack(_FAILED, len(message)) + message)
        answers.flush()


def main(argv: Sequence[str]) -> None:
    """Run a decode worker; the arguments are the image size and the prefixes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(Decoder(argv[1:], int(argv[0])), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone; nobody is left to read a traceback


if __name__ == "__main__":
    main(sys.argv[1:])
