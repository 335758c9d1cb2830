"""What the README shows works as it stands there, and links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/grpo.md",
    "docs/moves.md",
    "docs/processes.md",
    "docs/tasks.md",
    "examples/dare/README.md",
    "examples/accelerate/README.md",
    "benchmarks/README.md",
    "benchmarks/notes.md",
    "experiments/README.md",
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS, TRAINING, CHAINS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_operations_in_a_loop_of_ones_own():
    names = {}
    exec(OPERATIONS, names)
    gradients = (names["hidden"].grad, names["head"].weight.grad)
    assert all(bool(gradient.isfinite().all()) and bool((gradient != 0).any()) for gradient in gradients)


def test_fine_tuning_a_model(tmp_path):
    # The same script, for one rollout of few puzzles.
    shortened = TRAINING.replace('"out"', repr(str(tmp_path)))
    for long, short in (("max_steps=400", "max_steps=4"), ("batch_size=64 * 16", "batch_size=4 * 16"), ("4096", "4")):
        assert long in shortened
        shortened = shortened.replace(long, short)
    names = {}
    exec(shortened, names)
    assert names["trainer"].reward_calls == 4 * names["args"].num_generations
    assert names["trainer"].state.global_step == 4


def test_a_chain_that_is_not_masked():
    names = {}
    exec(CHAINS, names)
    assert names["path"].final.shape == (64, 3) and abs(float(names["weights"].weight.mean()) - 1) < 1e-5


def test_every_operation_is_listed():
    import dam

    for name in dam.__all__:
        if name[0].islower():
            assert f"`{name}`" in README or f"dam.{name}" in README, name


def anchors(page):
    """Of the headings of a page, as GitHub makes them: lower case, without punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    links = [link for link in links if not link.startswith(("http:", "https:"))]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
