"""How the package hangs together, read from its source: nothing is imported."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fl_lightning"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

#: What runs at the server, which reaches clients through the executor alone.
SERVER = ("loop.py", "callbacks/federated_evaluation.py", "callbacks/dashboard.py", "run/results.py", "personalization")
OF_A_CLIENT = {"data", "personal", "memory"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> set[str]:
    """All that is imported anywhere: on top, within functions, and for annotations alone."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reaches_into_clients(tree: ast.AST) -> list[str]:
    """Where ``data``, ``personal`` or ``memory`` is taken from what is called a client or comes from clients."""
    names = {"client"}
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and re.search(r"\bclients\b", ast.unparse(node.iter)):
            names |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) == "Client":
            names.add(node.arg)
    owner = re.compile(rf"(.*\W)?({'|'.join(names)}|clients\[.*\])")
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in OF_A_CLIENT and owner.fullmatch(ast.unparse(node.value))
    ]


def test_no_import_circle() -> None:
    names = {module_name(path) for path in TREES}
    graph = {module_name(path): imported(tree) & names - {module_name(path)} for path, tree in TREES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # raises CycleError, with the modules of the circle


@pytest.mark.parametrize("place", SERVER)
def test_the_server_never_reaches_into_a_client(place: str) -> None:
    chosen = [path for path in TREES if path == PACKAGE / place or PACKAGE / place in path.parents]
    assert chosen
    for path in chosen:
        assert not reaches_into_clients(TREES[path]), path


@pytest.mark.parametrize(
    "code",
    [
        "client.data",
        "self.client.memory",
        "loop.clients[i].personal",
        "[one.data for one in self.clients]",
        "for one, _ in zip(clients, x): one.memory['a']",
        "def f(who: Client): return who.personal",
    ],
)
def test_what_reaches_into_a_client_is_seen(code: str) -> None:
    assert reaches_into_clients(ast.parse(code))


@pytest.mark.parametrize("code", ["client.num_train", "source.data.clients", "exam.personal", "client.database"])
def test_what_does_not_is_let_pass(code: str) -> None:
    assert not reaches_into_clients(ast.parse(code))


def test_every_public_module_has_a_docstring() -> None:
    public = {path: tree for path, tree in TREES.items() if not path.stem.startswith("_") or path.stem == "__init__"}
    assert not [str(path) for path, tree in public.items() if not ast.get_docstring(tree)]


def test_one_version_everywhere() -> None:
    root = PACKAGE.parent
    (version,) = re.findall(r'^version = "(.*)"', (root / "pyproject.toml").read_text(), re.M)
    assert re.findall(r"^version: (.*)", (root / "CITATION.cff").read_text(), re.M) == [version]
    assert re.findall(r"^## (.*)", (root / "CHANGELOG.md").read_text(), re.M)[0] == version
