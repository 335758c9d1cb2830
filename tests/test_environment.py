"""The DAM_* variables: one list of them, and a misspelt name or word that is told before anything relies on it."""

import json
import re
from pathlib import Path

import pytest
import torch

import dam
from dam import cli
from dam.backends import choice, cpu
from dam.kernels import environment

CHECKOUT = Path(__file__).parent.parent
# name=text, and what is said of it
WRONG = (
    (
        "DAM_BACKEND",
        "tirton",
        "DAM_BACKEND must be one of torch, cpu, triton, cuda; got 'tirton'; did you mean triton?",
    ),
    ("DAM_CPU_ISA", "avx51", "DAM_CPU_ISA must be one of avx512, avx2, plain; got 'avx51'; did you mean avx512?"),
    ("DAM_CPU_PRODUCT", "AMX", "DAM_CPU_PRODUCT must be one of amx, avx512_bf16, float32; got 'AMX'"),
    ("DAM_LINEAR_FORM", "row", "got 'row'; did you mean rows?"),
    ("DAM_EMULATE_CUDA", "true", "DAM_EMULATE_CUDA must be one of 0, 1; got 'true'"),
    ("DAM_BUILD_CUDA", "no", "DAM_BUILD_CUDA must be one of 0, 1; got 'no'"),
    ("DAM_WORKSPACE_MB", "1g", "DAM_WORKSPACE_MB must be a positive number of MiB; got '1g'"),
    ("DAM_BACKENDS", "cpu", "there is no variable DAM_BACKENDS; did you mean DAM_BACKEND?"),
    ("DAM_WORKSPACE_MIB", "1", "there is no variable DAM_WORKSPACE_MIB; did you mean DAM_WORKSPACE_MB?"),
)


@pytest.mark.parametrize(("name", "text", "message"), WRONG)
def test_what_is_wrong_is_told(name, text, message):
    (fault,) = environment.faults({"PATH": "/bin", name: text})
    assert fault.endswith(message)


def test_what_is_right_is_not():
    """What is set and empty counts as not set, and another program's variables are its own."""
    right = {"DAM_BACKEND": "cpu", "DAM_LINEAR_FORM": "", "DAM_EMULATE_CUDA": "0", "DAM_WORKSPACE_MB": "0.5"}
    assert environment.faults({**right, "DAM_HOME": "/data", "DAM_BACKEND_URL": "https://assets"}) == []
    assert environment.unread({**right, "DAM_HOME": "/data", "DAM_BACKENDS": "cpu"}) == ["DAM_HOME"]


def test_the_first_operation_says_so(monkeypatch):
    """By whatever way it comes: at once by the C++ kernel, on a backend that is asked for, or compiled."""
    monkeypatch.setattr(choice, "_faults", "there is no variable DAM_BACKENDS; did you mean DAM_BACKEND?")
    logits = torch.zeros(2, 3)
    for run in (dam.jump, dam.backend("torch")(dam.jump), torch.compile(dam.jump, backend="eager")):
        with pytest.raises(Exception, match="there is no variable DAM_BACKENDS"):
            run(logits)
        torch.compiler.reset()


def test_info_tells_and_other_commands_refuse(monkeypatch, capsys):
    monkeypatch.setenv("DAM_LINEAR_FORM", "chunk")
    monkeypatch.setenv("DAM_HOME", "/data")
    message = (
        "DAM_LINEAR_FORM must be one of auto, fused, chunked, rows, whole, columns; got 'chunk'; did you mean chunked?"
    )
    assert cli.main(["info"]) == 1
    text = capsys.readouterr().out
    assert f"error: {message}" in text and "note: DAM_HOME is set, and nothing in dam reads it" in text
    assert cli.main(["info", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == [message] and found["unread"] == ["DAM_HOME"]
    assert found["environment"]["DAM_LINEAR_FORM"] == "chunk"
    assert cli.main(["train", "--list"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == f"dam train: {message}\n"


def test_info_tells_of_instructions_that_this_machine_lacks(monkeypatch, capsys):
    reason = "DAM_CPU_ISA=avx512: this machine does not have these instructions"

    def lacking():
        raise RuntimeError(reason)

    monkeypatch.setattr(cpu, "isa", lacking)
    assert cli.main(["info", "--json"]) == 0
    backend = json.loads(capsys.readouterr().out)["backends"]["cpu"]
    assert backend == {"available": False, "reason": reason}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dam {dam.__version__}\n"


def test_every_variable_that_is_read_is_in_the_list():
    """In Python by name or by `asked`, in C++ by getenv; what makes tests run is read there."""
    paths = [CHECKOUT / "setup.py"]
    for folder, kind in (("dam", "py"), ("kernels", "py"), ("csrc", "cpp"), ("benchmarks", "py"), ("tests", "py")):
        paths += (CHECKOUT / folder).rglob(f"*.{kind}")
    read = set()
    for path in paths:
        if path != Path(__file__):
            source = path.read_text(encoding="utf-8")
            read |= set(re.findall(r'(?:environ(?:\.get\(|\[)|getenv\(|asked\(|value\(|checked\()"(DAM_\w+)"', source))
            read |= set(re.findall(r'^_STARTED = "(DAM_\w+)"', source, flags=re.MULTILINE))
    assert read == environment.VARIABLES.keys()


def test_the_list_is_that_of_the_docs():
    page = (CHECKOUT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(DAM_\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    of_the_house = {"DAM_CUDA_STRICT", "DAM_SANITIZE", "DAM_NO_OPENMP", "DAM_ENGINE_WHEELS", "DAM_BENCHMARKS_STARTED"}
    assert rows.keys() == environment.VARIABLES.keys() - of_the_house
    for name, row in rows.items():
        choices = environment.VARIABLES[name].choices
        assert all(f"`{each}`" in row or f"{each}:" in row for each in choices if each != "0"), name
