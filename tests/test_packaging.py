"""What an installation holds: dam.kernels and dam.benchmarks are the folders kernels/ and benchmarks/, which are not
installed under their own names.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools import find_packages

from tests import versions

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["kernels", "benchmarks"])
def test_folders_are_in_dam_by_a_link(folder):
    link = CHECKOUT / "dam" / folder
    assert link.is_symlink() and link.resolve() == (CHECKOUT / folder).resolve()


def test_packages_are_those_of_dam():
    """As setup.py finds them: every folder of modules in dam, the links among them."""
    packages = find_packages(str(CHECKOUT), include=["dam", "dam.*"])
    assert 'packages=find_packages(include=["dam", "dam.*"])' in (CHECKOUT / "setup.py").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(CHECKOUT) for path in (CHECKOUT / "dam").rglob("__init__.py")}
    assert {"dam.kernels", "dam.benchmarks"} | {".".join(folder.parts) for folder in folders} == set(packages)


@pytest.mark.slow
def test_a_source_distribution_has_the_kernels_once(tmp_path):
    """By a copy of the checkout, in which the build leaves its files."""
    source = versions.copy_sources(tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"dam/kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")} <= names
    assert not any(name.split("/")[0] == "kernels" for name in names)
    assert {"csrc/cpu/ops.def", "csrc/cuda/ops.def", "dam/tasks/data"} <= names | {str(Path(n).parent) for n in names}
