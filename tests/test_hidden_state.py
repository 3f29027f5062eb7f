"""Nothing of the package changes behind a caller's back: no variable of a module or a class, and only known caches.

A table (a dictionary with entries) may stand in a module or a class as long as nobody changes it. A function may keep
its results if docs/architecture.md names it in its table of states.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

import pytest

from tests.test_architecture import PACKAGE, PACKAGE_MODULES, ROOT, Module

UNCHANGEABLE = {
    "TypeVar", "frozenset", "tuple", "range", "get_args", "re.compile", "struct.Struct", "Path", "Fraction",
    "MappingProxyType",
}  # fmt: skip
"""What may be called for a variable; also our frozen classes, and ``str.maketrans``, which makes a table."""
OF_RECORDS = {"field", "dataclasses.field"}
CHANGES = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update",
    "__setitem__", "__delitem__",
}  # fmt: skip
CACHES = {"cache", "lru_cache", "functools.cache", "functools.lru_cache"}


def statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """What runs at import: statements of a module and of its classes, also below ``if``, ``try``, ``with``, ``for``."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for block in ("body", "orelse", "finalbody", "handlers"):
                yield from statements(getattr(node, block, []))


def variables(module: Module) -> Iterator[tuple[str, ast.expr, int]]:
    """Names, values and lines of the variables of a module and of its classes."""
    for node in statements(module.tree.body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield ast.unparse(target), node.value, node.lineno


def is_table(value: ast.expr) -> bool:
    filled = isinstance(value, ast.Dict) and bool(value.keys)
    return filled or isinstance(value, ast.DictComp) or called(value) == "str.maketrans"


def called(value: ast.AST) -> str | None:
    """``a.b`` of ``a.b(...)``."""
    return ast.unparse(value.func) if isinstance(value, ast.Call) else None


def frozen_classes() -> set[str]:
    """Names of the package's classes whose objects do not change."""
    found = set()
    for module in PACKAGE_MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                made = any("frozen=True" in ast.unparse(item) for item in node.decorator_list)
                if made or any(ast.unparse(base) == "NamedTuple" for base in node.bases):
                    found.add(node.name)
    return found


def changeable(module: Module, frozen: set[str]) -> Iterator[str]:
    """Variables that are made to be changed, and what is declared ``global``."""
    for name, value, line in variables(module):
        made = called(value)
        literal = isinstance(value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.SetComp) and not is_table(value)
        if literal or (made and not is_table(value) and made not in UNCHANGEABLE | OF_RECORDS | frozen):
            yield f"{module.where}:{line}: {name} can be changed"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{module.where}:{node.lineno}: global {', '.join(node.names)}"


def changed(module: Module, tables: set[str]) -> Iterator[str]:
    """Changes of tables, the module's own or another's, and of variables of other modules of the package.

    ``tables``: absolute names, ``megatron_vl.a.b.TABLE``. A table of a class counts under its name in whatever object.
    """
    imported = {name.rpartition(".")[2]: name for name, _ in module.imports() if name.startswith(PACKAGE)}
    modules = {short for short, name in imported.items() if (ROOT / (name.replace(".", "/") + ".py")).exists()}
    own = {short for short, name in imported.items() if name in tables}
    own |= {name.rpartition(".")[2] for name in tables if name.rpartition(".")[0] == module.name}
    attributes = {name.rpartition(".")[2] for name in tables}

    def is_shared(target: ast.expr) -> bool:
        while isinstance(target, ast.Subscript):
            target = target.value
        return (isinstance(target, ast.Name) and target.id in own) or (
            isinstance(target, ast.Attribute) and target.attr in attributes
        )

    for node in ast.walk(module.tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if isinstance(node, ast.AugAssign):
            targets = [node.target]
            wrong = is_shared(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            targets = [node.func.value]
            wrong = is_shared(node.func.value)
        else:
            wrong = any(isinstance(target, ast.Subscript) and is_shared(target) for target in targets)
        wrong |= any(
            isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in modules
            for target in targets
            if not isinstance(node, ast.Call)
        )
        if wrong:
            yield f"{module.where}:{node.lineno}: changes {ast.unparse(targets[0])}"


def table_names(module: Module) -> set[str]:
    return {f"{module.name}.{name}" for name, value, _ in variables(module) if is_table(value)}


def caches(module: Module) -> Iterator[str]:
    """``module.function`` for each function that keeps its results, however it is made to."""
    for node in module.functions:
        if any((called(item) or ast.unparse(item)) in CACHES for item in node.decorator_list):
            yield f"{module.path.stem}.{node.name}"
    for node in ast.walk(module.tree):
        # lru_cache(...)(f) and cache(f): a decorator alone is no call of these two kinds.
        inner = node.func if isinstance(node, ast.Call) else None
        if inner is not None and (called(inner) in CACHES or (ast.unparse(inner) in CACHES and node.args)):
            yield f"{module.path.stem}:{node.lineno}"


def test_no_variable_can_be_changed() -> None:
    frozen = frozen_classes()
    wrong = [text for module in PACKAGE_MODULES for text in changeable(module, frozen)]
    assert not wrong, "\n".join(wrong)


def test_nobody_changes_a_table() -> None:
    tables = {name for module in PACKAGE_MODULES for name in table_names(module)}
    wrong = [text for module in PACKAGE_MODULES for text in changed(module, tables)]
    assert len(tables) > 20 and not wrong, "\n".join(wrong)


def test_the_documentation_names_every_cache() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| for each process, cache of (.*?)\|", text, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    assert sorted(named) == sorted(name for module in PACKAGE_MODULES for name in caches(module))


@pytest.mark.parametrize(
    "code",
    [
        "_SEEN = {}",
        "_SEEN: dict[str, int] = {}",
        "_SEEN = []",
        "_SEEN = {word for word in 'abc'}",
        "if True:\n    _SEEN = []",
        "try:\n    import x\nexcept ImportError:\n    _SEEN = set()",
        "_SEEN = defaultdict(list)",
        "_SEEN = collections.OrderedDict()",
        "_SEEN = WeakKeyDictionary()",
        "_SEEN = Window()",
        "_SEEN = iter('abc')",
        "class A:\n    seen = []",
        "class A:\n    seen: dict[str, int] = {}",
        "def f():\n    global _SEEN\n    _SEEN = 3",
        "T = {'a': 1}\ndef f(x):\n    T[x] = 1",
        "T = {'a': {}}\ndef f(x):\n    T['a'][x] = 1",
        "T = {'a': []}\ndef f(x):\n    T['a'].append(x)",
        "T = {'a': 1}\ndef f(x):\n    del T[x]",
        "T = {'a': 1}\ndef f(x):\n    T.update(x)",
        "T = {'a': 1}\nT |= {'b': 2}",
        "T = {'a': 1}\ndef f(x):\n    T['a'] += x",
        "class A:\n    T = {'a': 1}\n    def f(self, x):\n        self.T[x] = 1",
        "from megatron_vl.config.presets import PRESETS\nPRESETS['mine'] = 1",
        "from megatron_vl.config import presets\npresets.PRESETS.pop('tiny')",
        "from megatron_vl.config import presets\npresets.TINY = None",
        "@functools.lru_cache(maxsize=4)\ndef f(x):\n    return open(x)",
        "@cache\ndef f(x):\n    return open(x)",
        "_open = lru_cache(maxsize=None)(open)",
        "_open = functools.cache(open)",
    ],
)
def test_hidden_state_is_found(code: str) -> None:
    tables = {name for module in PACKAGE_MODULES for name in table_names(module)}
    module = Module(ROOT / PACKAGE / "example.py")
    vars(module)["tree"] = ast.parse(code)
    found = [*changeable(module, {"Frozen"}), *changed(module, tables | table_names(module)), *caches(module)]
    assert found


@pytest.mark.parametrize(
    "code",
    [
        "T = {'a': 1}\ndef f(x):\n    return T[x]",
        "WORD = re.compile('a')\nNONE = Frozen()",
        "def f():\n    seen = {}\n    seen['a'] = []\n    return seen",
        "@dataclass\nclass A:\n    seen: dict[str, int] = field(default_factory=dict)\n"
        "    def add(self, x):\n        self.seen[x] = 1",
        "@cached_property\ndef f(self):\n    return 1",
    ],
)
def test_what_nobody_shares_is_not_found(code: str) -> None:
    module = Module(ROOT / PACKAGE / "example.py")
    vars(module)["tree"] = ast.parse(code)
    assert not [*changeable(module, {"Frozen"}), *changed(module, table_names(module)), *caches(module)]
