"""One run of all parts of the small test model, shared by the modules that compare it with other implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.ranks import RankPools
from tests.helpers.tiny import ODD_MODEL, tiny_config
from tests.unit.model.parts import Inputs, Outputs, run_parts


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        patches=torch.randn(ODD_MODEL.num_patches, 3, ODD_MODEL.vision.hidden_size, generator=generator),
        embedded=torch.randn(26, 1, ODD_MODEL.language.hidden_size, generator=generator),
        spans=[5, 1, 20],
    )


@pytest.fixture(scope="session")
def outputs(ranks: RankPools, inputs: Inputs) -> Outputs:
    found: Outputs = ranks(1).run(run_parts, replace(tiny_config(), model=ODD_MODEL), inputs)[0]
    return found
