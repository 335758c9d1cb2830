"""Imports point one way, within a part as between parts, and `import dam` needs torch and numpy only."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

import dam

PACKAGE = Path(__file__).parent.parent / "dam"
# Those that are in dam by a link.
LINKED = tuple(PACKAGE.parent / name for name in ("kernels", "benchmarks"))
# A module imports from its own part and from parts of lower rank. plots and derive know nothing of the rest.
RANK = {
    "_cpu": 0,
    "kernels": 0,
    "files": 0,
    "generators": 0,
    "workers": 0,
    "backends": 1,
    "ops": 2,
    "ctmc": 3,
    "flows": 3,
    "divergences": 3,
    "rates": 4,
    "models": 4,
    "decoding": 4,
    "rollout": 5,
    "canvas": 5,
    "diagnostics": 6,
    "engines": 6,
    "adjoint": 6,
    "train": 7,
    "tasks": 8,
    "recipes": 8,
    "commands": 9,
    "benchmarks": 9,
    "lm_eval": 10,
    "cli": 10,
}
LEAVES = {"plots": 0, "derive": 0}
# Within a part, a module imports modules of lower rank only; the first pattern that fits a name gives its rank. Of the
# other parts it holds that they have no circle.
WITHIN = {
    "backends": {"address": 0, "deferral": 0, "cpu": 1, "cuda": 1, "triton": 1, "choice": 2, "generated": 3},
    "ops": {
        **dict.fromkeys(("_checks", "_op", "_rows", "_softcap"), 0),
        **dict.fromkeys(("_gradient", "_group", "_memory", "_philox"), 1),
        **dict.fromkeys(("_formed_gradient", "_head", "_excluded"), 2),
        **dict.fromkeys(("_linear", "_parallel", "entropy"), 3),
        "log_prob": 4,
        "linear_*": 6,
        "*": 5,
    },
    "kernels": {
        **dict.fromkeys(("configs", "environment", "excluded", "launch", "projection"), 0),
        **dict.fromkeys(("core", "forms"), 1),
        "softcap": 2,
        "linear_*": 4,
        "*": 3,
    },
}
OPTIONAL = (
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "matplotlib",
    "ot",
    "tqdm",
    "yaml",
    "lm_eval",
    "rich",
    "safetensors",
    "datasets",
    "dill",
    "math_verify",
    "sglang",
    "vllm",
)


def modules():
    return [path for folder in (PACKAGE, *LINKED) for path in sorted(folder.rglob("*.py"))]


def name_of(path):
    """Dotted name of a file's module, without `dam`."""
    inside = path.relative_to(next((folder.parent for folder in LINKED if folder in path.parents), PACKAGE))
    return ".".join(inside.with_suffix("").parts).removesuffix(".__init__")


