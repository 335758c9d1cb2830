"""The environment variables DAM_*: what each may be, and what is wrong with those that are set.

A variable that is misspelt, or set to a word that nothing knows, would otherwise be a setting that is not there. Needs
the standard library only: setup.py reads this file where nothing is installed yet.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

BACKENDS = ("torch", "cpu", "triton", "cuda")
# Of linear ops; those of a gradient are ways of the chunked one.
GRADIENT_FORMS = ("rows", "whole", "columns")
FORMS = ("auto", "fused", "chunked", *GRADIENT_FORMS)
# Another program's variables may begin alike, so a name is taken for a misspelt one only if it is this similar: a
# letter too many, too few or another (DAM_BACKENDS and DAM_BACKEND: 0.96), no other word behind it (DAM_BACKEND_URL:
# 0.85).
_MISSPELT = 0.9


class Variable(NamedTuple):
    """What a variable must be, in words that follow "must be", and whether a text is that; the empty one always is."""

    words: str
    fits: Callable[[str], bool]
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> Variable:
    return Variable(f"one of {', '.join(choices)}", choices.__contains__, choices)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


_FLAG = _one_of("0", "1")
_ANYTHING = Variable("text", lambda text: True)  # or looked at where it is read alone

VARIABLES = {
    "DAM_BACKEND": _one_of(*BACKENDS),
    "DAM_CPU_ISA": _one_of("avx512", "avx2", "plain"),
    "DAM_CPU_PRODUCT": _one_of("amx", "avx512_bf16", "float32"),
    "DAM_LINEAR_FORM": _one_of(*FORMS),
    "DAM_EMULATE_CUDA": _FLAG,
    "DAM_CACHE_DIR": _ANYTHING,
    "DAM_WORKSPACE_MB": Variable("a positive number of MiB", _is_positive),
    # At installation.
    "DAM_BUILD_CUDA": _FLAG,
    "DAM_CUDA_ARCHS": _ANYTHING,
    "DAM_CUDA_STRICT": _FLAG,
    "DAM_SANITIZE": _FLAG,
    "DAM_NO_OPENMP": _FLAG,
    # Of tests and benchmarks.
    "DAM_ENGINE_WHEELS": _ANYTHING,
    "DAM_BENCHMARKS_STARTED": _ANYTHING,
}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """What an error says behind a name that it does not know: the most similar one that it does, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def value(name: str) -> str:
    """What a variable is set to, now; "" where it is not.

    Raises:
        ValueError: it may not be that; the message says what it may be.
    """
    text = os.environ.get(name, "")
    return checked(name, text) if text else ""


def checked(name: str, text: str) -> str:
    """A text that a variable may be.

    Raises:
        ValueError: it may not; the message says what it may be.
    """
    fault = _fault(name, text)
    if fault is not None:
        raise ValueError(fault)
    return text


def _fault(name: str, text: str) -> str | None:
    variable = VARIABLES[name]
    if variable.fits(text):
        return None
    return f"{name} must be {variable.words}; got {text!r}{nearest(text, variable.choices)}"


def faults(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with the variables that are set: words that they may not be, and names that are misspelt."""
    found = []
    for name, text in sorted(environment.items()):
        if name in VARIABLES:
            fault = _fault(name, text) if text else None
        else:
            fault = f"there is no variable {name}{_meant(name)}" if _meant(name) else None
        found += [fault] if fault else []
    return found


def unread(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of variables that are set and begin like ours, and that nothing reads; misspelt ones are in `faults`."""
    others = (name for name in environment if name.startswith("DAM_") and name not in VARIABLES)
    return sorted(name for name in others if not _meant(name))


def _meant(name: str) -> str:
    """What a misspelt variable is told to be; "" of another program's."""
    return nearest(name, VARIABLES, _MISSPELT) if name.startswith("DAM_") else ""
