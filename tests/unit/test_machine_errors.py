"""Errors of disks and memory, as the libraries raise them, are told in words of a user; others are left alone."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vl.machine_errors import describe


def test_memory() -> None:
    with pytest.raises(RuntimeError) as asked:
        torch.empty(2**50, dtype=torch.uint8)
    text = describe(asked.value, less_memory="Use less.")
    assert text == "out of memory: 1048576.00 GiB were asked for. Use less."
    with pytest.raises(MemoryError) as unable:
        np.empty(2**50, dtype=np.uint8)
    assert (describe(unable.value) or "").startswith("out of memory: 1.00 PiB were asked for. Use smaller batches")
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB in all")
    assert (describe(cuda) or "").startswith("out of memory: 20.00 GiB were asked for.")
    assert (describe(MemoryError()) or "").startswith("out of memory. Use")


class _Full(io.BytesIO):
    """A disk with room for a few bytes."""

    def write(self, data: object) -> int:
        if self.tell() > 600:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)  # type: ignore[arg-type]


def test_disks(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, OSError)) as full:
        torch.save({"a": torch.zeros(10**4)}, _Full())
    assert "disk is full" in (describe(full.value) or "") or "No space left" in (describe(full.value) or "")
    assert "disk is full" in (describe(RuntimeError("unexpected pos 704 vs 598")) or "")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as under:
        (tmp_path / "file" / "below").touch()
    assert describe(under.value) == f"{tmp_path}/file/below: Not a directory"


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), ConnectionResetError(104, "reset")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert describe(error) is None
