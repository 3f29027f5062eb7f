"""Which versions of Megatron-Core are supported, and which one a Python gets."""

from __future__ import annotations

import pytest

from megatron_vl.backends import platform, versions
from megatron_vl.backends.versions import Releases, pinned_core
from megatron_vl.errors import ConfigError


@pytest.mark.parametrize(
    ("python", "core"),
    [((3, 9), "0.16.1"), ((3, 11), "0.16.1"), ((3, 12), "0.19.2"), ((3, 13, 5), "0.19.2"), ((3, 14), "0.19.2")],
)
def test_every_python_has_a_pinned_version(python: tuple[int, ...], core: str) -> None:
    assert pinned_core(python) == core


def test_each_version_says_which_transformer_engine_it_takes() -> None:
    assert versions.TRANSFORMER_ENGINE.keys() == versions.MEGATRON_CORE.keys()


def test_releases_begin_with_the_first_and_end_before_the_limit() -> None:
    bounded, open_ended = Releases((2, 9), (2, 12)), Releases((2, 9))
    assert [found in bounded for found in ((2, 8, 9), (2, 9), (2, 11, 7), (2, 12))] == [False, True, True, False]
    assert (3, 0) in open_ended and (2, 8) not in open_ended
    assert (str(bounded), str(open_ended)) == ("from 2.9 and below 2.12", "from 2.9")


def test_another_version_is_refused_before_anything_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    for room in (platform.presence, platform.cpu, platform.core):
        name = "hide_unusable_packages" if room is platform.presence else "install"
        monkeypatch.setattr(room, name, lambda room=room: replaced.append(room))
    monkeypatch.setattr(versions, "version", lambda _: "0.17.0")
    monkeypatch.setattr(versions.sys, "version_info", (3, 13, 0))
    wanted = r"megatron-core 0\.17\.0 is installed, expected 0\.16\.1 or 0\.19\.2: pip install megatron-core==0\.19\.2"
    with pytest.raises(ConfigError, match=wanted):
        platform.prepare_process()
    assert not replaced
    monkeypatch.setattr(versions, "version", lambda _: "0.16.1")
    platform.prepare_process()
    assert replaced == [platform.presence, platform.cpu, platform.core]
