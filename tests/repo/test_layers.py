"""The rooms of cat/ and pipeline/ import each other in one direction only, as docs/guide.md draws them."""

import ast

import pytest

from tests.helpers.study import ROOT

PIPELINE = (
    {"config"},
    {"storage"},
    {"runtime", "reporting"},
    {"figures", "tracking"},
    {"stages"},
    {"scheduling", "commands"},
    {"cli"},
    {"__main__"},
)
CAT = (
    {"types", "config", "seeding"},
    {"ops", "tasks"},
    {"mixers"},
    {"model", "layer", "conversion"},
    {"evaluation"},
    {"training"},
    {"theory"},
    {"hf"},
)
SIDE_BY_SIDE = {("ops", "tasks")}
"""Pairs of rooms in one layer: the first imports the second."""


def imports(path):
    """The project modules that a file imports, late or not, but those of another type checker's branch."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if (ROOT / f"{full.replace('.', '/')}.py").is_file() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules(package):
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imports(path))
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    }


def wrong_arrows(graph, package, layers, side_by_side=frozenset()):
    """Imports from one room into another that is not below it."""
    height = {room: number for number, layer in enumerate(layers) for room in layer}
    arrows = {
        (module.split(".")[1], imported.split(".")[1])
        for module, found in graph.items()
        for imported in found
        if imported.startswith(f"{package}.")
    }
    assert {room for arrow in arrows for room in arrow} <= height.keys(), "a room that the layer rule does not know"
    return {(a, b) for a, b in arrows if a != b and height[b] >= height[a] and (a, b) not in side_by_side}


def cycle(graph):
    """The modules of an import cycle; empty where there is none."""
    done = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return []
        for imported in sorted(graph[module]):
            if found := visit(imported, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in graph)), [])


@pytest.mark.parametrize(("package", "layers"), [("cat", CAT), ("pipeline", PIPELINE)])
def test_each_room_imports_only_rooms_below_it(package, layers):
    assert wrong_arrows(modules(package), package, layers, SIDE_BY_SIDE) == set()


def test_the_rule_above_can_fail():
    graph = modules("pipeline")
    graph["pipeline.storage.runs"].add("pipeline.figures.drawing.style")
    assert wrong_arrows(graph, "pipeline", PIPELINE) == {("storage", "figures")}


def test_no_module_imports_itself_by_way_of_others():
    graph = modules("cat") | modules("pipeline")
    assert cycle(graph) == []
    graph["cat.types"].add("cat.model")
    assert cycle(graph) != []
