"""The rooms hang together in one direction: no circle of imports, a lazy one neither."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import qkit
import qkit.kernels

ROOTS = {"qkit": Path(qkit.__file__).parent, "qkit.kernels": Path(qkit.kernels.__file__).parent}


def modules() -> dict[str, Path]:
    found = {}
    for stem, root in ROOTS.items():
        for path in (Path(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names):
            if path.suffix == ".py":
                parts = (stem, *path.relative_to(root).with_suffix("").parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of what a module imports, those for the type checker left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                stem = ".".join([*above, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node, package)


def test_no_circle_of_imports() -> None:
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        is_package = path.name == "__init__.py"
        package = name if is_package else name.rpartition(".")[0]
        named = set(imported(ast.parse(path.read_text()), package)) & known.keys()
        # A package that is named only as the place of a module is no dependency on what its __init__ offers.
        uses = {n for n in named if not any(other.startswith(n + ".") for other in named)}
        graph[name] = {n for n in uses if n != name and not name.startswith(n + ".")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert len(graph) > 90 and "qkit.storage.store" in graph["qkit.storage.local"]
