"""Every block of code of the pages runs or is what it says it is, what they show is printed, links lead somewhere."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import pydoc
import re

import pytest
import yaml

import dam
from tests import commands, pages, running

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
# Of these Python is run by another test: README's, whose fine-tuning is shortened there.
ELSEWHERE = {"README.md": "tests/test_readme.py"}
# Indented blocks that are no commands, by their first words.
PLAIN = {
    ("README.md", "min over the model of"),
    ("docs/architecture.md", "csrc/core/"),
    ("docs/architecture.md", "cli, lm_eval ->"),
    ("docs/architecture.md", "rows --train/rows.py"),
}
LANGUAGES = ("python", "console", "bash", "text", "yaml", "json", "toml")
WITH_PYTHON = [
    page for page in pages.PAGES if page not in ELSEWHERE and any(b.language == "python" for b in pages.blocks(page))
]
COMMANDS = [
    pytest.param(line, id=f"{block}: {line[:60]}")
    for block in BLOCKS
    if block.language in ("console", "bash", "") and (block.language or commands.is_command(commands.of(block)[0]))
    for line in commands.of(block)
]
PROGRAM = re.compile(r"(dam|make|pip install|pytest|python -m|accelerate launch) ")
# Errors that pages quote, which begin as a command does.
MESSAGES = ("dam is built with", "dam rests on")
# Commands of a moment, which are run.
RUN = ("dam info", "dam train --list")


# ---- Python


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """In one namespace, in an empty folder; what a block prints is what is shown right below it, if anything is."""
    monkeypatch.chdir(tmp_path)
    for block, told in running.printed(page):
        shown = running.output_of(block)
        differs = shown and difference(shown, told)
        assert not differs, f"{shown}: {differs}"


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?%?")


def difference(shown, printed):
    """Where what was printed is not what is shown, or None. Numbers may be as far apart as the block's options say."""
    match = re.fullmatch(r"(?:within (\d+)%(?: or ([\d.e-]+))?)?", shown.options)
    assert match, f"{shown}: options are none, 'within N%' or 'within N% or X'; got {shown.options!r}"
    near, least = float(match[1] or 0) / 100, float(match[2] or 0)
    expected, found = shown.text.splitlines(), printed.splitlines()
    if len(expected) != len(found):
        return f"{len(expected)} lines are shown, {len(found)} printed:\n{printed}"
    for one, other in zip(expected, found, strict=True):
        if match[1] is None:
            if one.rstrip() != other.rstrip():
                return f"{one!r} is shown, {other!r} printed"
            continue
        if " ".join(NUMBER.sub("#", one).split()) != " ".join(NUMBER.sub("#", other).split()):
            return f"{one!r} is shown, {other!r} printed"
        for a, b in zip(map(value, NUMBER.findall(one)), map(value, NUMBER.findall(other)), strict=True):
            if abs(a - b) > max(near * abs(a), least):
                return f"{one!r} is shown, {other!r} printed"
    return None


def value(number):
    return float(number.rstrip("%").replace(",", ""))


def test_what_is_shown_is_compared():
    """Numbers within what is said, words and lines to the letter."""
    shown = pages.Block("page", 1, "text", "within 5% or 0.01", "KL 1.00, TV 0.001 at p*\n")
    assert difference(shown, "KL 1.04, TV 0.009 at p*\n") is None
    for other in (
        "KL 1.06, TV 0.001 at p*\n",
        "KL 1.00, TV 0.02 at p*\n",
        "ESS 1.00, TV 0.001 at p*\n",
        "KL 1.00\n",
        "",
    ):
        assert difference(shown, other) is not None
    assert difference(shown._replace(options=""), "KL 1.01, TV 0.001 at p*\n") is not None


def test_what_does_not_run_says_why():
    found = {str(block): running.left_out(block) for block in BLOCKS if block.language == "python" and block.options}
    assert all(reason is not None and len(reason.split()) >= 3 for reason in found.values()), found
    for place, reason in found.items():
        print(f"{place} is not run: {reason}")  # with -s


def test_what_is_run_in_front_of_pages_is_of_pages_with_python():
    assert {*running.BEFORE, *running.CHANGED, *running.AROUND} <= set(WITH_PYTHON)


# ---- commands, and all else


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_such_as_the_programs_take(line):
    commands.check(line)
    if " ".join(line.split("#")[0].split()) in RUN:
        from dam.cli import main

        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            assert main(line.split("#")[0].split()[1:]) == 0
        assert told.getvalue()


