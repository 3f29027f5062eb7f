"""How often a run takes the rows of its data sets, in words.

The steps of a recipe are counted for the paper's mixtures. On a smaller one they are many epochs, which nothing in a
loss curve says; so a run says it before its first step, and a dry run from the manifests alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vl.config.batch import with_rows
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.validate import parse_data_path
from megatron_vl.data.blend import Blend, mean_over
from megatron_vl.data.manifest import Manifest, read_manifest
from megatron_vl.errors import DataError


def describe_data(data_sets: Sequence[tuple[str, Manifest]], blend: Blend, num_rows: int) -> list[str]:
    """One line for the pool that data sets without weights are, or one for each data set of a weighted blend.

    ``num_rows``: what the run takes from its first step to its last; of a data set that is not used up, each row less
    than once.
    """
    passes = blend.passes(num_rows)
    if blend.weights is None:
        return [_line("data", [manifest for _, manifest in data_sets], passes[0])]
    return [
        _line(f"data {prefix}", [manifest], times)
        for (prefix, manifest), times in zip(data_sets, passes, strict=True)
    ]


def planned(config: RunConfig) -> list[str]:
    """The lines of a run from its first step on, without opening the data; raises DataError if they are not here."""
    data_path = config.data.data_path
    data_sets = [(prefix, read_manifest(prefix)) for _, prefix in parse_data_path(data_path)]
    for prefix, manifest in data_sets:
        if not manifest.num_rows:
            raise DataError(f"{prefix}: holds no rows")
    blend = Blend.of(data_path, [manifest.num_rows for _, manifest in data_sets], seed=config.training.seed)
    training = with_rows(config, mean_over([manifest.samples_per_row for _, manifest in data_sets], blend)).training
    return describe_data(data_sets, blend, training.train_iters * training.global_batch_size)


def _line(name: str, manifests: Sequence[Manifest], times: float) -> str:
    samples, rows = sum(item.num_samples for item in manifests), sum(item.num_rows for item in manifests)
    capacity = sum(item.num_rows * item.seq_length for item in manifests)
    fill = sum(item.num_tokens for item in manifests) / max(capacity, 1)
    often = f"{times:,.0f}" if times >= 10 else f"{times:.1f}" if times >= 1 else f"{times:.2f}"
    held = f"{samples:,} samples in {rows:,} rows ({100 * fill:.1f} % filled)"
    return f"{name}: {held}; the run takes each row {often} times"
