"""The rules of the house that a program can check, from the syntax tree; CONTRIBUTING.md states them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_vl"

ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "files"),
    ("launch", "folder_lock", "machine_errors", "addresses"),
    ("log",),
    ("config",),
    ("planning",),
    ("data", "backends"),
    ("parallel",),
    ("model",),
    ("checkpoint",),
    ("training", "conversion"),
    ("generation",),
    ("evaluation",),
    ("report",),
    ("inspector", "doctor", "rehearsal"),
    ("cli",),
)
"""A package may import what stands in a line above its own, and itself."""
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line}

ROOMS: tuple[tuple[str, ...], ...] = (
    ("remote",),
    ("sample", "file_kinds"),
    ("images", "prompting", "formats", "dataset"),
    ("filters", "sources", "loading", "synthetic"),
    ("prepare",),
)
"""The rooms of ``data``, by the same rule."""

MAX_FILE, MAX_FUNCTION, USUAL_FUNCTION, MAX_PARAMETERS = 400, 80, 50, 5


@dataclass(frozen=True)
class Module:
    """One Python file and its syntax tree."""

    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def imports(self, tree: ast.AST | None = None) -> Iterator[tuple[str, int]]:
        """Absolute names of what is imported anywhere in the file, with lines; ``from a import b`` gives a.b."""
        for node in ast.walk(tree or self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = ".".join(filter(None, (package if node.level else "", node.module)))
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def modules(*folders: str) -> list[Module]:
    return [Module(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


PACKAGE_MODULES = modules(PACKAGE)
OWN_FILES = modules(PACKAGE, "tools", "examples", "benchmarks", "tests")


def package_of(name: str) -> str | None:
    """``megatron_vl.data.images.decode`` -> ``data``."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def test_every_package_has_a_rank() -> None:
    assert {package_of(module.name) for module in PACKAGE_MODULES} - {None} <= set(RANK)


