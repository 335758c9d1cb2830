"""Imports point one way, and `import dam` needs torch and numpy only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dam"
KERNELS = PACKAGE.parent / "kernels"  # installed as dam.kernels
# A module imports from its own part and from parts of lower rank. plots knows nothing of the rest.
RANK = {
    "_cpu": 0,
    "kernels": 0,
    "generators": 0,
    "ops": 1,
    "ctmc": 2,
    "divergences": 2,
    "models": 3,
    "rollout": 4,
    "diagnostics": 4,
    "adjoint": 5,
    "train": 6,
    "tasks": 7,
    "cli": 8,
}
LEAVES = {"plots": 0}
OPTIONAL = ("triton", "transformers", "accelerate", "peft", "matplotlib", "tqdm", "safetensors", "datasets")


def modules():
    return sorted(PACKAGE.rglob("*.py")) + sorted(KERNELS.rglob("*.py"))


def part_of(path):
    """The part of the package that a file belongs to."""
    return "kernels" if KERNELS in path.parents else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The modules below dam that a file imports, wherever in it, as dotted names without `dam`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name[4:] for alias in node.names if alias.name.startswith("dam."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "dam":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("dam."):
                yield node.module[4:]


def test_every_part_of_the_package_has_a_rank():
    parts = {part_of(path) for path in modules()}
    assert parts - {"__init__"} <= RANK.keys() | LEAVES.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return  # re-exports
    ranks = {**RANK, **LEAVES}
    for name in imported(path):
        other = name.split(".")[0]
        assert other == part or ranks[other] < ranks[part], f"{path.name} imports dam.{name}"


def test_the_package_itself_re_exports_only():
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_text or isinstance(node, (ast.ImportFrom, ast.Assign))


def run_without_extras(code):
    """Runs code in a process in which none of the optional packages can be imported."""
    block = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent
    )


def test_torch_and_numpy_are_enough():
    code = """
import dam, dam.adjoint, dam.cli, dam.ctmc, dam.models, dam.plots, dam.rollout, dam.tasks.sudoku

assert dam.cli.main(["info"]) == 0
for module in ("dam.train", "dam.tasks.finetune_sudoku"):
    try:
        __import__(module)
        raise SystemExit(f"{module} was imported")
    except ImportError as error:
        print(error)
try:
    dam.plots.solved_against_calls("plot.png", [0], [0.0], title="")
    raise SystemExit("plotted")
except ImportError as error:
    print(error)
assert dam.cli.main(["sudoku", "--output", "/dev/null/run"]) == 1
"""
    done = run_without_extras(code)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert first.startswith("dam ")
    assert "torch  available" in done.stdout
    assert done.stdout.count("pip install 'discrete-adjoint-matching[train]'") == 2
    assert done.stdout.count("pip install 'discrete-adjoint-matching[plot]'") == 1
    assert done.stderr.startswith("dam sudoku: ")
    assert "discrete-adjoint-matching[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_extras_that_messages_name_exist():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11+")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in modules():
        for line in path.read_text(encoding="utf-8").splitlines():
            _, found, rest = line.partition(f"{project['name']}[")
            if found:
                assert rest.split("]")[0] in project["optional-dependencies"], f"{path}: {line.strip()}"
