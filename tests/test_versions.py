"""`make test-versions`, short of installing torch."""

from pathlib import Path

from tests import versions

CHECKOUT = Path(__file__).parent.parent


def test_what_a_run_is_made_of_and_when_it_fails(monkeypatch):
    """The oldest torch, the constraints without torch's own, and what makes a run a failure."""
    assert versions.oldest('dependencies = ["torch>=2.6", "numpy"]') == "2.6"
    assert versions.oldest((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    assert versions.other_constraints("torch==2.13.0\ntriton==3.9.0\nnumpy==2.4.6\n") == "numpy==2.4.6\n"
    report = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert versions.counts(report) == (3, 4, 3)
    good = versions.Result("2.6.0", passed=4, skipped=3)
    assert good.good and not good._replace(failed=1).good and not good._replace(passed=0).good
    bad = good._replace(trouble="pytest ended with 2")
    assert not bad.good and "pytest ended with 2" in versions.table([good, bad])

    def results(*found):
        left = list(found)
        monkeypatch.setattr(versions, "build_wheel", lambda folder: folder / "dam.whl")
        monkeypatch.setattr(versions, "try_release", lambda version, wheel, folder: left.pop(0))
        return versions.main()

    monkeypatch.setenv("TORCH_VERSIONS", "2.6.0 2.7.0")
    assert results(good, good) == 0 and results(good, bad) == 1