def test_imports_go_down_the_ranks() -> None:
    wrong = []
    for module in PACKAGE_MODULES:
        own = package_of(module.name)
        for name, line in module.imports():
            other = package_of(name)
            if own and other in RANK and other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{module.where}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_imports_of_the_data_rooms_go_down_their_ranks() -> None:
    rank = {name: rank for rank, line in enumerate(ROOMS) for name in line}
    wrong = []
    for module in modules(f"{PACKAGE}/data"):
        if module.name == f"{PACKAGE}.data":
            continue
        own = module.name.split(".")[2]
        assert own in rank, f"{module.where}: a room without a rank"
        for name, line in module.imports():
            parts = name.split(".")
            other = parts[2] if parts[:2] == [PACKAGE, "data"] else own
            if other != own and rank[other] >= rank[own]:
                wrong.append(f"{module.where}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_folders_import_each_other_without_cycles() -> None:
    """A folder and the folders in it are folders of their own."""
    names = {module.name for module in PACKAGE_MODULES}
    graph: dict[str, set[str]] = {}
    for module in PACKAGE_MODULES:
        own = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
        for name, _ in module.imports():
            found = name if name in names else name.rpartition(".")[0]
            if found in names and found.startswith(PACKAGE):
                is_package = (ROOT / Path(*found.split("."))).is_dir()
                folder = found if is_package else found.rpartition(".")[0]
                if folder != own:
                    graph.setdefault(own, set()).add(folder)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_package_imports_nothing_that_sits_on_top_of_it() -> None:
    above = {"tools", "examples", "benchmarks", "tests"}
    wrong = [
        f"{module.where}:{line}: {name}"
        for module in PACKAGE_MODULES
        for name, line in module.imports()
        if name.split(".")[0] in above
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_without_cycles() -> None:
    names = {module.name for module in PACKAGE_MODULES}
    graph: dict[str, set[str]] = {}
    for module in PACKAGE_MODULES:
        found = {name if name in names else name.rpartition(".")[0] for name, _ in module.imports()}
        graph[module.name] = (found & names) - {module.name, PACKAGE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_short() -> None:
    lines = {module.where: len(module.path.read_text(encoding="utf-8").splitlines()) for module in OWN_FILES}
    assert {name: count for name, count in lines.items() if count > MAX_FILE} == {}


def test_functions_are_short() -> None:
    sizes = {
        f"{module.where}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules(PACKAGE, "tools", "benchmarks")
        for node in module.functions
    }
    long = {name: size for name, size in sizes.items() if size > USUAL_FUNCTION}
    assert {name: size for name, size in long.items() if size > MAX_FUNCTION} == {}
    assert len(long) <= 0.05 * len(sizes), long


def test_functions_have_few_parameters() -> None:
    wrong = []
    for module in modules(PACKAGE, "tools", "benchmarks"):
        for node in module.functions:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
            if count > MAX_PARAMETERS and not _overrides_foreign_signature(module, node):
                wrong.append(f"{module.where}:{node.lineno}: {node.name} has {count} parameters")
    assert not wrong, "\n".join(wrong)


def _overrides_foreign_signature(module: Module, function: ast.AST) -> bool:
    """A method of a class with a base that is not ours may have to take what the base's callers give."""
    foreign = {name.rpartition(".")[2] for name, _ in module.imports() if package_of(name) is None}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and function in node.body:
            roots = {base.id for base in map(_root, node.bases) if base is not None}
            return bool(roots & foreign)
    return False


def _root(node: ast.AST) -> ast.Name | None:
    """``a`` of ``a.b.c``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node if isinstance(node, ast.Name) else None


def test_no_junk_drawer() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [module.where for module in PACKAGE_MODULES if module.path.stem in drawers] == []


def test_print_only_in_log() -> None:
    wrong = [
        f"{module.where}:{node.lineno}"
        for module in modules(PACKAGE, "tools")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        and module.name != f"{PACKAGE}.log"
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        # The CPU platform patches how groups are made; nobody but the topology asks for one.
        (r"(^|\.)parallel_state(\.|$)", ("parallel/topology.py", "backends/cpu.py")),
        (r"(^|\.)transformer_engine(\.|$)", ("backends/te.py",)),  # presence.py asks by name
        (r"^(fsspec|s3fs)(\.|$)", ()),  # remote/store.py asks by name, where there is an address
    ],
)
def test_imported_in_few_places_only(pattern: str, homes: tuple[str, ...]) -> None:
    places = {f"{PACKAGE}/{home}" for home in homes}
    wrong = [
        f"{module.where}:{line}: {name}"
        for module in PACKAGE_MODULES
        for name, line in module.imports()
        if re.search(pattern, name) and not name.startswith(PACKAGE) and module.where not in places
    ]
    assert not wrong, "\n".join(wrong)


def test_foreign_modules_are_patched_in_three_rooms_only() -> None:
    rooms = {f"{PACKAGE}/backends/{name}.py" for name in ("core", "cpu", "safe_metadata")}
    wrong = []
    for module in PACKAGE_MODULES:
        foreign = {name.rpartition(".")[2] for name, _ in module.imports() if package_of(name) is None}
        foreign |= {name.split(".")[0] for name, _ in module.imports() if package_of(name) is None}
        for node in ast.walk(module.tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                targets = node.args[:1]
            for target in targets:
                root = _root(target)
                changed = isinstance(target, ast.Attribute) or isinstance(node, ast.Call)
                if changed and root is not None and root.id in foreign and module.where not in rooms:
                    wrong.append(f"{module.where}:{node.lineno}: changes {ast.unparse(target)}")
    assert not wrong, "\n".join(wrong)


def test_files_are_renamed_synchronized_and_hashed_in_one_module_only() -> None:
    calls = ("os.replace", "os.rename", "os.fsync", "hashlib.file_digest", "tempfile.mkstemp")
    wrong = [
        f"{module.where}:{node.lineno}: {ast.unparse(node)}"
        for module in PACKAGE_MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in calls or node.attr in ("rename", "fsync"))
        if module.name != f"{PACKAGE}.files"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_no_place_for_settings() -> None:
    # What the launcher says, and what a child process is given.
    homes = {f"{PACKAGE}.{name}" for name in ("launch", "data.loading.decode_workers", "cli.quickstart.runner")}
    wrong = [
        f"{module.where}:{node.lineno}"
        for module in PACKAGE_MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and module.name not in homes
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_to_do() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "Not" + "ImplementedError")))
    files = [*(module.path for module in OWN_FILES), *(ROOT / "examples").rglob("*.sh"), *(ROOT / "tests").glob("*.sh")]
    wrong = [str(path.relative_to(ROOT)) for path in files if words.search(path.read_text(encoding="utf-8"))]
    assert not wrong, wrong


def test_the_tree_in_the_readme_exists() -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is the first thing that a newcomer reads"
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if block.startswith(f"{PACKAGE}/")]
    assert len(trees) == 1, f"README.md needs one fenced block that begins with {PACKAGE}/"
    missing = [str(path) for path in tree_paths(trees[0]) if not (ROOT / path).exists()]
    assert not missing, missing


def tree_paths(block: str) -> Iterator[Path]:
    """Paths of an indented tree: the first word of each line, below the last line with less indentation."""
    parents: list[tuple[int, Path]] = []
    for line in filter(str.strip, block.splitlines()):
        word = re.sub(r"[│├└─]", " ", line).split()[0]
        indent = line.index(word)
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = (parents[-1][1] if parents else Path()) / word
        parents.append((indent, path))
        yield path


def test_tree_paths() -> None:
    block = "a/      text\n  b/    more words\n    c.py\n  d.py\ne/\n"
    assert [str(path) for path in tree_paths(block)] == ["a", "a/b", "a/b/c.py", "a/d.py", "e"]


def imported_by(code: str, *argv: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after ``code`` has run in a process of its own."""
    report = "\nimport sys; sys.stderr.write('MODULES ' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    guarded = f"try:\n{_indent(code)}\nexcept SystemExit: pass{report}"
    done = subprocess.run(
        [sys.executable, "-c", guarded, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stderr.rpartition("MODULES ")[2].split())


def _indent(code: str) -> str:
    return "\n".join("    " + line for line in code.splitlines())


def test_configuration_and_planning_need_no_torch() -> None:
    names = [module.name for module in PACKAGE_MODULES]
    low = [name for name in names if RANK[package_of(name) or "cli"] <= RANK["planning"]]
    assert f"{PACKAGE}.config.load" in low and f"{PACKAGE}.planning.layout" in low
    assert not imported_by("\n".join(f"import {name}" for name in low)) & {"torch", "megatron"}


def test_a_training_step_needs_torch_core_numpy_and_yaml_only() -> None:
    """What a GPU machine without the rest of the environment can run: the model, its step and its checkpoints."""
    absent = ("PIL", "numba", "tiktoken", "safetensors", "psutil", "tqdm", "transformers", "pyarrow")
    hidden = "\n".join(f"sys.modules[{name!r}] = None" for name in absent)
    names = ("training.step", "training.parallel_model", "backends.platform", "checkpoint.contents", "config.load")
    code = f"import sys\n{hidden}\n" + "\n".join(f"import {PACKAGE}.{name}" for name in names)
    assert "torch" in imported_by(code)


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_help_needs_no_torch(tool: str) -> None:
    code = f"import runpy, sys; sys.argv = ['tools/{tool}', '--help']; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert not imported_by(code) & {"torch", "megatron"}
