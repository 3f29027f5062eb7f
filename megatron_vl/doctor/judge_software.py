"""Python, torch, Megatron-Core and all other packages: facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_vl.backends.versions import (
    FLASH_ATTN,
    HOPPER,
    MEGATRON_CORE,
    PYTHON,
    TORCH_LEAST,
    TORCH_TESTED,
    TRANSFORMER_ENGINE,
    dotted,
    pinned_core,
    release,
)
from megatron_vl.doctor.facts import Facts, Package
from megatron_vl.doctor.findings import Finding, missing, ok, wrong
from megatron_vl.doctor.packages import EXTRAS, REQUIRED

_INSTALL = "pip install -c constraints-cpu.txt"
_IMAGE = "use NVIDIA's PyTorch image (see Dockerfile)"


def judge_software(facts: Facts) -> list[Finding]:
    """Return the findings of all packages."""
    findings = [_python(facts), _torch(facts), _megatron_core(facts), _required(facts)]
    if facts.computes_on_cuda:
        findings.append(_compiler(facts))
    findings += [_transformer_engine(facts), _flash_attention(facts), _apex(facts)]
    return findings + [_extra(facts, extra, purposes) for extra, purposes in EXTRAS.items()]


def _python(facts: Facts) -> Finding:
    if facts.python not in PYTHON:
        return wrong("Python", dotted(facts.python), f"use a Python {PYTHON}")
    return ok("Python", dotted(facts.python))


def _torch(facts: Facts) -> Finding:
    package = facts.package("torch")
    if not package.works:
        return wrong("torch", _broken(package), f"{_INSTALL} torch=={TORCH_TESTED}; for GPUs {_IMAGE}")
    version = package.version or ""
    if release(version) < TORCH_LEAST:
        return wrong("torch", version, f"install {dotted(TORCH_LEAST)} or newer: {_INSTALL} torch=={TORCH_TESTED}")
    build = f"for CUDA {facts.torch.cuda}" if facts.torch.cuda else "CPU build"
    is_tested = version.partition("+")[0] == TORCH_TESTED
    return ok(
        "torch", f"{version}, {build}, {'the' if is_tested else f'not the pinned {TORCH_TESTED}, the'} tested version"
    )


def _megatron_core(facts: Facts) -> Finding:
    package = facts.package("megatron-core")
    pinned = pinned_core(facts.python)
    what_to_do = f"pip install megatron-core=={pinned}"
    if package.version is not None and package.version not in MEGATRON_CORE:
        return wrong("Megatron-Core", f"{package.version or 'unknown version'}, not the pinned {pinned}", what_to_do)
    if not package.works:
        torch_works = facts.package("torch").works
        return wrong(
            "Megatron-Core", _broken(package), what_to_do if torch_works else "mend torch first, then run this again"
        )
    state = "the pinned version" if package.version == pinned else f"supported; {pinned} is pinned for this Python"
    return ok("Megatron-Core", f"{package.version}, {state}")


def _required(facts: Facts) -> Finding:
    broken = {name: facts.package(name) for name in REQUIRED if not facts.package(name).works}
    if broken:
        told = "; ".join(f"{name} {_broken(package)}" for name, package in broken.items())
        return wrong("packages", told, f"{_INSTALL} {' '.join(broken)}")
    return ok("packages", ", ".join(f"{name} {facts.package(name).version}" for name in REQUIRED))


def _compiler(facts: Facts) -> Finding:
    if facts.torch.compiles:
        return ok("compiled kernels", "Triton, a C compiler and Python's headers are here")
    gives = "they would let the local backend compute activations in fused kernels instead of in steps"
    return missing("compiled kernels", "Triton, a C compiler or Python's headers are not here", gives)


def _transformer_engine(facts: Facts) -> Finding:
    name, package = "Transformer Engine", facts.package("transformer-engine")
    gives = "it would give fused layers for bf16 on CUDA (--backend transformer_engine); the local backend does without"
    if package.version is None:
        return missing(name, "not installed", gives)
    if not facts.computes_on_cuda:
        return missing(name, f"{package.version}, not used without a CUDA device", gives)
    if not package.works:
        return wrong(name, _broken(package), f"{_IMAGE}, or pip uninstall transformer-engine: it is left out as it is")
    core = facts.package("megatron-core").version
    taken = TRANSFORMER_ENGINE[core if core in MEGATRON_CORE else pinned_core(facts.python)]
    if release(package.version) not in taken:
        return wrong(name, package.version, f"install a version {taken}: Megatron-Core takes no other")
    if _is_before_hopper(facts) and not _has_flash_attention(facts):
        needs = f"a GPU before Hopper needs flash-attn {dotted(FLASH_ATTN)} for it"
        return missing(name, f"{package.version}, not used: {needs}", gives)
    return ok(name, package.version)


def _flash_attention(facts: Facts) -> Finding:
    name, package = "flash attention", facts.package("flash-attn")
    gives = "it would let Transformer Engine work on a GPU before Hopper; the local backend has torch's own"
    if package.version is None:
        return missing(name, "flash-attn is not installed", gives)
    if not package.works and facts.computes_on_cuda:
        return wrong(name, f"flash-attn {_broken(package)}", "build it for this torch, or pip uninstall flash-attn")
    if not package.works:
        return missing(name, f"flash-attn {package.version}, not used without a CUDA device", gives)
    return ok(name, f"flash-attn {package.version}")


def _has_flash_attention(facts: Facts) -> bool:
    package = facts.package("flash-attn")
    return package.works and release(package.version or "") >= FLASH_ATTN


def _is_before_hopper(facts: Facts) -> bool:
    return any(device.capability < HOPPER for device in facts.torch.devices)


def _apex(facts: Facts) -> Finding:
    package = facts.package("apex")
    gives = "it would give NVIDIA's fused optimizer where Transformer Engine is absent; torch has a fused one too"
    if package.version is None:
        return missing("Apex", "not installed", gives)
    if "apex.optimizers" in package.lacks:
        found = f"apex {package.version}".strip() + " is another package of that name, without apex.optimizers"
        return missing("Apex", found, "pip uninstall apex. NVIDIA's is built from its sources, or is in its image")
    if not facts.computes_on_cuda:
        return missing("Apex", "not used without a CUDA device", gives)
    if not package.works and not facts.package("transformer-engine").works:
        advice = (
            "build it with its CUDA extensions, or pip uninstall apex: Megatron-Core would take its optimizer and fail"
        )
        return wrong("Apex", _broken(package), advice)
    if not package.works:
        return missing("Apex", _broken(package), gives)
    return ok("Apex", package.version or "NVIDIA's, of unknown version")


def _extra(facts: Facts, extra: str, purposes: Mapping[str, str]) -> Finding:
    name = f"extra {extra}"
    lacking = {package: facts.package(package) for package in purposes if not facts.package(package).works}
    if not lacking:
        return ok(name, ", ".join(_versions(facts, purposes)))
    found = "; ".join(f"{package} {_broken(facts)}" for package, facts in lacking.items())
    gives = "; ".join(f"{package} is for {purposes[package]}" for package in lacking)
    return missing(name, found, f"{gives} ({_INSTALL} '.[{extra}]')")


def _versions(facts: Facts, names: Mapping[str, str]) -> Iterator[str]:
    for name in names:
        yield f"{name} {facts.package(name).version}".strip()


def _broken(package: Package) -> str:
    """Say why a package does not work."""
    if package.version is None and not package.error:
        return "is not installed"
    version = f"{package.version} " if package.version else ""
    return (
        f"{version}cannot be imported ({package.error})"
        if package.error
        else f"{version}lacks {' '.join(package.lacks)}"
    )