def test_commands_within_lines_are_such_as_the_programs_take():
    """They may leave out what a program cannot do without; "..." is what stands there before."""
    wrong, lines = {}, {span for page in pages.PAGES for span in pages.spans(page)}
    for line in sorted(lines):
        if not line.startswith(MESSAGES) and re.match(
            r"(dam|make|pip install|pytest|python -m|accelerate launch) ", line
        ):
            try:
                commands.check(line)
            except commands.Incomplete:
                pass
            except commands.Wrong as error:
                wrong[line] = str(error)
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "dam suduko",
        "dam train llada-8b-gsm8k --set config.learning_rat=1",
        "dam train no-such-recipe",
        "dam eval MODEL --task gms8k --out folder",
        "make tset",
        "pip install '.[trian]'",
        "python -m benchmark",
        "python -m experiments gird",
        "python -m benchmarks.flows mixtures --cals 100",
        "python -m pytest tests/ops/test_rate_ratios.py",
        "accelerate launch --config_file examples/accelerate/fsdp3.yaml examples/accelerate/train.py --model M",
        "accelerate launch --num_processes 2 examples/accelerate/train.py --model M --output_dir o --max_stops 4",
        "DAM_BAKEND=cpu dam info",
        "unheard-of --option",
    ],
)
def test_commands_that_are_wrong_are_found(line):
    with pytest.raises(commands.Wrong):
        commands.check(line)


def test_every_block_is_of_a_kind_that_is_looked_at():
    for block in BLOCKS:
        if not block.language:
            known = commands.is_command(commands.of(block)[0])
            plain = any(block.page == page and block.text.startswith(first) for page, first in PLAIN)
            assert known != plain, f"{block}: commands, or ```text, please: {block.text.splitlines()[0]}"
        elif not (block.language.startswith("{") and block.page.startswith("docs/")):  # of MyST
            assert block.language in LANGUAGES, block
    for page, first in PLAIN:
        assert any(block.page == page and block.text.startswith(first) for block in BLOCKS), first


def test_data_parses():
    for block in BLOCKS:
        if block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            commands.tomllib.loads(block.text)


# ---- the pages together


@pytest.mark.parametrize("page", pages.PAGES)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (pages.ROOT / page).parent / path if path else pages.ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in pages.anchors(str(target.resolve().relative_to(pages.ROOT))), link


NOTEBOOKS = sorted((pages.ROOT / "docs").glob("notebooks/*.ipynb"))
# Passages of notebooks that take long, and what is run in their places.
SHORTER = {"pinwheel": [("ROUNDS = 400", "ROUNDS = 2"), ("BATCH = 2048", "BATCH = 64")]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_and_runs(path, tmp_path, monkeypatch):
    """From top to bottom, each cell in turn; as it is committed it has what every cell gave."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] and all(o["output_type"] != "error" for o in cell["outputs"]) for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for long, short in SHORTER.get(path.stem, ()):
        assert source.count(long) == 1, long
        source = source.replace(long, short)
    monkeypatch.chdir(tmp_path)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
    shown = "".join("".join(o.get("text", ())) for cell in cells for o in cell["outputs"])
    assert len(told.getvalue().splitlines()) == len([line for line in shown.splitlines() if line])


def toctree(page):
    """Pages that its toctrees name, relative to the repository."""
    named = [block for block in pages.blocks(page) if block.language == "{toctree}"]
    entries = [line for block in named for line in block.text.splitlines() if line.strip() and not line.startswith(":")]
    folder = (pages.ROOT / page).parent
    paths = [(folder / re.sub(r"^.*<(.*)>$", r"\1", entry.strip())).resolve() for entry in entries]
    found = []
    for path in paths:
        if path.with_suffix(".ipynb").exists():
            continue  # a notebook, which leads to no other page
        matches = sorted(path.parent.glob(f"{path.name}.md")) if "*" in path.name else [path.with_suffix(".md")]
        found += [str(match.relative_to(pages.ROOT)) for match in matches]
    return found


def test_every_page_of_the_documentation_is_in_a_toctree():
    waiting, reached = ["docs/index.md"], {"docs/index.md"}
    while waiting:
        for page in toctree(waiting.pop()):
            assert (pages.ROOT / page).exists(), page
            if page not in reached:
                reached.add(page)
                waiting.append(page)
    missing = {page for page in pages.PAGES if page.startswith(("docs/", "examples/"))} - reached
    assert not missing, f"in no toctree of docs/index.md: {sorted(missing)}"


def referenced():
    """Names that the API reference has, by its directives: objects, and modules with all of their public names."""
    found = set()
    for page in pages.PAGES:
        if page.startswith("docs/api/"):
            text = (pages.ROOT / page).read_text(encoding="utf-8")
            directives = re.findall(
                r"^\.\. auto(module|function|class):: ([\w.]+)\n( +:no-members:)?", text, flags=re.M
            )
            for kind, name, alone in directives:
                found.add(name)
                if kind == "module" and not alone:
                    found |= {f"{name}.{public}" for public in exported(importlib.import_module(name))}
    return found


def exported(module):
    """Names that a module has for others: its __all__, or what is defined in it."""
    own = [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", None) == module.__name__]
    return getattr(module, "__all__", own)


def test_every_public_name_is_in_the_api_reference():
    found = referenced()
    functions = {f"dam.{name}" for name in dam.__all__ if not inspect.ismodule(getattr(dam, name))}
    modules = {f"dam.{name}" for name in (*dam._SUBMODULES, "generators")}
    assert functions | modules <= found, sorted((functions | modules) - found)
    for name in found:  # and what the reference has is there
        assert importlib.util.find_spec(name) if name in modules else pydoc.locate(name) is not None, name
