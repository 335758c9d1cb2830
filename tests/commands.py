"""Command lines of the pages: each program that they call, and what says that such a line is right.

The parser of a program is the program's own: its `main` is called, and stopped when it has parsed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

from packaging.requirements import InvalidRequirement, Requirement

from tests.pages import ROOT, Block

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

# Programs and modules of others, of which only the name is known here, and why.
OTHERS = {
    "apt-get": "of the system",
    "cp": "of the shell",
    "cd": "of the shell",
    "export": "of the shell",
    "source": "of the shell",
    "git": "of the system",
    "nvidia-smi": "of a machine with a GPU",
    "pip-audit": "of others",
    "ray": "of Ray, with DARE",
    "sglang.launch_server": "of SGLang",
    "deepspeed.checkpoint.ds_to_universal": "of DeepSpeed, which takes seconds to import",
    "dam.lm_eval": "of lm-eval, which is not among the packages of the tests",
    "recipe/llada/run_dam_llada_8b_instruct.sh": "in DARE's checkout, where install.py puts it",
    "venv": "of Python",
    "pip": "of Python",
    "timeit": "of Python",
}
# Letters that stand for a number in a command that is shown.
NUMBERS = {"S": "0", "N": "2", "K": "16", "T": "8"}


class Wrong(Exception):
    """What is wrong with a command line."""


class Incomplete(Wrong):
    """It lacks what a program cannot do without, as where a text only names a command."""


class Parsed(BaseException):
    """Stops a program where its arguments are parsed; no `except Exception` of its own may catch it."""


def of(block: Block) -> list[str]:
    """The command lines of a block, continued ones joined: of a console what follows "$ ", else every line."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def is_command(line: str) -> bool:
    """Whether a line begins with a program that is known here."""
    words = _without_assignments(shlex.split(line, comments=True)) if _splits(line) else []
    return bool(words) and _program(words[0]) in {*CHECKS, *OTHERS}


