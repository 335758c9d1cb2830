"""pytest benchmarks: each function of each case, op and dtype as a test of pytest-benchmark."""

from __future__ import annotations

import functools

import pytest
import torch

from dam.benchmarks import harness, options, records

_floor_seconds = {}  # by op, dtype, sizes and case, as soon as the floor is measured


def pytest_addoption(parser):
    options.add(parser.getgroup("benchmarks", "sizes and dtypes of the operations").addoption, harness.DTYPES)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info):
    """Results are committed, and whose machine it was is nobody's business."""
    machine_info.pop("node", None)


def op_of(path):
    return path.stem.removeprefix("bench_")


def pytest_collection_modifyitems(config, items):
    """A size that nothing has which is to be measured is an error."""
    if ops := {op_of(item.path): None for item in items if "function" in item.fixturenames}:
        try:
            options.sizes(config.option, ops)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc):
    if "function" in metafunc.fixturenames:
        op = op_of(metafunc.definition.path)
        cases = harness.cases_of(op)
        given = options.sizes(metafunc.config.option, harness.ops())
        metafunc.parametrize(
            "function",
            [
                pytest.param((op, dtype, sizes, n, name), id=identity(op, dtype, sizes, case.label, name))
                for dtype in options.dtypes(metafunc.config.option, harness.DTYPES)
                for n, case in enumerate(harness.tiny_cases(cases, getattr(torch, dtype)))
                for sizes in options.sweep(op, given)
                for name in (case.floor_name, *case.functions, *case.compiled)
            ],
            indirect=True,
        )


def identity(op, dtype, sizes, label, name):
    """With the sizes that are not the op's own, so that --benchmark-compare compares times of one size."""
    own = harness.sizes_of(harness.cases_of(op))
    others = [f"{options.SIZES[size][0]}={n}" for size, n in sizes.items() if n != own[size]]
    return "-".join([dtype, *([",".join(others)] if others else []), label, name])


@functools.lru_cache(maxsize=1)
def _cases(op, dtype, **sizes):
    """The functions of one op and dtype share their inputs; another op's or dtype's replace them."""
    return harness.cases_of(op)(getattr(torch, dtype), **sizes)


@functools.lru_cache(maxsize=1)
def _record(op, dtype, n, **sizes):
    return records.of_case(op, _cases(op, dtype, **sizes)[n], sizes, dtype)


@pytest.fixture
def function(request, benchmark):
    op, dtype, sizes, n, name = request.param
    case = _cases(op, dtype, **sizes)[n]
    benchmark.group = f"{case.label}, {options.text(sizes)}, {dtype}"
    benchmark.extra_info.update(_record(op, dtype, n, **sizes), function=name)
    chosen = {case.floor_name: case.floor, **case.functions, **case.compiled}[name]
    try:
        chosen()  # to warm up
        checks = case.checked(chosen)
    except Exception as error:
        if name in (case.floor_name, "dam"):
            raise
        pytest.skip(f"absent: {harness.reason(error)}")
    if wrong := [str(check) for check in checks if not check.passed]:
        pytest.fail(f"{name} is not measured: {'; '.join(wrong)}")
    benchmark.extra_info["errors"] = {check.what: check.error for check in checks}
    if by := {check.what: check.arithmetic for check in checks if check.arithmetic}:
        benchmark.extra_info["arithmetic"] = by
    yield chosen
    key = (op, dtype, n, *sizes.values())
    if name == case.floor_name and benchmark.stats is not None:
        _floor_seconds[key] = benchmark.stats.stats.median
    if key in _floor_seconds:
        benchmark.extra_info["floor_seconds"] = _floor_seconds[key]
