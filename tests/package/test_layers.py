"""Architecture: imports go down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rnncore

ROOT = Path(rnncore.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("_types", "_compat", "_pallas", "_lengths", "_products", "_arguments", "initializers"),
    ("cells",),
    ("recurrence",),
    ("kernels",),
    ("sequence",),
    ("layers",),
    ("flax_modules",),
    ("flax_recording",),
    ("linen", "nnx", "online", "parallel", "training", "gpu"),
    ("analysis",),
    ("_command",),
    ("__main__",),
)
ABOVE = ("analysis", "_command", "__main__")  # Nothing of the package imports these, so they may import its front.
FREE_WITHIN = (0,)  # The lowest floor is small leaves; it only must not go round in a circle.
SHARED_BY_CELLS = ("base", "diagonals", "pointwise", "recurrent_kernels", "reductions", "structured_kernels", "lstm")
SHARED_BY_KERNELS = ("cache", "compiler", "emit", "ffi", "host", "kernel_body", "op_lowerings")
DRAW = ("rnncore.analysis.plots", "rnncore._command.bench")
FLAX = ("linen", "nnx", "_command")


def module_name(path: Path) -> str:
    parts = ["rnncore", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Full names of all modules that a module imports, inside functions too."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            # `from rnncore import pointwise` imports a module, `from rnncore.cells import LSTM` a name.
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {n if n in FILES else source for n in inner}
    return found


def part(name: str) -> str:
    """`cells` of rnncore.cells.lstm."""
    return name.split(".")[1]


def floor(name: str) -> int:
    places = [n for n, parts in enumerate(FLOORS) if part(name) in parts]
    assert places, f"{name} stands on no floor: add it to FLOORS"
    return places[0]


def edges() -> list[tuple[str, str]]:
    """(importer, imported) inside rnncore, without its own __init__."""
    return [(a, b) for a in FILES if a != "rnncore" for b in sorted(imports(a)) if b.startswith("rnncore.")]


def test_the_files_are_found():
    assert {"rnncore", "rnncore.cells.lstm", "rnncore.recurrence.scan", "rnncore.sequence"} <= FILES.keys()
    assert ("rnncore.cells.lstm", "rnncore.cells.base") in edges()
    assert ("rnncore.sequence.call", "rnncore.sequence.backends") in edges()
    assert "jax.numpy" in imports("rnncore._lengths")


def test_every_part_stands_on_one_floor_and_every_floor_has_parts():
    parts = sorted(part for parts in FLOORS for part in parts)
    assert parts == sorted({part(n) for n in FILES if n != "rnncore"})


def test_imports_go_down():
    wrong = [(a, b) for a, b in edges() if floor(b) > floor(a)]
    assert not wrong


def test_equal_floors_do_not_import_each_other():
    wrong = [(a, b) for a, b in edges() if floor(a) == floor(b) and part(a) != part(b) and floor(a) not in FREE_WITHIN]
    assert not wrong


def test_no_module_imports_rnncore_itself():
    """Through the package's own __init__ anything may be reached, upwards too."""
    wrong = [a for a in FILES if a != "rnncore" and "rnncore" in imports(a) and part(a) not in ABOVE]
    assert not wrong


def test_no_imports_in_a_circle():
    below: dict[str, set[str]] = {name: set() for name in FILES}
    for a, b in edges():
        below[a].add(b)
    order: list[str] = []
    while len(order) < len(FILES):
        free = [n for n in FILES if n not in order and below[n] <= set(order)]
        assert free, f"a circle among {sorted(set(FILES) - set(order))}"
        order += free


def test_kernels_do_not_import_each_other():
    package = "rnncore.kernels."
    pairs = [(a.removeprefix(package), b.removeprefix(package)) for a, b in edges() if a.startswith(package)]
    wrong = [
        (a, b)
        for a, b in pairs
        if not b.startswith("rnncore.") and b not in SHARED_BY_KERNELS and a.split(".")[0] != b.split(".")[0]
    ]
    assert not wrong


def test_kernels_are_reached_through_the_table_of_backends():
    wrong = [(a, b) for a, b in edges() if b.startswith("rnncore.kernels") and part(a) != "kernels"]
    wrong = [(a, b) for a, b in wrong if a != "rnncore._command.doctor"]  # It shows the compiler and the cache.
    assert {a for a, _ in wrong} == {"rnncore.sequence.backends"}


def test_cells_import_no_cell_but_their_base():
    package = "rnncore.cells."
    wrong = [
        (a, b)
        for a, b in edges()
        if a.startswith(package) and b.startswith(package) and b.removeprefix(package) not in SHARED_BY_CELLS
    ]
    assert not wrong


def top_level(name: str) -> set[str]:
    return {module.split(".")[0] for module in imports(name)}


def test_only_the_flax_modules_import_flax():
    assert [n for n in FILES if "flax" in top_level(n) and (n == "rnncore" or part(n) not in FLAX)] == []


def test_only_the_plots_import_matplotlib():
    assert [n for n in FILES if "matplotlib" in top_level(n) and not n.startswith(DRAW)] == []


def test_nothing_imports_a_dependency_that_is_not_declared():
    allowed = {"rnncore", "jax", "jaxlib", "flax", "optax", "chex", "numpy", "matplotlib", *sys.stdlib_module_names}
    assert {n: top_level(n) - allowed for n in FILES if top_level(n) - allowed} == {}


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh Python has after a statement."""
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    return set(done.stdout.split())


def test_importing_rnncore_loads_neither_flax_nor_matplotlib():
    loaded = loaded_by("import rnncore")
    assert {"rnncore", "jax"} <= loaded
    assert not loaded & {"flax", "matplotlib", "optax", "chex", "torch"}


def test_importing_the_flax_layer_does_load_flax():
    """The check above would pass on an empty list of modules; this one would not."""
    loaded = loaded_by("import rnncore.linen")
    assert "flax" in loaded and "matplotlib" not in loaded
