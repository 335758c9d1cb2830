"""`dam generate` and `dam eval`: completions that depend on their row and sample only, files gone on with, metrics."""

import json
import math

import pytest
import torch

pytest.importorskip("datasets", reason="needs the package datasets")

from transformers import BertConfig, BertForMaskedLM, ModernBertConfig

from dam import cli
from dam.commands.completing import Completer, Law, options_path, read_completions
from dam.commands.evaluate import interval, wilson
from dam.commands.generate import prompts_of
from dam.decoding import Decoding
from dam.models import as_denoiser
from dam.recipes.characters import CHARACTERS, characters_tokenizer
from dam.recipes.small import random_model, small_config
from dam.tasks import TASKS
from dam.train.pretrained import Source, fingerprint
from tests.architectures import small_sizes
from tests.test_recipes import EXAMPLES

TOKENIZER = characters_tokenizer()
PROMPTS = ["1+1", "a longer prompt", "what?", "2*3", "seven"]
SAMPLED = Decoding(temperature=1.0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(seed=0):
    return random_model(
        small_config(ModernBertConfig(), TOKENIZER),
        auto_class=None,
        dtype="float32",
        trust_remote_code=False,
        seed=seed,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    small_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, ""]))
    return str(path)


def generated(folder, prompts, out, *more):
    common = ["--max-completion-length", "6", "--temperature", "1", "--order", "random", "--seed", "3"]
    return cli.main(["generate", folder, "--prompts", prompts, "--out", str(out), *common, *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Files


def test_a_file_has_a_line_for_each_sample(folder, prompts, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    assert generated(folder, prompts, out, "--samples", "2", "--batch-size", "3") == 0
    found = lines(out)
    assert [(line["row"], line["sample"]) for line in found] == [(n, k) for n in range(5) for k in range(2)]
    assert [line["prompt"] for line in found[::2]] == [[{"role": "user", "content": text}] for text in PROMPTS]
    for line in found:
        ids = line["completion_ids"]
        assert 1 <= len(ids) <= 6 and TOKENIZER.decode(ids, skip_special_tokens=True) == line["completion"]
        assert TOKENIZER.mask_token_id not in ids and TOKENIZER.eos_token_id not in ids[:-1]
    assert len({line["completion"] for line in found}) > 8  # two samples of a prompt are two


def test_an_interrupted_file_goes_on_to_the_same_bytes(folder, prompts, tmp_path, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = ("--samples", "2", "--batch-size", "4")
    assert generated(folder, prompts, whole, *arguments) == 0
    text = whole.read_bytes()
    options = options_path(whole).read_bytes()
    # Nothing yet; in a line; behind one, in the middle of a batch; at the end.
    starts = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in (0, starts[4] + 9, starts[5], len(text)):
        out.write_bytes(text[:cut])
        options_path(out).write_bytes(options)
        assert generated(folder, prompts, out, *arguments) == 0
        assert out.read_bytes() == text
    assert generated(folder, prompts, out, *arguments, "--seed", "4") == 1
    assert "was started with other options: law" in capsys.readouterr().err
    options_path(out).unlink()
    assert generated(folder, prompts, out, *arguments) == 1
    assert "was not made by dam" in capsys.readouterr().err
    assert out.read_bytes() == text


def test_other_weights_and_other_prompts_are_other_options(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert generated(folder, prompts, out) == 0
    with open(prompts, "a") as file:
        file.write("one more\n")
    assert generated(folder, prompts, out) == 1
    assert "prompts" in capsys.readouterr().err
    model = small_model()
    before = fingerprint(model)
    assert before == fingerprint(small_model())
    with torch.no_grad():
        model.model.layers[1].mlp.Wo.weight[-1, -1] += 1e-6
    assert fingerprint(model) != before


def test_lines_that_do_not_belong_there_are_refused(folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert generated(folder, prompts, out) == 0
    swapped = out.read_text().splitlines(keepends=True)
    out.write_text("".join([swapped[1], swapped[0], *swapped[2:]]))
    assert generated(folder, prompts, out) == 1
    assert "line 1: not the sample that belongs there" in capsys.readouterr().err


# Completions


def completions(model, rows, batch_size, **law):
    completer = Completer(model, TOKENIZER, Law(**{"max_completion_length": 6, "seed": 3, "decoding": SAMPLED, **law}))
    jobs = [(n, k, {"prompt": row}) for n, row in enumerate(rows) for k in range(law.get("samples", 1))]
    parts = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    return {made[:2]: made.completion_ids for part in parts for made in completer.complete(part)}


def test_a_completion_depends_on_its_row_and_sample_only():
    model = small_model()
    alone = completions(model, PROMPTS, 1, samples=3)
    assert completions(model, PROMPTS, 15, samples=3) == alone
    assert completions(model, PROMPTS, 4, samples=3) == alone
    # More samples keep the first ones.
    assert completions(model, PROMPTS, 2, samples=1) == {key: ids for key, ids in alone.items() if key[1] == 0}
    assert completions(model, PROMPTS, 15, samples=3, seed=4) != alone


def test_a_model_that_padding_would_mislead_is_given_rows_of_one_length():
    torch.manual_seed(0)
    sizes = {**small_sizes(len(TOKENIZER)), "pad_token_id": 0, "max_position_embeddings": 64}
    model = BertForMaskedLM(BertConfig(**sizes, initializer_range=0.5)).eval()
    rows = [PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[2]]
    assert completions(model, rows, 4) == completions(model, rows, 1)


def test_log_probs_of_one_token_are_the_model_s_own():
    """And those of a batch those of rows alone, whatever is padded."""
    model = small_model()
    completer = Completer(model, TOKENIZER, Law())
    encoded = [TOKENIZER(text)["input_ids"] for text in PROMPTS]
    behind = [[7], [9, 8, 20], [11], [5, 6], [30]]
    pairs = [(n, *pair) for n, pair in enumerate(zip(encoded, behind, strict=True))]
    together, greedy = completer.log_probs(pairs, 3)
    for pair, found in zip(pairs, together, strict=True):
        torch.testing.assert_close(completer.log_probs([pair], 3)[0][0], found, rtol=0, atol=1e-5)
    mask = TOKENIZER.mask_token_id
    ids = torch.tensor([[*encoded[0], mask]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].double()
    logits[mask] = -math.inf
    torch.testing.assert_close(
        together[0], logits.log_softmax(dim=0)[7].expand(3), rtol=0, atol=1e-5, check_dtype=False
    )
    best = int(logits.argmax())
    values, is_greedy = completer.log_probs([(0, encoded[0], [best])], 1)
    assert bool(is_greedy[0]) and values[0, 0] > together[0, 0] and not bool(greedy[0])


def test_adapters_load_with_their_model(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    config = peft.LoraConfig(r=2, target_modules=["Wqkv"], init_lora_weights=False)
    adapted = peft.get_peft_model(Source(folder).model(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    source = Source(str(tmp_path / "adapter"))
    loaded = source.model()
    tokens = torch.arange(4, 20)[None]
    ones = torch.ones_like(tokens)
    base, ours, theirs = (
        as_denoiser(model.eval()).hidden_states(tokens, ones) for model in (small_model(), loaded, adapted)
    )
    assert torch.equal(ours, theirs) and not torch.allclose(ours, base, atol=1e-3)
    assert source.tokenizer().get_vocab() == TOKENIZER.get_vocab()
    assert source.config().model_type == "modernbert"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trained = [name for name, p in source.model(trainable=True).named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora" in name for name in trained)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"samples": 2, "decoding": Decoding("confidence", temperature=0.0)}, "all 2 samples .* would be the same"),
        ({"steps": 2, "decoding": Decoding("confidence", 0.5)}, "a threshold tells how many"),
        ({"samples": 0}, "samples must be at least 1; got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
    ],
)
def test_a_law_that_cannot_be_right(law, message):
    with pytest.raises(ValueError, match=message):
        Law(**law)


# Prompts


def test_prompts_are_lines_or_objects():
    assert prompts_of("a\n\n b{}\n", "f") == [{"prompt": "a"}, {"prompt": " b{}"}]
    messages = [{"role": "user", "content": "x"}]
    text = "\n".join(json.dumps(row) for row in ({"prompt": "a", "id": 3}, {"prompt": messages}))
    assert prompts_of(text, "f") == [{"prompt": "a"}, {"prompt": messages}]
    for bad, message in (
        ('{"prompt": "a"}\nb', "f, line 2: no JSON object"),
        ('{"prompt": "a"}\n{"text": "b"}', 'f, line 2: a JSON object with "prompt"'),
        ('{"prompt": "a"}\n\n[3]', "f, line 3: a JSON object"),
        (" \n", "f: no prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            prompts_of(bad, "f")


def test_text_goes_through_the_chat_template_unless_told(folder, prompts, tmp_path):
    assert generated(folder, prompts, tmp_path / "out.jsonl", "--no-chat", "--limit", "2") == 0
    assert [line["prompt"] for line in lines(tmp_path / "out.jsonl")] == PROMPTS[:2]


def test_the_tokenizer_of_characters_says_what_it_was_given():
    text = "".join(CHARACTERS)
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(CHARACTERS) and TOKENIZER.decode(ids) == text
    assert TOKENIZER("é")["input_ids"] == [TOKENIZER.unk_token_id]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o"], "give --prompts or --task, one of them"),
        (["--task", "chess", "--out", "o"], "there is no task 'chess'"),
        (["--prompts", "p", "--out", "o", "--samples", "2"], "all 2 samples of a prompt would be the same"),
        (["--prompts", "missing", "--out", "o"], "missing"),
        (["--prompts", "p", "--out", "o", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_an_error_comes_before_the_work(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Completer, "complete", lambda *_: pytest.fail("the work has started"))
    assert cli.main(["generate", folder, *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dam generate: ") and message in error


# Metrics


def test_metrics_are_the_task_s_and_go_on(folder, tmp_path, capsys):
    source = str(EXAMPLES / "countdown_held_out.jsonl")
    out = tmp_path / "eval"
    arguments = ["eval", folder, "--task", "countdown", "--source", source, "--limit", "3", "--out", str(out)]
    arguments += ["--samples", "2", "--temperature", "1", "--max-completion-length", "4"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "pass@2" in shown and "countdown, 3 rows, 2 samples each" in shown
    result = json.loads((out / "metrics.json").read_text())
    made = [completion.completion for completion in read_completions(out / "completions.jsonl")]
    task = TASKS["countdown"]
    rows = task.rows(source, split="test", limit=3)
    expected = task.metrics([made[0:2], made[2:4], made[4:6]], rows)
    assert {name: found["value"] for name, found in result["metrics"].items()} == expected
    whole = (out / "completions.jsonl").read_bytes()
    (out / "completions.jsonl").write_bytes(whole[:-40])
    (out / "metrics.json").unlink()
    assert cli.main(arguments) == 0
    assert (out / "completions.jsonl").read_bytes() == whole
    assert json.loads((out / "metrics.json").read_text()) == result


def test_what_rows_have_makes_up_the_metrics():
    task = TASKS["countdown"]
    rows = [{"numbers": [2, 3], "target": 5}, {"numbers": [4, 3], "target": 12}]
    right, wrong = "<answer>2+3</answer>", "<answer>4+3</answer>"
    means, by_row = task.metrics_by_row([[right, wrong], [wrong, wrong]], rows)
    assert by_row == {"exact": [0.5, 0.0], "pass@1": [0.5, 0.0], "pass@2": [1.0, 0.0]}
    assert {name: means[name] for name in by_row} == {"exact": 0.25, "pass@1": 0.25, "pass@2": 0.5}


def test_intervals():
    # Wilson's of 8 of 10, and of 0 of 20 (Newcombe, Two-sided confidence intervals for the single proportion, 1998).
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert interval([1.0] * 8 + [0.0] * 2) == wilson(8, 10)
    low, high = interval([0.5, 0.25, 0.75, 0.5])
    error = math.sqrt((0.25**2 * 2 / 3) / 4)
    assert (low, high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=1e-4)
    assert interval([0.5]) is None and interval([0.5, 0.5]) is None


def test_prompts_are_cut_at_line_ends_only():
    assert prompts_of("a\u2028b\r\nc\x0cd\n", "f") == [{"prompt": "a\u2028b"}, {"prompt": "c\x0cd"}]
    assert prompts_of('{"prompt": "a\u2028b"}\n', "f") == [{"prompt": "a\u2028b"}]
    assert prompts_of("[INST] a\n", "f") == [{"prompt": "[INST] a"}]
    with pytest.raises(ValueError, match="f is one JSON list"):
        prompts_of('[{"prompt": "a"},\n {"prompt": "b"}]', "f")


def test_a_byte_order_mark_is_no_part_of_a_prompt(folder, tmp_path):
    given, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    given.write_bytes(b'\xef\xbb\xbf{"prompt": "1+1"}\n')
    assert generated(folder, str(given), out) == 0
    assert [line["prompt"] for line in lines(out)] == [[{"role": "user", "content": "1+1"}]]


@pytest.mark.parametrize(
    ("option", "value", "told"), [("--limit", "-1", "limit must be at least 1"), ("--device", "nowhere", "no device")]
)
def test_what_cannot_be_right_is_refused(option, value, told, folder, prompts, tmp_path, capsys):
    assert generated(folder, prompts, tmp_path / "out.jsonl", option, value) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
