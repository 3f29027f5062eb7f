"""Encoded images -> pixels, in processes of their own.

A decode worker is ``python -m megatron_vl.data.decoding IMAGE_SIZE PREFIX...``, spoken to over its standard
input and output. It is a fresh interpreter that imports numpy and Pillow only, so that it starts in a
fraction of a second; forking a process that runs torch threads and process groups may hang, and
multiprocessing's spawn would import the training script again. Requests name images by (data set, index); the
worker reads them from disk itself, and answers with pixels. It ends when its input does, so it never outlives
the trainer, and it ignores the signals that ask the trainer to save and stop, because the trainer still needs
it then.

A thread per worker drains its answers, so neither side can block the other. The pipe of answers is made as large
as the system lets users make it: at the usual 64 kB the two sides wake each other ten times an image, which costs more
than the copies do. A worker that dies or does not answer in time is an error that says so.

After its first images a worker loads compiled code for the resize, which takes most of its time, and uses it once it is
there (``resize.py``; pixels are the same). A short run would not win back the second that loading takes.

    request   u64 ticket | u64 number of images | (u64 data set, u64 image) ...
    answer    u64 ticket | u8 status | u64 size | pixels (status 0) or message (status 1)
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
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_vl.data.image import to_pixels
from megatron_vl.data.indexed import IndexedFile
from megatron_vl.data.resize import Resize, compiled_resize, resize
from megatron_vl.errors import DataError, SkipSample

_REQUEST = struct.Struct("<QQ")
_ANSWER = struct.Struct("<QBQ")
_OK, _FAILED = 0, 1
_GRACE_SECONDS = 5.0
_PIPE_BYTES = 1 << 20
_COMPILE_AFTER = 100
"""Images."""


class Decoder:
    """Decodes in this process."""

    def __init__(self, prefixes: Sequence[str], image_size: int) -> None:
        """Open the image files of the data sets. Raises DataError as ``IndexedFile`` does."""
        self._prefixes = tuple(prefixes)
        self._files = [IndexedFile(f"{prefix}.images") for prefix in prefixes]
        self._image_size = image_size
        self._resize: Resize = resize

    def compile(self) -> None:
        """Change to compiled code, if there is a compiler; takes seconds, in which another thread may decode."""
        self._resize = compiled_resize() or self._resize

    def decode(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """uint8[n, 3, H, W] of int64[n, 2] (data set, image). Raises DataError naming an image that cannot be
        read."""
        pixels = np.empty((len(images), 3, self._image_size, self._image_size), dtype=np.uint8)
        for position, (data_set, image) in enumerate(images.tolist()):
            try:
                data = self._files[data_set].read_bytes(image)
                pixels[position] = to_pixels(data, self._image_size, resize=self._resize)
            except (SkipSample, IndexError) as error:
                raise DataError(
                    f"{self._prefixes[data_set]}.images: image {image}: {error}. It could be read when the "
                    "data set was "
                    "prepared; verify the files with tools/prepare_data.py --verify."
                ) from error
        return pixels

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
    """One decode process and the thread that drains it."""

    def __init__(self, number: int, prefixes: Sequence[str], image_size: int) -> None:
        self.name = f"decode worker {number}"
        self._shape = (3, image_size, image_size)
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_vl.data.decoding", str(image_size), *prefixes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C on the terminal is for the trainer
        )
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # above this user's limit: it works as it is
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._answers: queue.Queue[_Answer] = queue.Queue()
        self._thread = threading.Thread(target=self._drain, name=self.name, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, ticket: int, images: npt.NDArray[np.int64]) -> None:
        """Send a request; if the worker is gone, ``answer`` will say so."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the draining thread reports a broken pipe, with the exit status
            self._process.stdin.write(_REQUEST.pack(ticket, len(images)) + images.astype("<u8").tobytes())
            self._process.stdin.flush()

    def answer(self, ticket: int, timeout: float) -> npt.NDArray[np.uint8]:
        """Wait for the answer to a request; answers to earlier requests that nobody waits for are dropped."""
        while True:
            try:
                answer = self._answers.get(timeout=timeout)
            except queue.Empty:
                raise DataError(
                    f"{self.name} (process {self.pid}) did not answer within {timeout:g} s; is the storage "
                    "hanging?"
                ) from None
            if answer.error:
                self._answers.put(answer)
                raise DataError(answer.error)
            if answer.ticket == ticket:
                assert answer.pixels is not None
                return answer.pixels

    def close(self) -> None:
        """End the process: politely, then not."""
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
        stream = self._process.stdout
        while True:
            header = stream.read(_ANSWER.size)
            if len(header) < _ANSWER.size:
                break
            ticket, status, size = _ANSWER.unpack(header)
            buffer = np.empty(size, dtype=np.uint8)
            if stream.readinto(buffer.data) != size:  # type: ignore[attr-defined]
                break
            if status == _OK:
                self._answers.put(_Answer(ticket, buffer.reshape(-1, *self._shape)))
            else:
                self._answers.put(_Answer(ticket, error=buffer.tobytes().decode("utf-8", "replace")))
        stream.close()
        status = self._process.wait()
        self._answers.put(_Answer(0, error=f"{self.name} (process {self.pid}) ended with status {status}"))


class DecodePool:
    """Decodes requests in ``num_workers`` processes (0: in this one, when the result is asked for), in
    order."""

    def __init__(
        self, prefixes: Sequence[str], image_size: int, *, num_workers: int, timeout: float = 300.0
    ) -> None:
        self._timeout = timeout
        self._decoder = Decoder(prefixes, image_size)
        self._workers = [_Worker(number, prefixes, image_size) for number in range(num_workers)]
        self._next_ticket = 0
        self._requests: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, images: npt.NDArray[np.int64]) -> int:
        """Ask for int64[n, 2] (data set, image); returns the ticket to collect them with."""
        ticket = self._next_ticket
        self._next_ticket += 1
        if self._workers and len(images):
            self._workers[ticket % len(self._workers)].ask(ticket, images)
        else:
            self._requests[ticket] = images
        return ticket

    def result(self, ticket: int) -> npt.NDArray[np.uint8]:
        """uint8[n, 3, H, W] of a request; tickets are collected in the order in which they were given.

        Raises DataError if an image cannot be read, or a worker has died or does not answer in time.
        """
        if ticket in self._requests:
            return self._decoder.decode(self._requests.pop(ticket))
        return self._workers[ticket % len(self._workers)].answer(ticket, self._timeout)

    def forget(self) -> None:
        """Drop what was asked for and not collected."""
        self._requests.clear()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._decoder.close()


def serve(decoder: Decoder, requests: BinaryIO, answers: BinaryIO) -> None:
    """The worker's loop: answer requests until there are no more."""
    asked = 0
    while header := requests.read(_REQUEST.size):
        ticket, count = _REQUEST.unpack(header)
        if asked < _COMPILE_AFTER <= asked + count:
            threading.Thread(target=decoder.compile, daemon=True).start()
        asked += count
        images = np.frombuffer(requests.read(16 * count), dtype="<u8").reshape(-1, 2).astype(np.int64)
        try:
            payload, status = decoder.decode(images).data.cast("B"), _OK
        except DataError as error:
            payload, status = memoryview(str(error).encode("utf-8")), _FAILED
        answers.write(_ANSWER.pack(ticket, status, payload.nbytes))
        answers.write(payload)
        answers.flush()


def main(argv: Sequence[str]) -> None:
    """Entry point of a decode worker: image size, then prefixes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(Decoder(argv[1:], int(argv[0])), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone; nobody is left to read a traceback


if __name__ == "__main__":
    main(sys.argv[1:])
