"""One op, one name, in every room of the house; and an example call, over which what every op owes is tested."""

from pathlib import Path

import pytest

from tests import calls

CHECKOUT = Path(__file__).parents[2]
ROOMS = ("dam/ops/{}.py", "kernels/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py")
# The linear ops are matmuls of the library with the row ops between them, or Triton's.
OF_ROWS_AND_STATES = ("csrc/cpu/{}.cpp", "csrc/cuda/{}.cu")


def missing_of(call, root):
    """The files that an op should have below `root` and has not."""
    rooms = ROOMS if call.family == "linear" else ROOMS + OF_ROWS_AND_STATES
    return [path for path in (room.format(call.name) for room in rooms) if not (root / path).is_file()]


def test_every_public_op_has_an_example_call():
    names = [call.name for call in calls.CALLS]
    missing, unknown = set(calls.public_ops()) - set(names), set(names) - set(calls.public_ops())
    assert not missing, f"tests/calls.py has no call of {', '.join(sorted(missing))}"
    assert not unknown, f"tests/calls.py calls {', '.join(sorted(unknown))}, which dam does not export"
    assert len(names) == len(set(names))


@calls.each()
def test_every_op_stands_in_every_room(call):
    assert call.family == "linear" if call.name.startswith("linear_") else call.family in ("rows", "states")
    missing = missing_of(call, CHECKOUT)
    assert not missing, f"{call.name} has no {', '.join(missing)}"


def test_every_op_is_public():
    found = {path.stem for path in (CHECKOUT / "dam" / "ops").glob("[!_]*.py")}
    assert found == set(calls.public_ops())


@pytest.mark.parametrize(("family", "count"), [("rows", 6), ("states", 6), ("linear", 4)])
def test_a_missing_file_is_named(family, count, tmp_path):
    call = calls.Call("entropy", family, dict)
    files = missing_of(call, tmp_path)
    assert len(files) == count and "dam/ops/entropy.py" in files
    for path in files[1:]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert missing_of(call, tmp_path) == ["dam/ops/entropy.py"]
