"""Where a run writes is refused before it starts, in a line that names the key."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megatron_vl.config.outputs import check_outputs
from megatron_vl.errors import ConfigError
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize("key", ["checkpoint.save", "logging.tensorboard_dir", "logging.log_file"])
def test_a_place_under_a_file_is_refused(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").touch()
    section, field = key.split(".")
    for place in ("file/below", "file/below/it"):
        with pytest.raises(ConfigError, match=rf"^{key}: .*file.* cannot be written to \((Not a|File ex)"):
            check_outputs(tiny_config(**{section: {field: str(tmp_path / place)}}))
    check_outputs(tiny_config(**{section: {field: str(tmp_path / "new" / "place")}}))
    assert [path.name for path in tmp_path.rglob(".probe*")] == []


@pytest.mark.parametrize("place", ["save/profile", "elsewhere/deep"])
def test_a_check_leaves_no_folder_of_a_profile(tmp_path: Path, place: str) -> None:
    (tmp_path / "save").mkdir()
    chosen = {} if place == "save/profile" else {"profile_dir": str(tmp_path / place)}
    config = tiny_config(checkpoint={"save": str(tmp_path / "save")}, logging={"profile": True} | chosen)
    check_outputs(config)
    assert list(tmp_path.rglob("*")) == [tmp_path / "save"]
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    with pytest.raises(ConfigError, match=rf"^logging.profile_dir: .*{place} cannot be written to \(File exists"):
        check_outputs(config)
    (tmp_path / place).unlink()
    (tmp_path / place).mkdir()
    check_outputs(config)
    assert list((tmp_path / place).parent.iterdir()) == [tmp_path / place], "a folder that was there stays"


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        check_outputs(tiny_config(checkpoint={"save": str(tmp_path)}))


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("tensorboard_dir", "tensorboard")])
def test_a_logger_without_its_package_is_refused(
    key: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ConfigError, match=f"logging.{key} is .*, but {package} is not installed: pip install"):
        check_outputs(tiny_config(logging={key: str(tmp_path)}))
    check_outputs(tiny_config())
