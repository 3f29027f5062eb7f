"""Folders come from anywhere: what is wrong with one is said by name, and nothing in it is executed."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vl.conversion.convert import import_folder
from megatron_vl.conversion.hf_files import FileFormat
from megatron_vl.errors import ConversionError

from .samples import GOLDEN, read_with_libraries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden folder to damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "hf"))


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    file = folder / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../pytorch_model-00001-of-00002.bin", "/etc/passwd", "..", "a\\b.bin", "", 3])
def test_index_that_points_outside(folder: Path, file: object) -> None:
    change_index(folder, lambda weight_map: weight_map.update({"transformer.wte.weight": file}))
    with pytest.raises(ConversionError, match=r"transformer\.wte\.weight is said to be in"):
        import_folder(folder)


def test_index_and_shard_disagree(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.pop("transformer.wte.weight"))
    with pytest.raises(ConversionError, match=r"00001-of-00002.bin: has the unexpected transformer.wte.weight"):
        import_folder(folder)


def test_index_names_a_file_that_is_absent(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match=r"00002-of-00002.bin: no such file"):
        import_folder(folder)


def resave(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Replace the golden shards by one safetensors or torch file without an index."""
    tensors: dict[str, object] = dict(read_with_libraries(folder))
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "transformer.ln_f.weight",
            torch.ones(255),
            r"ln_f.weight has the shape \[255\]; .*config.json makes it \[256\]",
        ),
        ("transformer.ln_f.weight", torch.ones(256, dtype=torch.int32), "ln_f.weight is torch.int32"),
        ("transformer.ln_f.weight", [1.0], "ln_f.weight is a list; expected a tensor"),
        ("transformer.visual.proj", torch.ones(256, 256).tril().T, "proj is stored transposed"),
        (
            "transformer.h.0.mlp.w1.weight",
            torch.ones(512, 256),
            "w2.weight and .*w1.weight have different types",
        ),
        ("transformer.extra", torch.ones(1), "has the unexpected transformer.extra, unlike its config.json"),
        (7, torch.ones(1), "holds the key 7"),
    ],
)
def test_wrong_contents_are_refused_by_name(folder: Path, name: str, value: object, message: str) -> None:
    resave(folder, lambda tensors: tensors.update({name: value}))
    with pytest.raises(ConversionError, match=message):
        import_folder(folder)


def test_missing_tensor(folder: Path) -> None:
    resave(folder, lambda tensors: tensors.pop("transformer.visual.ln_post.bias"))
    with pytest.raises(ConversionError, match=r"lacks transformer\.visual\.ln_post\.bias"):
        import_folder(folder)


def test_values_that_are_not_finite(folder: Path) -> None:
    bad = torch.ones(256, dtype=torch.bfloat16)
    bad[5] = float("inf")
    resave(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": bad}))
    imported = import_folder(folder)
    with pytest.raises(ConversionError, match=r"transformer.ln_f.weight has 1 values that are not finite"):
        imported["language_model.final_layernorm.weight"]


def test_views_inside_an_archive(folder: Path) -> None:
    stacked = torch.randn(3, 256, dtype=torch.float32).bfloat16()
    resave(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": stacked[1]}))
    assert torch.equal(import_folder(folder)["language_model.final_layernorm.weight"], stacked[1])


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_is_executed(folder: Path) -> None:
    resave(folder, lambda tensors: tensors.update({"transformer.ln_f.weight": Evil()}))
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: refused \(Weights only load failed"):
        import_folder(folder)


def rewrite(file: Path, *, compression: int, byteorder: bytes) -> None:
    """Write an archive again, with the bytes of its tensors as they are."""
    with zipfile.ZipFile(file) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in records.items():
            new.writestr(name, byteorder if name.endswith("/byteorder") else content)


@pytest.mark.parametrize(
    ("compression", "byteorder"), [(zipfile.ZIP_DEFLATED, b"little"), (zipfile.ZIP_STORED, b"big")]
)
def test_archives_whose_bytes_are_not_the_tensors(folder: Path, compression: int, byteorder: bytes) -> None:
    rewrite(folder / "pytorch_model-00001-of-00002.bin", compression=compression, byteorder=byteorder)
    with pytest.raises(ConversionError, match="is compressed, or was written by a big-endian machine"):
        import_folder(folder)


def test_an_archive_with_a_damaged_directory(folder: Path) -> None:
    """The end of the file says that it is an archive, and the entries that it points to are not there."""
    file = folder / "pytorch_model-00001-of-00002.bin"
    data = bytearray(file.read_bytes())
    begin = data.index(b"PK\x01\x02")
    data[begin : begin + 4] = bytes(4)
    file.write_bytes(bytes(data))
    with pytest.raises(ConversionError, match=rf"{file.name}: a damaged archive \(.*\); download it again"):
        import_folder(folder)


@pytest.mark.parametrize("other", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_weights_that_are_there_twice(folder: Path, other: str) -> None:
    """Which of them is meant, nobody knows: what other programs read first is not what was written last."""
    (folder / other).write_bytes(b"older or newer")
    with pytest.raises(ConversionError, match=f"holds weights more than once: .*{other}.*keep those that you mean"):
        import_folder(folder)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_truncated_files(folder: Path, file_format: FileFormat) -> None:
    if file_format == "safetensors":
        tensors = read_with_libraries(folder)
        for old in folder.glob("pytorch_model*"):
            old.unlink()
        save_file(tensors, folder / "model.safetensors")
        file = folder / "model.safetensors"
    else:
        file = folder / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match=rf"{file.name}: n.* download it again"):
        import_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[1]", "expected a JSON object"), ("[" * 200_000, "not JSON")]
)
def test_config_that_is_no_object(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=rf"config\.json: {message}"):
        import_folder(folder)


def test_folders_without_model(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="config.json: no such file"):
        import_folder(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(ConversionError, match="no weights; expected"):
        import_folder(tmp_path)
