"""What follows from packages that are absent, broken, old, or not what their name says."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.backends import versions
from megatron_vl.doctor.facts import Package, Torch
from megatron_vl.doctor.findings import Kind
from megatron_vl.doctor.judge_software import judge_software
from megatron_vl.doctor.packages import EXTRAS, REQUIRED
from tests.unit.doctor.made_up import A100, LAPTOP, NODE, only, with_packages

ROOT = Path(__file__).resolve().parents[3]
OK, MISSING, WRONG = Kind


def test_a_laptop_lacks_only_what_is_for_cuda() -> None:
    kinds = {finding.name: finding.kind for finding in judge_software(LAPTOP)}
    for_cuda = {"Transformer Engine", "flash attention", "Apex"}
    assert {name for name, kind in kinds.items() if kind == MISSING} == for_cuda and WRONG not in kinds.values()
    assert only(judge_software(LAPTOP), "torch").found == "2.13.0+cpu, CPU build, the tested version"


def test_a_node_lacks_only_flash_attention() -> None:
    findings = judge_software(NODE)
    assert [finding.name for finding in findings if finding.kind > OK] == ["flash attention"]
    assert "for CUDA 13.1, not the pinned 2.13.0" in only(findings, "torch").found


@pytest.mark.parametrize(
    ("python", "kind"), [((3, 10, 9), WRONG), ((3, 11, 0), OK), ((3, 13, 9), OK), ((3, 14, 0), WRONG)]
)
def test_python(python: tuple[int, int, int], kind: Kind) -> None:
    found = only(judge_software(replace(LAPTOP, python=python)), "Python")
    assert found.kind == kind and (kind == OK or found.advice == "use a Python from 3.11 and below 3.14")


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (Package(), "is not installed"),
        (Package("2.13.0", "OSError: libcudart.so.12"), "2.13.0 cannot be imported (OSError: libcudart.so.12)"),
        (Package("2.9.1"), "2.9.1"),
    ],
)
def test_a_torch_that_is_absent_broken_or_old_is_wrong(package: Package, said: str) -> None:
    found = only(judge_software(with_packages(LAPTOP, torch=package)), "torch")
    assert found.kind == WRONG and found.found == said and "torch==2.13.0" in found.advice


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (Package("0.17.0"), "0.17.0, not the pinned 0.16.1"),
        (Package(), "is not installed"),
        (Package("0.16.1", "ImportError: x"), "0.16.1 cannot be imported (ImportError: x)"),
    ],
)
def test_another_megatron_core_is_wrong(package: Package, said: str) -> None:
    found = only(judge_software(with_packages(LAPTOP, megatron_core=package)), "Megatron-Core")
    assert (found.kind, found.found, found.advice) == (WRONG, said, "pip install megatron-core==0.16.1")


@pytest.mark.parametrize(
    ("python", "core", "kind", "said"),
    [
        ((3, 11, 7), "0.16.1", OK, "0.16.1, the pinned version"),
        ((3, 12, 3), "0.16.1", OK, "0.16.1, supported; 0.19.2 is pinned for this Python"),
        ((3, 12, 3), "0.19.2", OK, "0.19.2, the pinned version"),
        ((3, 13, 0), "0.18.0", WRONG, "0.18.0, not the pinned 0.19.2"),
    ],
)
def test_the_pinned_megatron_core_is_that_of_the_python(
    python: tuple[int, int, int], core: str, kind: Kind, said: str
) -> None:
    facts = with_packages(replace(LAPTOP, python=python), megatron_core=Package(core))
    found = only(judge_software(facts), "Megatron-Core")
    assert (found.kind, found.found) == (kind, said)
    assert kind == OK or found.advice == "pip install megatron-core==0.19.2"


@pytest.mark.parametrize(("number", "kind"), [("2.8.1", WRONG), ("2.9", OK), ("2.12.0", OK), ("2.20.2", OK)])
def test_the_newest_megatron_core_takes_any_newer_transformer_engine(number: str, kind: Kind) -> None:
    packages = {"megatron_core": Package("0.19.2"), "transformer_engine": Package(number)}
    found = only(judge_software(with_packages(NODE, **packages)), "Transformer Engine")
    assert found.kind == kind
    assert kind == OK or found.advice == "install a version from 2.9: Megatron-Core takes no other"


def test_a_megatron_core_that_only_lacks_torch_is_not_installed_again() -> None:
    broken = Package("1", "OSError: x")
    facts = with_packages(LAPTOP, torch=broken, megatron_core=Package("0.16.1", "OSError: x"))
    assert only(judge_software(facts), "Megatron-Core").advice.startswith("mend torch first")


def test_required_packages_that_do_not_work_are_named() -> None:
    found = only(
        judge_software(with_packages(LAPTOP, numba=Package("1", "ImportError: x"), tqdm=Package())), "packages"
    )
    assert found.kind == WRONG
    assert found.found == "numba 1 cannot be imported (ImportError: x); tqdm is not installed"
    assert found.advice.endswith("numba tqdm")


@pytest.mark.parametrize(
    ("package", "kind", "said"),
    [
        (Package(), MISSING, "not installed"),
        (Package("2.11.0"), OK, "2.11.0"),
        (Package("2.9"), OK, "2.9"),
        (Package("2.8.1"), WRONG, "2.8.1"),
        (Package("2.12.0"), WRONG, "2.12.0"),
        (Package("2.11.0", "OSError: x.so"), WRONG, "2.11.0 cannot be imported (OSError: x.so)"),
    ],
)
def test_transformer_engine(package: Package, kind: Kind, said: str) -> None:
    found = only(judge_software(with_packages(NODE, transformer_engine=package)), "Transformer Engine")
    assert (found.kind, found.found) == (kind, said)
    on_a_cpu = only(judge_software(with_packages(LAPTOP, transformer_engine=package)), "Transformer Engine")
    assert on_a_cpu.kind == MISSING, "training on a CPU does without, whatever its state"


@pytest.mark.parametrize(
    ("flash", "kind"),
    [(Package(), MISSING), (Package("2.0.9"), MISSING), (Package("2.8.3"), OK), (Package("2.8.3", "x"), MISSING)],
)
def test_transformer_engine_before_hopper_needs_flash_attention(flash: Package, kind: Kind) -> None:
    facts = with_packages(replace(NODE, torch=replace(NODE.torch, devices=(A100,))), flash_attn=flash)
    assert only(judge_software(facts), "Transformer Engine").kind == kind


def test_a_flash_attention_that_is_broken_is_wrong_on_cuda_alone() -> None:
    broken = Package("2.8.3", "ImportError: undefined symbol")
    assert only(judge_software(with_packages(NODE, flash_attn=broken)), "flash attention").kind == WRONG
    assert only(judge_software(with_packages(LAPTOP, flash_attn=broken)), "flash attention").kind == MISSING


def test_an_apex_of_another_author_is_told_from_nvidias() -> None:
    facts = with_packages(NODE, apex=Package("0.9.8.dev0", lacks=("apex.optimizers",)))
    found = only(judge_software(facts), "Apex")
    assert found.kind == MISSING and found.advice.startswith("pip uninstall apex")
    assert found.found == "apex 0.9.8.dev0 is another package of that name, without apex.optimizers"


def test_an_apex_without_kernels_is_wrong_where_its_optimizer_would_be_taken() -> None:
    """Megatron-Core takes the optimizer of Transformer Engine first, then that of Apex."""
    half = Package("0.1", lacks=("amp_C",))
    assert only(judge_software(with_packages(NODE, apex=half)), "Apex").kind == MISSING
    alone = with_packages(NODE, apex=half, transformer_engine=Package())
    assert only(judge_software(alone), "Apex").kind == WRONG
    assert only(judge_software(with_packages(LAPTOP, apex=half)), "Apex").kind == MISSING


def test_compiled_kernels_are_looked_for_on_cuda() -> None:
    plain = replace(NODE, torch=replace(NODE.torch, compiles=False))
    assert only(judge_software(plain), "compiled kernels").kind == MISSING
    assert only(judge_software(NODE), "compiled kernels").kind == OK
    assert "compiled kernels" not in [finding.name for finding in judge_software(LAPTOP)]


def test_an_extra_names_what_it_lacks_and_for_what() -> None:
    facts = with_packages(LAPTOP, pypdfium2=Package(), dashscope=Package("1", lacks=("resources/qwen.tiktoken",)))
    found = only(judge_software(facts), "extra data")
    assert found.kind == MISSING
    assert found.found == "pypdfium2 is not installed; dashscope 1 lacks resources/qwen.tiktoken"
    assert "pypdfium2 is for PDF files; dashscope is for Qwen's vocabulary" in found.advice
    assert "'.[data]'" in found.advice


def test_a_torch_that_does_not_work_is_no_reason_to_stop() -> None:
    nothing = replace(LAPTOP, packages={}, torch=Torch())
    assert [finding.name for finding in judge_software(nothing) if finding.kind == WRONG] == [
        "torch", "Megatron-Core", "packages",
    ]  # fmt: skip


# --- the same as setup.py and the constraints say --------------------------------------------------------------------


def _setup() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"]
    return {keyword.arg or "": keyword.value for keyword in call.keywords}


def _names(requirements: list[str]) -> list[str]:
    """Names of packages, in order; one with a line for each Python comes once."""
    return list(dict.fromkeys(re.split(r"[\[<>=]", requirement)[0] for requirement in requirements))


def test_required_packages_and_extras_are_those_of_setup() -> None:
    required = ast.literal_eval(_setup()["install_requires"])
    assert _names(required) == ["torch", "megatron-core", *REQUIRED]
    extras = {name: _names(packages) for name, packages in ast.literal_eval(_setup()["extras_require"]).items()}
    del extras["te"], extras["dev"]
    ours = {name: [package for package in packages if package != "dashscope"] for name, packages in EXTRAS.items()}
    assert ours == extras


def test_versions_are_those_of_setup_and_constraints() -> None:
    required = ast.literal_eval(_setup()["install_requires"])
    assert f"torch>={versions.dotted(versions.TORCH_LEAST)}" in required
    (old, pythons), (new, newer) = versions.MEGATRON_CORE.items()
    assert versions.Releases(pythons.lowest, newer.limit) == versions.PYTHON and pythons.limit == newer.lowest
    before, after = "; python_version < '3.12'", "; python_version >= '3.12'"
    assert versions.dotted(newer.lowest) == "3.12"
    assert {f"megatron-core=={old}{before}", f"megatron-core=={new}{after}"} <= set(required)
    assert ast.literal_eval(_setup()["python_requires"]) == _pip(versions.PYTHON)
    engines = versions.TRANSFORMER_ENGINE
    assert ast.literal_eval(_setup()["extras_require"])["te"] == [
        f"transformer-engine[pytorch]{_pip(engines[old])}{before}",
        f"transformer-engine[pytorch]{_pip(engines[new])}{after}",
    ]
    pinned = (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").replace('"', "'").splitlines()
    expected = {f"torch=={versions.TORCH_TESTED}", f"megatron-core=={old}{before}", f"megatron-core=={new}{after}"}
    assert expected <= set(pinned)


def _pip(found: versions.Releases) -> str:
    """Releases as pip reads them."""
    return f">={versions.dotted(found.lowest)}" + (f",<{versions.dotted(found.limit)}" if found.limit else "")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.10.0a0+nv26.1", (2, 10, 0)), ("2.13.0+cpu", (2, 13, 0)), ("2", (2,)), ("", ()), ("x", ())],
)
def test_a_release_is_what_a_version_begins_with(version: str, numbers: tuple[int, ...]) -> None:
    assert versions.release(version) == numbers
