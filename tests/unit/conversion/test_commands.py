"""The command line, in a process of its own: writing a checkpoint prepares the process for Megatron-Core.

One process runs all commands, since starting one costs seconds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from megatron_vl import folder_lock
from megatron_vl.checkpoint import store
from megatron_vl.cli.convert import main
from megatron_vl.conversion.convert import export_folder, import_folder

from .samples import GOLDEN, assert_same_bytes, random_state, read_with_libraries, small_model

REPOSITORY = Path(__file__).parents[3]
SCRIPT = """
import sys
from megatron_vl.cli.convert import main
for line in sys.stdin.read().splitlines():
    print("exit", main(line.split()), flush=True)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where all commands have been run; ``output`` holds what they wrote."""
    directory = tmp_path_factory.mktemp("convert")
    odd = small_model()
    odd = replace(odd, language=replace(odd.language, vocab_size=500))  # 512 rows in a checkpoint
    export_folder(random_state(odd), odd, directory / "odd")
    damaged = shutil.copytree(GOLDEN, directory / "damaged")
    (damaged / "pytorch_model-00002-of-00002.bin").unlink()
    diverged = read_with_libraries(directory / "odd")
    diverged["lm_head.weight"][7, 7] = float("nan")
    (directory / "nan").mkdir()
    save_file(diverged, directory / "nan/model.safetensors")
    shutil.copy(directory / "odd/config.json", directory / "nan")
    commands = [
        f"import {GOLDEN} ckpt",
        "check ckpt",
        "export ckpt hf --format bin --release chat --vocab-file",
        "check hf",
        "export ckpt hf",
        f"import {GOLDEN} ckpt",
        "import damaged ckpt_damaged",
        "check nowhere",
        "import nan ckpt_nan",
        "import ckpt_start --vision open_clip.bin",
        "import odd ckpt_odd",
        "export ckpt_odd/iter_0000000 hf_odd",
        "import odd ckpt_busy",
    ]
    with folder_lock.hold(directory / "ckpt_busy", store.LOCK):  # as a training does
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            input="\n".join(commands),
            cwd=directory,
            env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    (directory / "output").write_text(run.stdout)
    (directory / "errors").write_text(run.stderr)
    return directory


def test_every_command_ends_as_it_should(workplace: Path) -> None:
    lines = (workplace / "output").read_text().splitlines()
    assert [line for line in lines if line.startswith("exit")] == [
        *["exit 0"] * 4,
        *["exit 2"] * 6,
        *["exit 0"] * 2,
        "exit 2",
    ], (workplace / "errors").read_text()
    assert "parameters                                      4,284,416" in lines


def test_errors_name_the_place(workplace: Path) -> None:
    errors = [line for line in (workplace / "errors").read_text().splitlines() if line.startswith("error:")]
    assert [line.split(" ", 2)[1] for line in errors] == [
        "hf:",
        "ckpt:",
        "damaged/pytorch_model-00002-of-00002.bin:",
        "nowhere",
        "nan/model.safetensors:",
        "import",
        "ckpt_busy:",
    ]


def test_nothing_half_written_is_left(workplace: Path) -> None:
    assert {path.name for path in workplace.iterdir()} == {
        *("odd", "damaged", "nan", "ckpt", "hf", "ckpt_odd", "hf_odd", "ckpt_busy", "output", "errors"),
    }
    assert [path.name for path in (workplace / "ckpt_busy").iterdir()] == [store.LOCK]


def test_golden_through_a_checkpoint(workplace: Path, golden_tensors: dict[str, Tensor]) -> None:
    assert_same_bytes(read_with_libraries(workplace / "hf"), golden_tensors)
    config = json.loads((workplace / "hf/config.json").read_text())
    assert config == json.loads((GOLDEN / "config.json").read_text())
    assert len((workplace / "hf/qwen.tiktoken").read_text().splitlines()) == 386
    assert json.loads((workplace / "hf/tokenizer_config.json").read_text())["tokenizer_class"] == "QWenTokenizer"
    assert json.loads((workplace / "hf/generation_config.json").read_text())["chat_format"] == "chatml"


def test_vocabulary_padding_of_a_checkpoint_stays_there(workplace: Path) -> None:
    assert_same_bytes(dict(import_folder(workplace / "hf_odd")), dict(import_folder(workplace / "odd")))


@pytest.mark.parametrize(("arguments", "word"), [(["--help"], "export"), (["export", "--help"], "--reference")])
def test_help(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert word in capsys.readouterr().out
