"""Rates of GPUs, and the file that replaces them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vl.errors import ConfigError
from megatron_vl.planning.gpus import GPUS, MeasuredRates, find_gpu, read_rates, with_rates


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rates.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_gpu_is_faster_than_its_data_sheet() -> None:
    assert set(GPUS) == {"a100", "h100", "h200", "b200", "gb200"}
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.attention < gpu.products < gpu.peak
    assert find_gpu("h200").products == 794.5e12 and find_gpu("h200").memory == 141e9
    assert find_gpu("h100").nvlink.bandwidth == pytest.approx(360e9)
    assert find_gpu("h100").network.bandwidth == pytest.approx(36.5e9)


def test_an_unknown_gpu_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"--gpu h1000 is not known. Did you mean h100"):
        find_gpu("h1000")


def test_measured_rates_replace_published_ones(tmp_path: Path) -> None:
    rates = read_rates(written(tmp_path, '{"matmul_tflops": 700, "network_gb_per_s": 20.5, "host_ms_per_layer": 2}'))
    gpu = with_rates(find_gpu("h100"), rates)
    assert (gpu.products, gpu.network.bandwidth, gpu.host_seconds) == (700e12, 20.5e9, pytest.approx(2e-3))
    assert gpu.attention == find_gpu("h100").attention and gpu.nvlink == find_gpu("h100").nvlink
    assert gpu.network.latency == find_gpu("h100").network.latency
    assert with_rates(gpu, MeasuredRates()) == gpu


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"matmul_tflop": 700}', "unknown key 'matmul_tflop'. Did you mean matmul_tflops?"),
        ('{"matmul_tflops": 0}', "rates.json: matmul_tflops"),
        ('{"matmul_tflops": "fast"}', "rates.json: matmul_tflops"),
        ("[1]", "expected a mapping"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rates(written(tmp_path, text))
    assert said in str(caught.value)


def test_a_rack_of_gb200_is_one_nvlink_domain() -> None:
    rack = find_gpu("gb200")
    assert (rack.per_node, rack.within(64).nvlink_domain, rack.within(128).nvlink_domain) == (4, 72, 64)
    assert find_gpu("h100").within(128).nvlink_domain == 8
