"""What `--against` names: groups of peers, and functions of the user's own as module:function or file.py:function.

Said before anything is measured: a name that is not there, or cannot run here, or has nothing for the operations.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dam.benchmarks import harness, peers


@dataclasses.dataclass(frozen=True)
class Against:
    """What dam is measured against."""

    groups: frozenset[str] | None = None  # None: all that run on the device
    yours: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)  # by the name that was given

    def of(self, case: harness.Case) -> harness.Case:
        """The case with those functions alone, and dam's."""
        functions, compiled = case.functions, case.compiled
        if self.groups is not None:
            functions, compiled = (
                {name: f for name, f in some.items() if name == "dam" or self.groups.intersection(_groups(f))}
                for some in (functions, compiled)
            )
        if case.inputs is not None:
            functions = functions | {name: case.inputs.call(f, harness.YOURS) for name, f in self.yours.items()}
        return dataclasses.replace(case, functions=functions, compiled=compiled)


def chosen(names: Sequence[str], ops: Collection[str], device: torch.device) -> Against:
    """What the names stand for, for some operations on a device; without names all that there is.

    Raises:
        ValueError: a name that is not there, cannot run here, or has nothing to compare with these operations.
    """
    if not names:
        return Against()
    names = list(dict.fromkeys(names))
    yours = {name: load(name) for name in names if ":" in name}
    groups = [name for name in names if name not in yours]
    cases = {op: harness.tiny_cases(harness.cases_of(op), torch.float32) for op in ops}
    there = {
        group
        for of in cases.values()
        for case in of
        for function in (case.functions | case.compiled | (case.on_gpu if device.type == "cuda" else {})).values()
        for group in _groups(function)
    }
    for name in groups:
        if name not in peers.GROUPS:
            near = difflib.get_close_matches(name, peers.GROUPS, n=1)
            guess = f"; did you mean {near[0]}?" if near else "."
            there_are = f"There are {', '.join(peers.GROUPS)}, and module:function for one of yours"
            raise ValueError(f"--against {name}: no peers of that name{guess} {there_are}")
        if (reason := peers.why_unavailable(name, device)) is not None:
            raise ValueError(f"--against {name}: {reason}")
        if name not in there:
            known = ", ".join(group for group in peers.GROUPS if group in there)
            raise ValueError(f"--against {name}: it has nothing for {', '.join(ops)}; there are {known}")
    for name, function in yours.items():
        _takes(name, function, [case for of in cases.values() for case in of])
    return Against(frozenset(groups), yours)


def _groups(function: Callable[[], object]) -> tuple[str, ...]:
    return function.groups if isinstance(function, harness.Call) else ()


def _takes(name: str, function: Callable[..., Any], cases: Sequence[harness.Case]) -> None:
    """Raises a ValueError where a function takes the arguments of no case."""
    inputs = {case.label: case.inputs.given for case in cases if case.inputs is not None}
    if not inputs:
        labels = ", ".join(case.label for case in cases)
        raise ValueError(f"--against {name}: {labels} takes no function of yours, as it is of a model and a process")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C: the call will tell
        return
    problems = {}
    for label, given in inputs.items():
        try:
            signature.bind(**given)
        except TypeError as error:
            problems[label] = f"{label} gives {', '.join(given)} ({error})"
    if len(problems) == len(inputs):
        said = "; ".join(problems.values())
        raise ValueError(f"--against {name}: it does not take the arguments of any case: {said}")


def load(name: str) -> Callable[..., Any]:
    """The function that module:function, or file.py:function, names; modules are looked for in this folder too.

    Raises:
        ValueError: there is none, or what has it fails when it is imported; the message has its line.
    """
    place, _, attribute = name.rpartition(":")
    try:
        found = _module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            message = f"there is no module {error.name!r}, neither in this folder nor installed"
            raise ValueError(f"--against {name}: {message}") from error
        raise ValueError(f"--against {name}: {harness.explained(error)}") from error
    except OSError as error:
        raise ValueError(f"--against {name}: {error}") from error
    except Exception as error:
        raise ValueError(f"--against {name}: {harness.explained(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            raise ValueError(f"--against {name}: {place} has no {part!r}" + (f", but {near[0]}" if near else ""))
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"--against {name}: {attribute} is a {type(found).__name__}, and cannot be called")
    return found


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:  # an installed command does not look there
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    path = Path(place).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # for what pickles or compiles its functions
    spec.loader.exec_module(module)
    return module