def _splits(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


def _program(word: str) -> str:
    """python of .venv/bin/python3, and `from` of from=$(...), which is Python then."""
    name = word.rsplit("/bin/", 1)[-1]
    return "python" if re.fullmatch(r"python3?", name) else name


def _without_assignments(words: Sequence[str]) -> list[str]:
    """A command without what is set in front of it, NAME=value."""
    kept = list(words)
    while kept and re.match(r"[A-Za-z_]+=", kept[0]):
        name, value = kept.pop(0).split("=", 1)
        if value.startswith("$("):  # NAME=$(python -c "...")
            kept = [value[2:], *[word.removesuffix(")") if word is kept[-1] else word for word in kept]]
            break
        if name.startswith("DAM_") and name not in _variables():
            raise Wrong(f"no file of dam's reads {name}")
    return kept


@cache
def _variables() -> set[str]:
    """Environment variables of dam, as its source has them."""
    files = [ROOT / "setup.py", *(ROOT / "dam").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return {name for file in files for name in re.findall(r"\bDAM_[A-Z_]+\b", file.read_text(encoding="utf-8"))}


def check(line: str) -> None:
    """Raises Wrong where a command line cannot be right."""
    if not _splits(line):
        raise Wrong(f"a quote is not closed in {line}")
    words = _without_assignments(shlex.split(line, comments=True))
    program = _program(words[0])
    if program in CHECKS:
        CHECKS[program](words[1:])
    elif program not in OTHERS:
        raise Wrong(f"{program} is a program that tests/commands.py does not know")


def parsed(main: Callable[..., object], name: str, arguments: Sequence[str]) -> argparse.Namespace | None:
    """What a program's parser makes of arguments; None where it printed what was asked for, as --help does.

    Args:
        main: of the program; takes its arguments from sys.argv.
        name: of the program.
        arguments: of the command line; letters of NUMBERS stand for a number.

    Raises:
        Wrong: it refuses them, or parses none.
    """
    from transformers import HfArgumentParser

    real = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    told, arguments = io.StringIO(), [NUMBERS.get(word, word) for word in arguments]
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(HfArgumentParser, "parse_args_into_dataclasses", stop),
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(told),
    ):
        try:
            main()
        except Parsed as found:
            return found.args[0]
        except SystemExit as end:
            if end.code in (0, None):
                return None
            message = told.getvalue().strip().splitlines()[-1]
            raise (Incomplete if "the following arguments are required" in message else Wrong)(message) from end
    raise Wrong(f"{name} parsed nothing: {told.getvalue()}")


def _dam(arguments: Sequence[str]) -> None:
    from dam.cli import main
    from dam.recipes import recipe
    from dam.tasks import TASKS

    given = parsed(main, "dam", arguments)
    # What only the command itself looks at, and can be looked at without a model.
    if getattr(given, "task", None) not in (None, *TASKS):
        raise Wrong(f"there is no task {given.task}")
    if getattr(given, "recipe", None) is not None and not given.recipe.endswith(".yaml"):
        try:
            recipe.load(given.recipe, given.set)
        except (ValueError, TypeError, OSError) as error:
            raise Wrong(str(error)) from error


def _make(arguments: Sequence[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for word in arguments:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no target {word}")


def _pip(arguments: Sequence[str]) -> None:
    if arguments[0] != "install":
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    values = iter(arguments[1:])
    for word in values:
        if word in ("-c", "-r", "--constraint"):
            _exists(next(values))
        elif word in ("--index-url", "--extra-index-url"):
            next(values)
        elif not word.startswith("-") and not word.endswith(".whl"):
            # A folder, with extras or none, is this project's; all else is a requirement.
            own = re.fullmatch(r"(?:\.|PATH_OF_THIS_REPOSITORY)(\[.*\])?", word)
            try:
                required = Requirement(project["name"] + (own[1] or "") if own else word)
            except InvalidRequirement as error:
                raise Wrong(str(error)) from error
            if required.name == project["name"]:
                for extra in required.extras - set(project["optional-dependencies"]):
                    raise Wrong(f"{project['name']} has no extra {extra}")


def _python(arguments: Sequence[str]) -> None:
    if not arguments:
        return
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[0] == "-m":
        _module(arguments[1], arguments[2:])
    else:
        _script(arguments[0], arguments[1:])


def _module(name: str, arguments: Sequence[str]) -> None:
    if name == "pytest":
        return _pytest(arguments)
    if name in OTHERS:
        return None
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:  # a package is run by its __main__
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None:
        raise Wrong(f"there is no module {name}")
    if arguments and "ArgumentParser" in Path(spec.origin).read_text(encoding="utf-8"):
        parsed(importlib.import_module(spec.name).main, f"python -m {name}", arguments)
    return None


def _script(path: str, arguments: Sequence[str]) -> None:
    _exists(path)
    source = (ROOT / path).read_text(encoding="utf-8")
    if "ArgumentParser" in source:
        parsed(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), path, arguments)


def _pytest(arguments: Sequence[str]) -> None:
    for word in arguments:
        if "/" in word and not word.startswith("-"):
            _exists(word.split("::")[0])


def _accelerate(arguments: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if arguments[0] != "launch":
        return
    given = parsed(lambda: launch_command_parser().parse_args(), "accelerate launch", arguments[1:])
    if given.config_file is not None:
        _exists(given.config_file)
    _python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


def _torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = parsed(lambda: get_args_parser().parse_args(), "torchrun", arguments)
    _python([*(["-m"] if given.module else []), given.training_script, *given.training_script_args])


def _bash(arguments: Sequence[str]) -> None:
    if arguments[0] not in OTHERS:
        _exists(arguments[0])


def _exists(path: str) -> None:
    if path.isupper():  # FILE, that the reader has
        return
    if not (ROOT / path).exists():
        raise Wrong(f"there is no {path}")


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "dam": _dam,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "pytest": _pytest,
    "accelerate": _accelerate,
    "torchrun": _torchrun,
    "bash": _bash,
}
