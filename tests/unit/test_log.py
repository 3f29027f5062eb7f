"""Rank 0 speaks for all; results go to standard output and the rest to standard error."""

from __future__ import annotations

import logging
import warnings

import pytest

from megatron_vl import log


@pytest.mark.parametrize(("rank", "expected"), [("0", True), ("1", False)])
def test_log_rank_0(
    rank: str, expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    log.setup_logging()
    log.log_rank_0("for all")
    logging.getLogger("megatron_vl.data").warning("of this rank")
    found = capsys.readouterr()
    assert ("for all" in found.err) == expected
    assert found.err.count("of this rank") == 1 and not found.out
    assert ("[rank 1]" in found.err) == (rank == "1")


def test_setup_twice_logs_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    log.setup_logging()
    log.setup_logging()
    log.log_rank_0("once")
    assert capsys.readouterr().err.count("once") == 1


def test_write_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.write_line("result")
    log.write_line("problem", error=True)
    assert capsys.readouterr() == ("result\n", "problem\n")


@pytest.mark.parametrize(
    ("category", "module", "heard"),
    [
        (FutureWarning, "torch.distributed.c10d_logger", False),
        (FutureWarning, "megatron.core.dist_checkpointing.strategies.torch", False),
        (UserWarning, "megatron.core.optimizer", False),
        (UserWarning, "torch.optim", True),
        (RuntimeWarning, "megatron.core.optimizer", True),
        (FutureWarning, "megatron_vl.training.step", True),
        (FutureWarning, "torchvision.io", True),
    ],
)
def test_only_what_dependencies_say_to_their_authors_is_silenced(
    category: type[Warning], module: str, heard: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.silence_dependency_warnings()
        warnings.warn_explicit("message", category, "file.py", 1, module=module)
    assert bool(caught) is heard


@pytest.mark.parametrize(
    ("name", "message", "heard"),
    [
        ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated and will be removed", False),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated", False),
        ("megatron.core.dist_checkpointing.strategies.torch", "the disk is full", True),
        ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided with", False),
        ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='/usr/local'", False),
        ("megatron.core.optimizer", "Adam is deprecated", True),
    ],
)
def test_what_dependencies_log_for_their_authors_is_silenced(
    caplog: pytest.LogCaptureFixture, name: str, message: str, heard: bool
) -> None:
    log.silence_dependency_warnings()
    log.silence_dependency_warnings()
    logging.getLogger(name).warning(message)
    assert bool(caplog.records) is heard


@pytest.mark.parametrize(
    "message",
    [
        "barrier(): using the device under current context. You can specify",
        "The argument order of load has been changed. Please check the document to avoid future breakages.",
        "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    ],
)
def test_what_torch_says_of_megatron_core_s_calls_is_silenced(message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.silence_dependency_warnings()
        warnings.warn(message, UserWarning, stacklevel=1)
    assert not caught
