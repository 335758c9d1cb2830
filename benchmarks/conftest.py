"""pytest benchmarks/bench_<op>.py: each function of each case and dtype as a test of pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import harness

# The functions of one op and dtype share their inputs; another op's or dtype's replace them.
_cases = functools.lru_cache(maxsize=1)(lambda cases, dtype: cases(getattr(torch, dtype)))


def pytest_generate_tests(metafunc):
    if "function" in metafunc.fixturenames:
        cases = metafunc.module.cases
        metafunc.parametrize(
            "function",
            [
                pytest.param((cases, dtype, n, name), id=f"{dtype}-{case.label}-{name}")
                for dtype in harness.DTYPES
                for n, case in enumerate(harness.tiny_cases(cases, getattr(torch, dtype)))
                for name in (case.floor_name, *case.functions, *case.compiled)
            ],
            indirect=True,
        )


@pytest.fixture
def function(request, benchmark):
    cases, dtype, n, name = request.param
    case = _cases(cases, dtype)[n]
    benchmark.group = f"{case.label}, {dtype}"
    chosen = {case.floor_name: case.floor, **case.functions, **case.compiled}[name]
    try:
        chosen()  # to warm up
    except Exception as error:
        if name in (case.floor_name, "dam"):
            raise
        pytest.skip(f"absent: {harness.reason(error)}")
    return chosen
