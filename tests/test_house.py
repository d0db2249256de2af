"""The house rules that a tool can check: one-way imports, no cycles, size budgets, documented public names."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "u2a_fast"
KERNELS = ROOT / "kernels"  # installed as u2a_fast.kernels

# A module imports from its own part and from parts further down, never sideways or up.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"cli"}),
    frozenset({"demo"}),
    frozenset({"report", "bench"}),
    frozenset({"evaluation", "unlearning", "doctor"}),
    frozenset({"influence", "selection"}),
    frozenset({"curvature", "store"}),
    frozenset({"models"}),
    frozenset({"data"}),
    frozenset({"manifest", "testing"}),
    frozenset({"ops", "interop", "_attention_cases", "_gradient_cases", "_sketch_cases"}),
    frozenset({"_register"}),
    frozenset({"kernels"}),
    frozenset({"reference", "_check", "losses", "statistics", "files"}),
    frozenset({"sketch"}),
)
EXTENSIONS = frozenset({"_C", "_interop"})  # compiled from csrc/, below everything; absent where there is no compiler
RANK = {part: rank for rank, parts in enumerate((*LAYERS, EXTENSIONS)) for part in parts}

# A longer file or function needs a larger number here, in the same commit, with the reason beside it.
FILE_LINES = 400
FUNCTION_LINES = 60
KERNEL_FUNCTION_LINES = 120  # a Triton kernel cannot call out as freely: its phases share dozens of tiles
LONGER: dict[str, int] = {
    "reference": 450,  # one function an op, most of it its meaning in words
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def sources() -> list[Path]:
    package = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "kernels" not in path.parents]
    return package + sorted(KERNELS.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below u2a_fast; the package's own ``__init__`` is the empty name."""
    parts = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}
SOURCES = [pytest.param(path, id=name or "__init__") for name, path in MODULES.items()]


def known(name: str) -> str:
    """The longest beginning of a dotted name that is a module: the rest names something in it."""
    while name not in MODULES and name not in EXTENSIONS:
        name = name.rpartition(".")[0]
    return name


def absolute(path: Path, node: ast.ImportFrom) -> str | None:
    """Dotted name below u2a_fast that an import statement reaches, None for other packages."""
    if not node.level:
        head, _, rest = (node.module or "").partition(".")
        return rest if head == "u2a_fast" else None
    parts = module_name(path).split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def reached(path: Path, node: ast.AST) -> Iterator[str]:
    """Modules of the package that a node imports, if it is an import statement."""
    if isinstance(node, ast.ImportFrom) and (target := absolute(path, node)) is not None:
        yield from {known(f"{target}.{alias.name}".strip(".")) for alias in node.names}
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.partition(".")[0] == "u2a_fast":
                yield known(alias.name.partition(".")[2])


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it, except for type checkers alone."""
    typing_only = {
        id(child)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if id(node) not in typing_only:
            yield from reached(path, node)


def part(module: str) -> str:
    """The part of the house that a module belongs to."""
    return "files" if module == "store.files" else module.partition(".")[0]


def test_every_part_has_a_layer() -> None:
    assert {part(module) for module in MODULES if module} <= set(RANK)


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_one_way(path: Path) -> None:
    own = module_name(path)
    if not own:
        return  # the package's table of contents stands above everything
    for target in imports(path):
        if target == "":
            assert part(own) in {"cli", "demo", "report", "doctor", "manifest"}, (
                f"{own} imports the package's own table of contents"
            )
        elif part(target) != part(own):
            assert RANK[part(target)] > RANK[part(own)], f"{own} imports {target}, which is not below it"


def test_no_import_cycles() -> None:
    graph = {own: set(imports(path)) - {own} for own, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_a_cycle_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("path", SOURCES)
def test_own_modules_are_imported_at_the_top(path: Path) -> None:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    hidden = {name for function in functions for node in ast.walk(function) for name in reached(path, node)}
    assert hidden <= EXTENSIONS  # only what may be absent is imported where it is used


@pytest.mark.parametrize("path", SOURCES)
def test_sizes(path: Path) -> None:
    name = module_name(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(name, FILE_LINES)
    budget = KERNEL_FUNCTION_LINES if part(name) == "kernels" else FUNCTION_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = code_lines(node)
            assert lines <= LONGER.get(f"{name}.{node.name}", budget), f"{name}.{node.name} has {lines} lines"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, signature and docstring apart: saying more about a function must not cost budget."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.*")), ids=lambda path: path.name)
def test_sizes_of_cpp_files(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(path.name, FILE_LINES)


def exported(module: ast.Module) -> set[str]:
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def undocumented(path: Path) -> list[str]:
    """Exported functions and classes, and the latter's public methods, that say nothing about themselves."""
    module, found = tree(path), []
    names = exported(module)
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in names:
            continue
        members = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
        found += [
            f"{node.name}.{member.name}" if member is not node else node.name
            for member in members
            if isinstance(member, ast.FunctionDef | ast.ClassDef)
            and not member.name.startswith("_")
            and ast.get_docstring(member) is None
            and not (
                isinstance(node, ast.ClassDef) and node.bases and member is not node
            )  # an override inherits its text
        ]
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_public_names_are_documented(path: Path) -> None:
    assert path.stat().st_size == 0 or ast.get_docstring(tree(path)), f"{path.name} says nothing about itself"
    assert undocumented(path) == []
