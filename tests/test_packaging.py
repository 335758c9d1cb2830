"""What is installed and published: dam.kernels and dam.benchmarks are the folders kernels/ and benchmarks/, which are
not installed under their own names, and dam/csrc the headers that generated kernels include.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

import dam
from tests import release, versions

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["kernels", "benchmarks", "csrc"])
def test_folders_are_in_dam_by_a_link(folder):
    link = CHECKOUT / "dam" / folder
    assert link.is_symlink() and link.resolve() == (CHECKOUT / folder).resolve()


def test_packages_are_those_of_dam():
    """As setup.py finds them: every folder of modules in dam, the links among them."""
    packages = find_packages(str(CHECKOUT), include=["dam", "dam.*"])
    assert 'packages=find_packages(include=["dam", "dam.*"])' in (CHECKOUT / "setup.py").read_text(encoding="utf-8")
    roots = {"dam": "dam", "kernels": "dam/kernels", "benchmarks": "dam/benchmarks"}  # where each is found by setup.py
    folders = {
        ".".join((Path(found) / path.parent.relative_to(CHECKOUT / root)).parts)
        for root, found in roots.items()
        for path in (CHECKOUT / root).rglob("__init__.py")
    }
    assert {"dam.kernels", "dam.benchmarks.flows"} <= folders == set(packages)


@pytest.mark.slow
def test_a_source_distribution_is_the_repository(tmp_path):
    """By a copy of the checkout, in which the build leaves its files. Kernels and benchmarks are there once, and linked
    to.
    """
    source = versions.copy_sources(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    assert {f"kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")} <= members.keys()
    for folder in ("kernels", "benchmarks", "csrc"):
        assert not any(name.startswith(f"dam/{folder}/") for name in members)
        assert members[f"dam/{folder}"].issym() and members[f"dam/{folder}"].linkname == f"../{folder}"
    assert not any(name.endswith((".so", ".pyc")) for name in members)
    assert {"Makefile", "CHANGELOG.md", "CITATION.cff", "tests/train/tiny.py", "docs/performance.md"} <= members.keys()
    assert not release.lacking(members.keys())


def included(path):
    """The files of csrc that one includes, itself among them."""
    found, root = {path}, CHECKOUT / "csrc"
    for name in re.findall(r'^#include "(.+)"', (root / path).read_text(encoding="utf-8"), flags=re.MULTILINE):
        beside = (root / path).parent / name
        found |= included(str((beside if beside.exists() else root / name).resolve().relative_to(root)))
    return found


def test_headers_of_generated_kernels_are_installed(tmp_path):
    """All that one includes, by the step of a wheel's build that copies files of packages."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = included("cpu/defined.h")
    assert {"cpu/ops.def", "core/simd.h"} <= wanted
    assert all((tmp_path / "dam" / "csrc" / path).is_file() for path in wanted)


# What an index shows


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11+")
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_readme_of_an_index_has_no_link_that_dies(setup, monkeypatch):
    """To a file of the repository, at the tag of this version; code stays as it is."""
    monkeypatch.chdir(CHECKOUT)
    text, own = setup.long_description(), (CHECKOUT / "README.md").read_text(encoding="utf-8")
    prefix = f"{setup.REPOSITORY}/blob/v{dam.__version__}/"
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", own))
    assert all(link.startswith(("https://", "#")) for link in links)
    ours = [link.removeprefix(prefix).partition("#")[0] for link in links if link.startswith(prefix)]
    assert ours and all((CHECKOUT / path).exists() for path in ours)
    assert text.replace(prefix, "") == own
    assert setup.absolute_links("[a](#b) [c](d.md#e)\n```python\nf[0](x)\n```\n", "1.2") == (
        f"[a](#b) [c]({setup.REPOSITORY}/blob/v1.2/d.md#e)\n```python\nf[0](x)\n```\n"
    )


def test_metadata(project, setup):
    assert project["authors"] == [{"name": "The dam authors"}] and project["license"] == "Apache-2.0"
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= project["urls"].keys()
    assert project["urls"]["Source"] == setup.REPOSITORY
    assert not any("License ::" in each for each in project["classifiers"])  # an index refuses both
    oldest = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in project["classifiers"]
    for url in project["urls"].values():
        path = url.removeprefix(setup.REPOSITORY).removeprefix("/blob/main").removeprefix("/tree/main")
        assert not url.startswith(f"{setup.REPOSITORY}/blob") or (CHECKOUT / path.lstrip("/")).exists(), url


def test_how_to_cite():
    """CITATION.cff by its format's required keys (1.2.0); version and paper are those of the library."""
    cited = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"], cited["type"]) == (dam.__version__, "Apache-2.0", "software")
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["So", "Karrer", "Fan", "Chen", "Liu"]
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert paper["url"] in readme and f"(So, Karrer, Fan, Chen, Liu, ICLR {paper['year']}," in readme


def test_what_is_not_to_be_published(tmp_path, monkeypatch):
    """A wheel that only this machine can load, without kernels, or with another OpenMP; a distribution with gaps."""
    wheel, archive = tmp_path / "dam-1-cp311-cp311-linux_x86_64.whl", tmp_path / "dam-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("dam.libs/libgomp-1234.so.1", "")
    with tarfile.open(archive, "w:gz") as file:
        file.add(CHECKOUT / "Makefile", "dam-1/Makefile")
        file.add(CHECKOUT / "dam" / "kernels", "dam-1/dam/kernels")
        file.addfile(tarfile.TarInfo("dam-1/dam/benchmarks"))
    monkeypatch.setattr(release, "tracked", lambda: {"Makefile", "setup.py", "dam/kernels", "dam/benchmarks"})
    assert release.faults(archive, wheel) == [
        f"{wheel.name} has no manylinux tag",
        f"{wheel.name} lacks the C++ kernels",
        f"{wheel.name} has a copy of libgomp.so.1",
        "dam-1.tar.gz lacks setup.py",
        "dam-1.tar.gz has a copy of what dam/benchmarks leads to",
    ]
    good = tmp_path / "dam-1-cp311-cp311-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(good, "w") as file:
        file.writestr("dam/_cpu.cpython-311-x86_64-linux-gnu.so", "")
    monkeypatch.setattr(release, "tracked", lambda: {"Makefile"})
    assert release.faults(archive, good) == []
