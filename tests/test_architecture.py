"""The direction of dependence, and what must not be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import evocert

PACKAGE = Path(evocert.__file__).parent

# From the bottom up. A module may import from lower layers, and from its own where that is no circle.
LAYERS = [
    {"errors", "modules", "orphans"},
    {"bounds"},
    {
        "losses",
        "objectives",
        "regularisers",
        "initialisation",
        "minibatches",
        "attacks",
        "data",
        "networks",
        "memory",
        "files",
        "schedules",
        "settings",
        "display",
    },
    {"experiment", "user_files", "problem_files", "problem", "searchers", "evaluation", "runs", "logging"},
    {"parts", "config", "centres"},
    {"finished"},
    {"certify", "export", "compare", "plots"},
    {"training", "bench", "sweep"},
    {"cli_parts", "cli_studies", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit(module):
    """The part of the package that a dotted module name belongs to: "evocert.bounds.ibp" -> "bounds"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                f"{node.module}.{alias.name}" if node.module == "evocert" else node.module for alias in node.names
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no layer: give it one here"
    for module in imported(path):
        if module.split(".")[0] == "evocert" and (other := unit(module)) and not other.startswith("__"):
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which is above it"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "bounds"], ids=lambda p: p.name)
def test_bounds_need_torch_and_nothing_else(path):
    allowed = {"torch", "evocert", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imported(path)} <= allowed
    assert {unit(m) for m in imported(path) if m.startswith("evocert")} <= {"bounds", "modules"}


def test_numba_is_a_matter_of_the_compiled_loops():
    importing = [p.relative_to(PACKAGE).parent for p in FILES if "numba" in {m.split(".")[0] for m in imported(p)}]
    assert set(importing) == {Path("bounds/compiled")}


@pytest.mark.parametrize("statement", ["import evocert", "import evocert.cli"])
def test_imports_are_light(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'evotorch', 'numpy', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_light():
    code = (
        "import sys; sys.argv = ['evocert', '--help']; from evocert.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('status', end.code, [m for m in ('torch', 'evotorch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "status 0 []"
    assert "resume" in done.stdout


def test_files_stay_small():
    assert not {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
