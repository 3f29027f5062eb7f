"""Findings about weights: did a stage leave its frozen parts unchanged?"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vl.conversion.hf_files import index_folder
from megatron_vl.report.records import Check
from megatron_vl.report.requirements import LANGUAGE_MODEL_UNCHANGED

_VISUAL = "transformer.visual."


def compare_language_models(before: Path, after: Path) -> Check:
    """Compare the language models of two exported Hugging Face folders bit for bit.

    Raises:
        ConversionError: if a folder cannot be read.
    """
    first, second = index_folder(before), index_folder(after)
    names = sorted(name for name in first | second if not name.startswith(_VISUAL))
    equal = 0
    for name in names:
        if name in first and name in second:
            equal += torch.equal(first[name].read().view(torch.uint8), second[name].read().view(torch.uint8))
    passed = bool(names) and equal == len(names)
    return Check(LANGUAGE_MODEL_UNCHANGED, passed, f"{equal} of {len(names)} tensors bit-identical")
