"""`make test-versions`, short of installing anything."""

import re
from pathlib import Path

from tests import versions

CHECKOUT = Path(__file__).parent.parent


def test_what_a_run_is_made_of_and_when_it_fails(monkeypatch):
    """The oldest torch, the constraints without torch's own, and what makes a run a failure."""
    assert versions.oldest('dependencies = ["torch>=2.6", "numpy"]') == "2.6"
    assert versions.oldest((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = "torch==2.13.0\ntriton==3.9.0\nnumpy==2.4.6\npeft==0.21.2\n"
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
        monkeypatch.setattr(versions, "build_wheel", lambda folder: folder / "dam.whl")
        monkeypatch.setattr(versions, "try_release", lambda package, version, *_: left.pop(0))
        return versions.main()

    monkeypatch.setenv("TORCH_VERSIONS", "2.6.0 2.7.0")
    assert results(good, good) == 0 and results(good, bad) == 1


def test_what_is_left_out():
    """Whatever has a mark: each says why a run may do without it, and with them one here would take hours."""
    pyproject = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    marks = re.findall(r'"(\w+): ', pyproject.partition("markers = [")[2].partition("]")[0])
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
    for name in ("TORCH_VERSIONS", "TRANSFORMERS_VERSIONS"):
        monkeypatch.delenv(name, raising=False)
    torches = [("torch", versions.oldest(pyproject)), ("torch", "9.9.9")]
    recommended = [("transformers", version) for version in ("4.49.0", "4.53.3", "4.57.6")]
    assert versions.asked_for(pyproject) == [*torches, *recommended]
    monkeypatch.setenv("TRANSFORMERS_VERSIONS", "5.0.0")
    assert versions.asked_for(pyproject) == [("transformers", "5.0.0")]
    # The documentation tells to install what is tried.
    told = (CHECKOUT / "docs" / "models.md").read_text(encoding="utf-8")
    for version in versions.RECOMMENDED:
        pins = versions.pins_of("transformers", version)
        assert "pip install " + " ".join(f"'{name}=={release}'" for name, release in pins.items()) in told
