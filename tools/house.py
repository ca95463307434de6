"""Prints how large the package is, room by room, and what its imports and functions look like.

python tools/house.py            the tree that holds this script
python tools/house.py CHECKOUT   another one, to compare
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# The floors of docs/architecture.md, from the top: a room imports from its own floor and from lower ones.
FLOORS = (
    ("cli.py", "__main__.py", "dry_run.py", "ui.py"),
    ("stages",),
    ("training", "search", "findings", "registry", "export", "experiment"),
    ("evaluation",),
    ("tracking", "serving", "data_report", "synthetic", "report"),
    ("learning",),
    ("dataset", "metrics", "scoring"),
    ("dicom",),
)
MAX_PARAMETERS = 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A file of the package: its name with dots, its room, and what it holds."""

    name: str
    room: str
    tree: ast.Module
    lines: int

    def imports(self) -> Iterator[str]:
        """The names that it imports, with dots."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def functions(self) -> Iterator[Function]:
        """All functions and methods, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def read_modules(package: Path) -> list[Module]:
    """The modules of a package, by name."""
    modules = list[Module]()
    for path in sorted(package.rglob("*.py")):
        text, parts = path.read_text(encoding="utf-8"), path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        room = path.relative_to(package).parts[0]
        modules.append(Module(name, room, ast.parse(text), len(text.splitlines())))
    return modules


def parameters(function: Function) -> int:
    """The number of parameters of a function, without ``self`` and ``cls``."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in every) + bool(given.vararg) + bool(given.kwarg)


def imports_between(modules: list[Module]) -> dict[str, set[str]]:
    """The modules of the package that each one imports; a package's face stands for what it offers.

    That of the whole package imports none of them before a user asks for it.
    """
    names = {module.name for module in modules}
    found = dict[str, set[str]]()
    for module in modules:
        imports = module.imports() if module.room != "__init__.py" else ()
        inside = (name if name in names else name.rpartition(".")[0] for name in imports)
        found[module.name] = {name for name in inside if name in names and name != module.name}
    return found


def imports_up(modules: list[Module]) -> list[str]:
    """Imports of a higher floor."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = {module.name: module.room for module in modules}
    return [
        f"{name} imports {target}"
        for name, targets in imports_between(modules).items()
        for target in targets
        if floor.get(room[target], 99) < floor.get(room[name], -1)
    ]


def circle(graph: dict[str, set[str]]) -> str:
    """A circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def room_graph(modules: list[Module]) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    room = {module.name: module.room for module in modules}
    graph = dict[str, set[str]]()
    for name, targets in imports_between(modules).items():
        graph.setdefault(room[name], set()).update(room[target] for target in targets)
    return {name: targets - {name, "__init__.py"} for name, targets in graph.items()}


def main(root: Path) -> None:
    """Prints the table."""
    modules = read_modules(root / "pneumo_experiments")
    rooms = sorted({module.room for module in modules}, key=lambda room: (room.endswith(".py"), room))
    print(f"{'room':<20}{'files':>6}{'lines':>8}  longest function")
    for room in rooms:
        inside = [module for module in modules if module.room == room]
        longest = (
            max(
                ((f.end_lineno or 0) - f.lineno + 1, f"{m.name.rpartition('.')[2]}.{f.name}")
                for m in inside
                for f in m.functions()
            )
            if any(True for m in inside for _ in m.functions())
            else (0, "")
        )
        lines = sum(module.lines for module in inside)
        print(f"{room:<20}{len(inside):>6}{lines:>8}  {longest[0] or '':>4} {longest[1]}")
    print(f"{'package':<20}{len(modules):>6}{sum(module.lines for module in modules):>8}")
    tests = [path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")]
    print(f"{'tests':<20}{len(tests):>6}{sum(len(text.splitlines()) for text in tests):>8}")
    wide = [
        f"{module.name}.{function.name} ({count})"
        for module in modules
        for function in module.functions()
        if (count := parameters(function)) > MAX_PARAMETERS
    ]
    over_five = sum(parameters(function) > 5 for module in modules for function in module.functions())
    up, modules_circle = imports_up(modules), circle(imports_between(modules))
    print(f"\nfunctions with more than 5 parameters: {over_five}")
    print(f"functions with more than {MAX_PARAMETERS}: {len(wide)}", *wide, sep="\n  ")
    print(f"imports up: {len(up)}", *up, sep="\n  ")
    print(f"circle of modules: {modules_circle or 'none'}")
    print(f"circle of rooms: {circle(room_graph(modules)) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
