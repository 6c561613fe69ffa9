"""The rooms of the package: imports go down only, and shape annotations use the axes of axes.py."""

import ast
import re
from pathlib import Path

import pytest

import dycoke_jax

ROOT = Path(dycoke_jax.__file__).parent
MODULES = {
    ".".join(("dycoke_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}

# From top to bottom; rooms of one line do not import each other.
FLOORS = (
    ("cli",),
    ("demo",),
    ("recipes",),
    ("targets",),
    ("bench", "inspection", "evaluation", "jobs", "serving", "training"),
    ("llava_video",),
    ("engine", "tasks"),
    ("generation",),
    ("checkpoint", "compression"),
    ("model",),
    ("models", "assets"),
    ("ops", "inputs"),
    ("cache", "hosts"),
    ("sharding", "compilation"),
    ("config", "files", "progress", "axes"),
    ("checks",),
    ("errors",),
)


def room(module):
    """The room of a module: its first name below the package."""
    return module.split(".")[1] if "." in module else ""


def imported(module):
    """Modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            if name in MODULES and name != module:
                yield name


def test_every_module_has_a_room():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "dycoke_jax"])
def test_imports_go_down(module):
    """Nothing imports a room above it, so fine-tuning and evaluation know no recipe."""
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for other in imported(module):
        if room(other) not in ("", room(module)):
            assert floor_of[room(other)] > floor_of[room(module)], f"{module} imports {other}"


def test_imports_are_found_inside_functions_too():
    assert "dycoke_jax.models.llava" in set(imported("dycoke_jax.generation.prefill"))
    assert "dycoke_jax.recipes.tiny.recipe" in set(imported("dycoke_jax.cli.learning"))


def test_modules_import_each_other_in_no_circle():
    imports = {module: set(imported(module)) for module in MODULES}
    # A package's __init__ gathers names of its own modules; that is no circle of theirs.
    imports = {
        module: {other for other in others if not module.startswith(other + ".")}
        for module, others in imports.items()
    }
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in imports[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def axes_of(source):
    """The upper-case axes in the shape annotations of a module."""
    for shape in re.findall(r'(?:Float|Int|UInt8|Bool|Shaped)\[[\w.| ]+, "([^"]*)"\]', source):
        for axis in shape.split():
            if re.match(r"[*#?]*[A-Z]", axis):
                yield axis.lstrip("*#?")


def test_axis_letters_are_those_of_the_legend():
    """Every letter that is used is in the legend, and every letter of the legend is used."""
    legend = re.findall(r"^([A-Z]) {2,}\S", MODULES["dycoke_jax.axes"].read_text(), re.MULTILINE)
    assert len(legend) == len(set(legend)), "one meaning a letter"
    used = {axis for path in MODULES.values() for axis in axes_of(path.read_text())}
    assert used == set(legend)


def test_annotations_are_found():
    source = 'x: Float[Array, "B *steps T 1"] | Int[np.ndarray, "F height"]'
    assert list(axes_of(source)) == ["B", "T", "F"]
