"""`make test-versions`, short of installing anything."""

import json
import re
import zipfile
from pathlib import Path

import pytest

from tests import versions

CHECKOUT = Path(__file__).parent.parent


def test_what_a_run_is_made_of_and_when_it_fails(monkeypatch, tmp_path):
    """The oldest torch, the constraints without torch's own, and what makes a run a failure."""
    assert versions.oldest('dependencies = ["torch>=2.6", "numpy"]') == "2.6"
    assert versions.oldest((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = "torch==2.13.0\ntriton==3.9.0\nsympy==1.14.0\nnumpy==2.4.6\npeft==0.21.2\n"
    assert versions.other_constraints(pinned, {"torch": "2.6.0"}) == "numpy==2.4.6\npeft==0.21.2\ntorch==2.6.0\n"
    assert versions.other_constraints(pinned, {"peft": "0.15.0"}) == pinned.replace("0.21.2", "0.15.0")
    report = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert versions.counts(report) == (3, 4, 3)
    good = versions.Result("2.6.0", passed=4, skipped=3)
    assert good.good and not good._replace(failed=1).good and not good._replace(passed=0).good
    bad = good._replace(trouble="pytest ended with 2")
    assert not bad.good and "pytest ended with 2" in versions.table([good, bad])

    def results(*found):
        left = list(found)
        monkeypatch.setattr(versions, "RECORDS", tmp_path / "versions.json")
        monkeypatch.setattr(versions, "build_wheel", lambda folder: folder / "dam.whl")
        monkeypatch.setattr(versions, "check_wheel", lambda wheel: None)
        monkeypatch.setattr(versions, "try_release", lambda package, version, *_: left.pop(0))
        return versions.main()

    monkeypatch.setenv("TORCH_VERSIONS", "2.6.0 2.7.0")
    assert results(good, good) == 0 and results(good, bad) == 1


def test_what_was_run_is_kept_with_its_date(tmp_path):
    """A release once, its newest run; in the order of the numbers, and as a table."""
    path = tmp_path / "versions.json"
    newest = versions.Result("2.14.1", "2.4.6", "5.23.0", "1.15.0", "0.21.2", passed=90, skipped=3, seconds=61.4)
    oldest = newest._replace(torch="2.6.0", passed=80, failed=2)
    old_peft = newest._replace(torch="2.13.0", peft="0.15.0", trouble="not installed", passed=0)
    versions.record(path, "torch", newest, "2026-11-01")
    versions.record(path, "peft", old_peft, "2026-11-02")
    versions.record(path, "torch", oldest, "2026-11-03")
    versions.record(path, "torch", newest._replace(passed=91), "2026-11-04")
    records = json.loads(path.read_text())
    assert [(each["package"], each["torch"], each["passed"], each["good"]) for each in records] == [
        ("torch", "2.6.0", 80, False),
        ("torch", "2.14.1", 91, True),
        ("peft", "2.13.0", 0, False),
    ]
    assert (records[1]["date"], records[1]["seconds"]) == ("2026-11-04", 61)
    python = records[0]["python"]
    assert versions.markdown(records).splitlines()[2:] == [
        f"| **2.6.0** | 5.23.0 | 1.15.0 | 0.21.2 | {python} | 2026-11-03 | 80 passed, 2 failed |",
        f"| **2.14.1** | 5.23.0 | 1.15.0 | 0.21.2 | {python} | 2026-11-04 | 91 passed, 0 failed |",
        f"| 2.13.0 | 5.23.0 | 1.15.0 | **0.15.0** | {python} | 2026-11-02 | not installed |",
    ]


def test_what_is_run_is_there():
    assert [path for paths in versions.TESTS.values() for path in paths if not (CHECKOUT / path).is_file()] == []


def test_what_is_left_out():
    """Whatever has a mark that says why a run may do without it: with them one here would take hours."""
    pyproject = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    marks = re.findall(r'"(\w+): ', pyproject.partition("markers = [")[2].partition("]")[0])
    marks.remove("of_the_op")  # of which simulated kernels alone are left out, as they are here
    assert marks and versions.SELECTION[:2] == ("-m", " and ".join(f"not {mark}" for mark in marks))


def test_what_a_release_of_transformers_is_tried_with(monkeypatch):
    """Those of its time; the oldest three are what pyproject.toml admits."""
    pyproject = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = {name: versions.oldest(pyproject, name) for name in ("transformers", "accelerate", "peft")}
    tried = versions.pins_of("transformers", min(versions.OF_ITS_TIME))
    assert {name: f"{release}.0" for name, release in lowest.items()} == tried
    assert versions.pins_of("transformers", "4.55.1")["peft"] == versions.OF_ITS_TIME["4.53.3"][1]
    assert versions.pins_of("torch", "2.6.0") == {"torch": "2.6.0"}
    monkeypatch.setattr(versions, "newest", lambda: "9.9.9")
    for name in ("TORCH_VERSIONS", "TRANSFORMERS_VERSIONS", "PEFT_VERSIONS"):
        monkeypatch.delenv(name, raising=False)
    torches = [("torch", versions.oldest(pyproject)), ("torch", "9.9.9")]
    recommended = [("transformers", version) for version in ("4.49.0", "4.53.3", "4.57.6")]
    assert versions.asked_for(pyproject) == [*torches, *recommended, ("peft", lowest["peft"])]
    monkeypatch.setenv("TRANSFORMERS_VERSIONS", "5.0.0")
    assert versions.asked_for(pyproject) == [("transformers", "5.0.0")]
    # The documentation tells to install what is tried.
    told = (CHECKOUT / "docs" / "models.md").read_text(encoding="utf-8")
    for version in versions.RECOMMENDED:
        pins = versions.pins_of("transformers", version)
        assert "pip install " + " ".join(f"'{name}=={release}'" for name, release in pins.items()) in told


def test_a_wheel_of_other_kernels_is_refused(tmp_path):
    kernels = [f"dam/kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")]

    def wheel(*names):
        with zipfile.ZipFile(tmp_path / "dam.whl", "w") as file:
            for name in names:
                file.writestr(name, "")
        return tmp_path / "dam.whl"

    versions.check_wheel(wheel(*kernels))
    for names in (kernels[1:], [*kernels, "kernels/__init__.py"]):
        with pytest.raises(SystemExit, match=r"the wheel lacks .*, or installs a package `kernels`"):
            versions.check_wheel(wheel(*names))


def test_pages_name_no_release_that_was_not_tried():
    """Releases are of three numbers: those that all tests run with, and those of docs/versions.json."""
    pages = [(CHECKOUT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/install.md")]
    told = {number for page in pages for number in re.findall(r"(?:==|\b)(\d+\.\d+\.\d+)\b", page)}
    pinned = re.findall(r"==(\S+)", (CHECKOUT / "constraints.txt").read_text(encoding="utf-8"))
    names = ("torch", "transformers", "accelerate", "peft")
    records = json.loads(versions.RECORDS.read_text(encoding="utf-8"))
    assert told <= {*pinned, *(each[name] for each in records if each["good"] for name in names)}


def test_the_page_names_the_newest_torch_that_was_tried():
    records = json.loads(versions.RECORDS.read_text(encoding="utf-8"))
    newest = max((each["torch"].partition("+")[0] for each in records if each["good"]), key=versions.numbers)
    page = (CHECKOUT / "docs" / "install.md").read_text(encoding="utf-8")
    assert re.findall(r"The newest torch of the table is ([\d.]*\d)", page) == [newest]
