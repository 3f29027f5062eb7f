"""The tiny checkpoint of the original, read by us and read by torch."""

from __future__ import annotations

import pytest
from torch import Tensor

from megatron_vl.conversion.convert import ImportedModel, import_folder

from .samples import GOLDEN, read_with_libraries


@pytest.fixture
def golden() -> ImportedModel:
    """The tiny checkpoint of the original."""
    return import_folder(GOLDEN)


@pytest.fixture
def golden_tensors() -> dict[str, Tensor]:
    """The same, read by torch alone under the published names."""
    return read_with_libraries(GOLDEN)
