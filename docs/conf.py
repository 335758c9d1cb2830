"""Sphinx: `make docs`. Pages are Markdown where they lie in the repository; the API reference is made of docstrings.

The source folder is the repository's root, so that pages outside of docs/ are pages here too, and a link between two
pages is the same on GitHub and here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import dam

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/discrete-adjoint-matching/dam"

project, author = "dam", "The dam authors"
version = release = dam.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/*.md",
    "examples/**/*.md",
    "experiments/*.md",
    "benchmarks/*.md",
]
exclude_patterns = ["docs/_templates", "build", ".*"]

html_theme = "furo"
html_title = f"dam {release}"
templates_path = ["_templates"]
html_additional_pages = {"index": "to_index.html"}  # the site's root leads to docs/index
html_show_sourcelink = False
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": ""}

myst_heading_anchors = 4  # by GitHub's rule, as links between pages have them
myst_links_external_new_tab = False
nb_execution_mode = "off"  # notebooks are committed as they were executed

# Types stand in the signature; what a field of a NamedTuple is, in the comment behind it.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
autodoc_mock_imports = ["lm_eval"]  # its packages are 200 MB
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False
default_role = "py:obj"  # `dam.jump` leads there, and what is no name is code
nitpicky = True
# Most of what stands in backquotes is no name of ours, and no page of others is read: the build needs no network.
_OTHERS = "torch|numpy|transformers|accelerate|collections|pathlib|fractions|abc|os|lm_eval"
nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),
    ("py:class", rf"({_OTHERS})\..*|Tensor|Fraction|(dict|tuple)\[.*"),
    # Not part of the reference.
    ("py:class", r"dam\.(.*\._|models\.(prefix|canvas)\.|train\.(pretrained|progress)\.|derive\.errors\.Line).*"),
    ("py:exc", "OtherProcessError"),
]


TESTED, VERSIONS = "<!-- tested versions -->", ROOT / "docs" / "versions.json"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
QUOTED = re.compile(r"(`+.+?`+)", flags=re.DOTALL)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", links_elsewhere)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def links_elsewhere(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links of a page to files and folders that are no pages lead to the repository; MyST would copy what they name."""
    folder = ROOT / Path(docname).parent

    def led(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if ":" in match[2] or not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        name = target.relative_to(ROOT)
        if (name.suffix == ".md" and str(name.with_suffix("")) in app.env.found_docs) or name.suffix == ".png":
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/main/{name}{match[3] or ''}{match[4]}"

    source[0] = LINK.sub(led, source[0]).replace(TESTED, tested())


def tested() -> str:
    """The versions that tests were run on, as a table, where `make test-versions` has written them."""
    if not VERSIONS.exists():
        return TESTED
    from tests.versions import markdown  # of the working folder, where Sphinx is started

    return markdown(json.loads(VERSIONS.read_text(encoding="utf-8")))


def as_written(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring as reStructuredText: what is indented further below an empty line is a literal block, as in Markdown,
    and in what is left | and * mark nothing up.
    """
    made: list[str] = []
    # (Of a property's first line napoleon takes what is in front of a colon for its type: have none there.)
    prose: list[str] = []
    within: int | None = None  # indentation of the literal block that lines are in
    before = 0  # indentation of the text in front of it

    def end_of_prose() -> None:
        parts = QUOTED.split("\n".join(prose))
        parts[::2] = [re.sub(r"[|*]", r"\\\g<0>", part) for part in parts[::2]]
        made.extend("".join(parts).split("\n") if prose else [])
        prose.clear()

    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and within is not None and indent < within:
            within = None
        if line.strip() and within is None:
            if prose and not prose[-1].strip() and indent > before:
                end_of_prose()
                within = indent
                made += [" " * before + "::", ""]
            before = before if within is not None else indent
        (prose if within is None else made).append(line)
    end_of_prose()
    lines[:] = made
