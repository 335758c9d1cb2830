"""What setup.py says of CUDA, and the host's part of the launches, as plain C++."""

import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def test_launches_are_divided_well(tmp_path):
    """tests/cuda/geometry_test.cpp: every tile has one team, what waits for each other is a cluster, and so on."""
    program = tmp_path / "geometry_test"
    source = Path(__file__).with_name("geometry_test.cpp")
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "10800 shapes\n"


# As nvcc 13.0 writes it: information between the lines that matter, and functions that are not kernels.
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5cleanv' for 'sm_80'
ptxas info    : Function properties for _Z5cleanv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 552 bytes cmem[0]
ptxas info    : Compile time = 12.3 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6spillsv' for 'sm_90'
ptxas info    : Function properties for _Z6spillsv
    24 bytes stack frame, 20 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 24 bytes cumulative stack size
"""


def test_spills_are_read_from_the_report(setup):
    clean, spills = setup.ptxas_report(REPORT)
    assert clean == ("_Z5cleanv", "sm_80", 0, 0, 64)
    assert spills == ("_Z6spillsv", "sm_90", 24, 80, 64)


def test_a_spill_fails_a_strict_build(setup, tmp_path):
    """By nvcc itself, where it is: an array that is indexed at run time has a stack frame."""
    if setup.find_nvcc() is None:
        pytest.skip("no nvcc")
    source = tmp_path / "wasteful.cu"
    source.write_text(
        "__global__ void wasteful(int* x, int i) { int a[64]; for (int k = 0; k < 64; ++k) a[(k * i) & 63] = x[k]; "
        "x[i] = a[i]; }\n"
    )
    command = [setup.find_nvcc(), *setup.NVCC_FLAGS, "-arch=sm_90", "-c", str(source), "-o", str(tmp_path / "o.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (usage,) = setup.ptxas_report(done.stderr)
    assert usage.arch == "sm_90" and usage.stack >= 256


def test_architectures(setup, monkeypatch):
    monkeypatch.delenv("DAM_CUDA_ARCHS", raising=False)
    assert setup.cuda_archs() == ["80", "90"]
    for text, archs in (("9.0 8.0", ["80", "90"]), ("100,90a;86", ["86", "90a", "100"]), (" 120 ", ["120"])):
        monkeypatch.setenv("DAM_CUDA_ARCHS", text)
        assert setup.cuda_archs() == archs
    for text in ("", "sm_90", "hopper", "75"):
        monkeypatch.setenv("DAM_CUDA_ARCHS", text)
        with pytest.raises(SystemExit, match="DAM_CUDA_ARCHS"):
            setup.cuda_archs()


def test_what_is_built(setup, monkeypatch):
    """With nvcc by default, without it by request only as an error."""

    def names():
        return [extension.name for extension in setup.extensions()]

    monkeypatch.chdir(CHECKOUT)
    for name in ("DAM_BUILD_CUDA", "DAM_EMULATE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    assert names() == ["dam._cpu", "dam._cuda"]
    monkeypatch.setenv("DAM_BUILD_CUDA", "0")
    monkeypatch.setenv("DAM_EMULATE_CUDA", "1")
    assert names() == ["dam._cpu", "dam._cuda_emulated"]
    monkeypatch.delenv("DAM_EMULATE_CUDA")
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert names() == ["dam._cpu"]
    monkeypatch.delenv("DAM_BUILD_CUDA")
    assert names() == ["dam._cpu"]
    monkeypatch.setenv("DAM_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc"):
        names()
