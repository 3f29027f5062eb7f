"""Where Megatron-Core names CUDA, in the files that a run here executes: counted in its source, without importing it.

``python -m tests.unit.backends.cuda_places`` writes the counts of the installed version to ``cuda_places.json``, which
has those of every supported version. Do so only when ``backends/cpu.py`` has been read against every place that is new.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

from megatron_vl.backends.versions import installed_core

RECORD = Path(__file__).with_suffix(".json")
# Found by recording the functions that training, checkpoints and generation call at various layouts.
FILES = (
    "activations.py",
    "dist_checkpointing/core.py",
    "dist_checkpointing/mapping.py",
    "dist_checkpointing/optimizer.py",
    "dist_checkpointing/serialization.py",
    "dist_checkpointing/strategies/async_utils.py",
    "dist_checkpointing/strategies/common.py",
    "dist_checkpointing/strategies/filesystem_async.py",
    "dist_checkpointing/strategies/state_dict_saver.py",
    "dist_checkpointing/strategies/torch.py",
    "dist_checkpointing/utils.py",
    "dist_checkpointing/validation.py",
    "distributed/data_parallel_base.py",
    "distributed/distributed_data_parallel.py",
    "distributed/finalize_model_grads.py",
    "distributed/param_and_grad_buffer.py",
    "fusions/fused_bias_dropout.py",
    "fusions/fused_cross_entropy.py",
    "inference/contexts/static_context.py",
    "models/common/embeddings/rope_utils.py",
    "models/gpt/gpt_layer_specs.py",
    "optimizer/__init__.py",
    "optimizer/clip_grads.py",
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "optimizer/optimizer_config.py",
    "parallel_state.py",
    "pipeline_parallel/p2p_communication.py",
    "pipeline_parallel/schedules.py",
    "pipeline_parallel/utils.py",
    "process_groups_config.py",
    "tensor_parallel/cross_entropy.py",
    "tensor_parallel/layers.py",
    "tensor_parallel/mappings.py",
    "tensor_parallel/random.py",
    "tensor_parallel/utils.py",
    "transformer/attention.py",
    "transformer/identity_op.py",
    "transformer/mlp.py",
    "transformer/module.py",
    "transformer/spec_utils.py",
    "transformer/transformer_config.py",
    "transformer/transformer_layer.py",
    "transformer/utils.py",
    "utils.py",
)

Places = dict[str, dict[str, int]]


def count_places() -> Places:
    """For each file, how often it names each part of ``torch.cuda``, calls ``.cuda()``, or asks for ``"cuda"``."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    counted = {name: _count(ast.parse((root / name).read_text(encoding="utf-8"))) for name in FILES}
    return {name: places for name, places in counted.items() if places}


def _count(tree: ast.AST) -> dict[str, int]:
    found: Counter[str] = Counter()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.update(_on_cuda(node))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            text = ast.unparse(node)
            if re.fullmatch(r"torch\.cuda(\.\w+)+", text):
                found[text] += 1
            elif node.attr == "cuda" and text != "torch.cuda":
                found[".cuda()"] += 1
        elif isinstance(node, ast.Constant) and node.value == "cuda":
            found['"cuda"'] += 1
    return dict(sorted(found.items()))


def _on_cuda(call: ast.Call) -> list[str]:
    """``torch.zeros(device="cuda")`` for a call with that keyword."""
    said = [word.value.value for word in call.keywords if word.arg == "device" and isinstance(word.value, ast.Constant)]
    return [f'{ast.unparse(call.func)}(device="cuda")'] if said == ["cuda"] else []


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8")) | {installed_core(): count_places()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
