"""Facts about the data sets of a run that follow from their manifests alone.

The manifests show whether the data sets fit the model, how many rows a step with a given number of samples has, and how
often a run takes each row. So a launcher can refuse a run before it starts any process. A dry run can also show what
the number of steps in a recipe means for a small data set. Recipes count steps for the mixtures of the paper; on a
small data set this means many epochs, which no loss curve shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.batch import with_rows
from megatron_vl.config.data_files import parse_data_path
from megatron_vl.config.schema import RunConfig
from megatron_vl.config.special_tokens import SpecialTokens
from megatron_vl.data.dataset.manifest import Manifest, read_manifest
from megatron_vl.data.loading.blend import Blend, mean_over
from megatron_vl.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataPlan:
    """Data sets that fit the run, and how they are mixed."""

    data_sets: tuple[tuple[str, Manifest], ...]
    """Prefix and manifest of each data set."""
    blend: Blend
    seq_length: int
    """Length in tokens to which the run pads every row."""

    @classmethod
    def read(cls, config: RunConfig, *, key: str = "data_path") -> DataPlan:
        """Read the manifests of ``data.data_path``, or of another field that ``key`` names.

        Raises:
            ConfigError: There is no data set, or one was prepared for another model or row length.
            DataError: A manifest is missing or damaged, or a data set is empty.
        """
        data_path = getattr(config.data, key)
        if not data_path:
            raise ConfigError(f"data.{key} is empty: give the prefix of a prepared data set")
        pairs = parse_data_path(data_path, key=f"data.{key}")
        return cls.of(config, data_path, [(prefix, read_manifest(prefix)) for _, prefix in pairs])

    @classmethod
    def of(cls, config: RunConfig, data_path: Sequence[str], data_sets: Sequence[tuple[str, Manifest]]) -> DataPlan:
        """Check data sets whose manifests have been read.

        Raises:
            ConfigError: As for :meth:`read`.
            DataError: As for :meth:`read`.
        """
        for prefix, manifest in data_sets:
            _check_fits(manifest, prefix, config)
        blend = Blend.of(data_path, [manifest.num_rows for _, manifest in data_sets], seed=config.training.seed)
        return cls(tuple(data_sets), blend, config.data.seq_length)

    @property
    def samples_per_row(self) -> float:
        """Mean samples per row over the blend. Rows of a step = samples / this."""
        return mean_over([manifest.samples_per_row for _, manifest in self.data_sets], self.blend)

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that depend on the prepared rows, their weights and the seed of their order.

        They depend on the content of the files, not on their location, so a data set may be moved.
        """
        weights = self.blend.weights or (1.0,) * len(self.data_sets)
        parts = [f"{weight} {item.fingerprint}" for weight, (_, item) in zip(weights, self.data_sets, strict=True)]
        if self.blend.weights is not None:
            parts.append(Blend.ORDER)
        return hashlib.sha256("\n".join([str(self.blend.seed), *parts]).encode()).hexdigest()[:12]

    def count_rows(self, config: RunConfig, world_size: int) -> tuple[RunConfig, str | None]:
        """Return ``config`` with the batch size converted from samples to rows, and a sentence about it.

        Raises:
            ConfigError: The parallel sizes do not fit ``world_size``.
        """
        samples = config.training.global_batch_samples
        if samples is None:
            return config, None
        counted = with_rows(config, self.samples_per_row, world_size)
        rows = counted.training.global_batch_size
        said = f"a step of {samples:,} samples = {rows:,} rows of {self.samples_per_row:.2f} samples"
        plain = with_rows(config, self.samples_per_row, None).training.global_batch_size
        if rows != plain:
            held = rows * self.samples_per_row
            said += (
                f" (about {held:,.0f} samples, {held / samples - 1:+.0%}; {plain:,} rows would be nearest, but do not "
                f"divide over {world_size} ranks of this layout)"
            )
        return counted, said

    def describe(self, num_rows: int) -> list[str]:
        """Report what the data sets hold, and how often a run of ``num_rows`` rows takes each row.

        Return one line for all data sets without weights, or one line for each data set of a weighted blend.
        """
        passes = self.blend.passes(num_rows)
        if self.blend.weights is None:
            return [self._line("data", [manifest for _, manifest in self.data_sets], passes[0])]
        return [
            self._line(f"data {prefix}", [manifest], times)
            for (prefix, manifest), times in zip(self.data_sets, passes, strict=True)
        ]

    def _line(self, name: str, manifests: Sequence[Manifest], times: float) -> str:
        samples, rows = sum(item.num_samples for item in manifests), sum(item.num_rows for item in manifests)
        fill = sum(item.num_tokens for item in manifests) / max(rows * self.seq_length, 1)
        often = f"{times:,.0f}" if times >= 10 else f"{times:.1f}" if times >= 1 else f"{times:.2f}"
        held = f"{samples:,} samples in {rows:,} rows ({100 * fill:.1f} % filled)"
        return f"{name}: {held}; the run takes each row {often} times"


def _check_fits(manifest: Manifest, prefix: str, config: RunConfig) -> None:
    """Raise ConfigError for a data set of another model or row length, DataError for a damaged or empty one."""
    for key, found, expected in (
        ("model.num_bpe_tokens", manifest.num_bpe_tokens, config.model.num_bpe_tokens),
        ("model.resampler.num_queries", manifest.num_queries, config.model.resampler.num_queries),
    ):
        if found != expected:
            raise ConfigError(
                f"{prefix}: was prepared for {key} = {found}, this run has {expected}; prepare the data for this model "
                "(tools/prepare_data.py --model-preset) or change the model"
            )
    largest = SpecialTokens(manifest.num_bpe_tokens).img_pad
    if manifest.largest_token > largest:
        raise DataError(
            f"{prefix}: holds the token {manifest.largest_token}, but a vocabulary with num_bpe_tokens = "
            f"{manifest.num_bpe_tokens} ends at {largest}; prepare the data again with this model's --model-preset"
        )
    if manifest.seq_length > config.data.seq_length:
        raise ConfigError(
            f"{prefix}: has rows of up to {manifest.seq_length} tokens, but data.seq_length is "
            f"{config.data.seq_length}; give --seq-length {manifest.seq_length}, or prepare the data with shorter rows"
        )
    if manifest.packed and config.data.unpacked:
        raise ConfigError(
            f"{prefix}: holds packed rows, but data.unpacked is set; prepare it with pack: {{mode: none}}"
        )
    if not manifest.num_rows:
        raise DataError(f"{prefix}: holds no rows")