def imported(source, known):
    """The modules below dam that source code imports, wherever in it, inside functions too, as names without `dam`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name[4:] for alias in node.names if alias.name.startswith("dam."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "dam" or node.module.startswith("dam."):
                parent = node.module[4:]
                for alias in node.names:
                    child = f"{parent}.{alias.name}".removeprefix(".")
                    yield child if child in known or not parent else parent


def rank_within(within, name):
    return next(rank for pattern, rank in within.items() if fnmatch.fnmatch(name.split(".")[1], pattern))


def faults(graph):
    """Every import that points upward, between parts or within one, and every circle."""
    found = []
    ranks = {**RANK, **LEAVES}
    for name, others in graph.items():
        part = name.split(".")[0]
        for other in sorted(others):
            if part == "__init__":
                continue  # re-exports
            other_part = other.split(".")[0]
            if other_part != part and not ranks[other_part] < ranks[part]:
                found.append(f"{name} imports dam.{other}, which is not below it")
            within = WITHIN.get(part)
            if within is not None and other_part == part and "." in other and "." in name:
                mine, its = (rank_within(within, x) for x in (name, other))
                if not its < mine:
                    found.append(f"{name} imports dam.{other}, which is not below it in {part}")
    done, path = set(), []

    def visit(name):
        if name in path:
            found.append("a circle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            path.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            done.add(path.pop())

    for name in sorted(graph):
        visit(name)
    return found


@pytest.fixture(scope="module")
def sources():
    return {name_of(path): path.read_text(encoding="utf-8") for path in modules()}


@pytest.fixture(scope="module")
def graph(sources):
    """Which modules each module imports."""
    return {name: set(imported(source, sources)) for name, source in sources.items()}


def test_every_part_of_the_package_has_a_rank(sources):
    parts = {name.split(".")[0] for name in sources}
    assert parts - {"__init__"} <= RANK.keys() | LEAVES.keys()
    for part, within in WITHIN.items():
        names = {name.split(".")[1] for name in sources if name.startswith(f"{part}.")}
        assert all(fnmatch.filter(names, pattern) for pattern in within)
        assert all(any(fnmatch.fnmatch(name, pattern) for pattern in within) for name in names)


def test_imports_point_one_way(graph):
    assert faults(graph) == []


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("backends.cuda", "from dam.ops import _head", "backends.cuda imports dam.ops._head, which is not below it"),
        ("backends.cpu", "from dam.backends import choice", "is not below it in backends"),
        ("ops._rows", "import dam.ops.jump", "ops._rows imports dam.ops.jump, which is not below it in ops"),
        ("ops.jump", "from dam.ops import rate_ratio", "is not below it in ops"),
        ("kernels.core", "from dam.kernels.jump import jump", "is not below it in kernels"),
        (
            "ctmc.simulate",
            "from dam.ctmc.enumeration import process_law",
            "a circle: ctmc.enumeration -> ctmc.simulate",
        ),
        ("models.denoiser", "from dam.rollout import rollout", "models.denoiser imports dam.rollout"),
    ],
)
def test_a_planted_import_is_found(sources, graph, module, line, fault):
    """Inside a function, where it does not run when the module is loaded."""
    planted = set(imported(f"{sources[module]}\n\ndef planted():\n    {line}\n", sources))
    assert any(fault in text for text in faults({**graph, module: planted}))


def test_the_package_itself_re_exports_only():
    """And finds its submodules when they are asked for."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        assert is_text or for_checkers or lazy or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))


def test_submodules_are_reachable_and_loaded_late():
    code = """
import sys, dam

late = [name for name in dam._SUBMODULES if f"dam.{name}" in sys.modules]
assert not late and "matplotlib" not in sys.modules, late
assert not [name for name in sys.modules if name.startswith(("dam.flows", "dam.train"))]
assert dam.ctmc.schedules.define and not [name for name in sys.modules if name.startswith("dam.derive")]
assert dam.ctmc.MaskedCTMC and dam.flows.FlowProcess and dam.rollout.rollout and dam.adjoint.group_targets
assert "train" in dir(dam)
try:
    dam.train
    raise SystemExit("dam.train was loaded")
except ImportError as error:
    assert "pip install 'discrete-adjoint-matching[train]'" in str(error), error
try:
    dam.nothing
    raise SystemExit("dam.nothing is there")
except AttributeError as error:
    assert "nothing" in str(error)
"""
    done = run_without_extras(code)
    assert done.returncode == 0, done.stderr


def test_every_submodule_is_reachable():
    submodules = {name.split(".")[0] for name in map(name_of, modules())} - {
        "__init__",
        "benchmarks",
        "cli",
        "commands",
        "ops",
        "backends",
        "files",
    }
    assert submodules - {"kernels"} == {*dam._SUBMODULES, "generators"}


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
import dam, dam.adjoint, dam.cli, dam.ctmc, dam.flows, dam.models, dam.plots, dam.rollout, dam.tasks.sudoku

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
assert dam.cli.main(["train", "tiny-countdown"]) == 1
"""
    done = run_without_extras(code)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert first.startswith("dam ")
    assert "torch  available" in done.stdout
    assert done.stdout.count("pip install 'discrete-adjoint-matching[train]'") == 2
    assert done.stdout.count("pip install 'discrete-adjoint-matching[plot]'") == 1
    assert done.stderr.startswith("dam sudoku: ") and "\ndam train: " in done.stderr
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
