"""The base of `dam countdown`: its corpus follows the rule of the problems, its training goes on where it was cut."""

import pytest
import torch

from dam.ctmc import MaskedCTMC
from dam.models import MaskedLM
from dam.tasks import countdown
from dam.tasks import countdown_base as base

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the base is trained by torch.optim.Muon")


def read(lines):
    """Numbers, target and expression of each line, by its tokens alone."""
    tokenizer = base.tokenizer()
    for ids in lines.input_ids.tolist():
        prompt, expression = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:-8], ids[-8:]))
        numbers, target = prompt.split(" = ")
        yield [int(number) for number in numbers.split()], int(target), expression


def test_without_slips_every_line_is_right(monkeypatch):
    monkeypatch.setattr(base, "SLIP", 0.0)
    lines = base.corpus(1000, [0, 1])
    assert lines.input_ids.shape == lines.attention_mask.shape == (1000, base.PROMPT + base.COMPLETION)
    sizes = []
    for numbers, target, expression in read(lines):
        assert countdown.check(expression, numbers, target).correct, (numbers, target, expression)
        sizes.append(len(numbers))
    assert 80 < sizes.count(2) < 180 and sizes.count(3) == 1000 - sizes.count(2)
    # Padded on the left, where there are two numbers.
    assert (lines.attention_mask.sum(dim=1) - base.COMPLETION - 2).tolist() == sizes
    assert bool((lines.attention_mask[:, 1:] == 1).all())


def test_most_lines_are_wrong_by_their_signs_only():
    right = 0
    for numbers, target, expression in read(base.corpus(1000, [0, 2])):
        verdict = countdown.check(expression, numbers, target)
        assert verdict.format and verdict.numbers_right
        right += verdict.correct
    assert 350 < right < 500


def test_problems_have_the_law_of_those_drawn_one_by_one(monkeypatch):
    """Shares of targets up to 25 and of largest numbers up to 50: 2,000 lines and 2,000 problems, z below 5."""
    monkeypatch.setattr(base, "PAIRS", 0.0)
    drawn = [(problem.numbers, problem.target) for problem in countdown.draw_problems(2000, 0)]
    corpus = [(numbers, target) for numbers, target, _ in read(base.corpus(2000, [0, 3]))]
    for event in (lambda numbers, target: target <= 25, lambda numbers, target: max(numbers) <= 50):
        shares = [sum(event(*problem) for problem in problems) / 2000 for problems in (drawn, corpus)]
        assert abs(shares[0] - shares[1]) < 5 * (0.25 * 2 / 2000) ** 0.5


def test_no_line_is_of_a_held_out_or_excluded_problem():
    every = [(numbers, target) for numbers, target, _ in read(base.corpus(400, [0, 4]))]
    assert not any(countdown.is_held_out(*problem) for problem in every)
    shuffled = [(numbers[::-1], target) for numbers, target in every]
    left = [(numbers, target) for numbers, target, _ in read(base.corpus(400, [0, 4], base.excluded(shuffled)))]
    assert len(left) == 400 and not base.excluded(left) & base.excluded(every)


def test_text_survives_the_tokenizer():
    tokenizer = base.tokenizer()
    ids = tokenizer(base.prompt([3, 100, 25], 7) + "(3+100)*25")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "3 100 25 = 7 ( 3 + 100 ) * 25"
    padded = tokenizer(["1 2 3 = 6", "1 2 = 3"], padding=True)
    assert padded["attention_mask"][1] == [0, 1, 1, 1, 1]


def test_padding_teaches_nothing(monkeypatch):
    """Lines of two numbers are padded on the left: what stands there changes no loss."""
    monkeypatch.setattr(base, "PAIRS", 1.0)
    tokenizer, model, lines = base.tokenizer(), base.network(0), base.corpus(16, [0, 5])
    assert bool((lines.input_ids[:, 0] == tokenizer.pad_token_id).all())
    process = MaskedCTMC(mask_token=tokenizer.mask_token_id, suppress=(tokenizer.pad_token_id,))
    losses = []
    for vector in (0.0, 10.0):
        model.get_input_embeddings().weight.data[tokenizer.pad_token_id, ::2] = vector
        losses.append(base._denoising_loss(MaskedLM(model), process, lines, [0, 5]).detach())
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(("numbers", "target"), [([1, 2, 101], 5), ([1, 2, 3, 4], 5), ([1, 2, 3], 0)], ids=str)
def test_a_problem_that_the_model_has_no_words_for_is_refused(numbers, target):
    with pytest.raises(ValueError, match="knows problems of 2 or 3 numbers from 1 to 100"):
        base.prompt(numbers, target)


def test_pretraining_that_was_cut_short_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_SAVED_EVERY", 2)
    monkeypatch.setattr(base, "BATCH", 8)
    monkeypatch.setattr(base, "_SHOWN_EVERY", 3)
    shown = []
    whole = base.pretrained(tmp_path / "whole", 3, steps=7, show=lambda model, step: shown.append(step))
    assert shown == [3, 6]
    corpus, left = base.corpus, [5]

    def cut(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return corpus(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(base, "corpus", cut)
        with pytest.raises(KeyboardInterrupt):
            base.pretrained(tmp_path / "part", 3, steps=7)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["pretraining.pt"]
    done = torch.load(tmp_path / "part" / "pretraining.pt", weights_only=True)["done"]
    model = base.pretrained(tmp_path / "part", 3, steps=7)
    assert done == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    # What is there is not made again.
    monkeypatch.setattr(base, "_pretrain", lambda *arguments: pytest.fail("made again"))
    base.pretrained(tmp_path / "part", 3, steps=7)
