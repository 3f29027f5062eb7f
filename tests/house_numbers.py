"""Figures of the source tree: ``python tests/house_numbers.py [FOLDER]`` prints them (default: of this checkout).

They show where the code grows. Most are no rules; ``test_architecture.py`` holds those.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "megatron_vl"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted name."""
    trees = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def spread(values: list[int]) -> str:
    """Return the median, the 90th percentile and the largest value."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):g} / {ordered[int(0.9 * len(ordered))]} / {ordered[-1]}"


def functions(trees: dict[str, ast.Module]) -> list[Function]:
    """Return all functions, methods and nested functions."""
    return [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]


def share_with_one_use(trees: dict[str, ast.Module]) -> str:
    """Private functions of a module that the module names once beside their definition."""
    once = total = 0
    for tree in trees.values():
        used = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        private = [node.name for node in tree.body if isinstance(node, Function) and node.name.startswith("_")]
        total += len(private)
        once += sum(used[name] == 1 for name in private)
    return f"{once} of {total} ({once / total:.0%})"


def arrows(trees: dict[str, ast.Module], root: Path) -> set[tuple[str, str]]:
    """Pairs of folders of which the first imports from the second."""

    def folder(name: str) -> str:
        return name if (root / Path(*name.split("."))).is_dir() else name.rpartition(".")[0]

    found = set()
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add((folder(name), folder(full if full in trees else node.module)))
    return {(one, other) for one, other in found if one != other}


def cycles(pairs: set[tuple[str, str]]) -> str:
    """Return one cycle between folders, or 0."""
    graph: dict[str, set[str]] = {}
    for one, other in pairs:
        graph.setdefault(one, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return "0"


def sentences(trees: dict[str, ast.Module]) -> list[int]:
    """Words of each sentence of the docstrings of modules."""
    texts = [re.sub(r"\n {4}.*", "", ast.get_docstring(tree) or "") for tree in trees.values()]
    counts = [len(part.split()) for text in texts for part in re.split(r"(?<=[.?!])\s+|\n\n", text)]
    return [count for count in counts if count > 2]


def places(root: Path, pattern: str) -> str:
    """Return how many files of the package have a line that matches, and which."""
    files = [path for path in sorted((root / PACKAGE).rglob("*.py")) if re.search(pattern, path.read_text("utf-8"))]
    return f"{len(files)}: {', '.join(str(path.relative_to(root / PACKAGE)) for path in files)}"


def figures(root: Path) -> Iterator[tuple[str, str]]:
    """Yield names and values."""
    trees = modules(root)
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in (root / PACKAGE).rglob("*.py")]
    yield "lines of the package", str(sum(lines))
    yield "files; lines, median / p90 / largest", f"{len(lines)}; {spread(lines)}"
    sizes = [(node.end_lineno or 0) - node.lineno + 1 for node in functions(trees)]
    yield "functions; lines, median / p90 / largest", f"{len(sizes)}; {spread(sizes)}"
    yield "private functions with one use", share_with_one_use(trees)
    rooms = Counter(str(path.parent.relative_to(root / PACKAGE)) for path in (root / PACKAGE).rglob("*.py"))
    yield "folders; files, median / p90 / largest", f"{len(rooms)}; {spread(list(rooms.values()))}"
    pairs = arrows(trees, root)
    yield "imports between folders", str(len(pairs))
    yield "a cycle between folders", cycles(pairs)
    words = sentences(trees)
    long = sum(count > 30 for count in words)
    yield "words in a sentence of module docstrings, mean; above 30", f"{statistics.mean(words):.1f}; {long}"
    yield "files that look for a near name", places(root, r"get_close_matches")
    replace = r"os\.replace|\.replace\(\w*(path|target|file)\w*\)|os\.rename|\.rename\("
    yield "files that replace a file", places(root, replace)


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent):
        print(f"{name:58} {value}")
