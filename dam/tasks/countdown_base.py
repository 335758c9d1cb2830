"""The base of `dam countdown`: a tiny masked language model of careless sums, with its tokenizer and its corpus.

The corpus is text, `30 100 93 = 23` and behind it an expression of these numbers that reaches the target, in which
every other sign is written as a plus with a probability of `SLIP`: so most of its expressions are wrong. A model of it
knows which numbers and parentheses to write and, at each sign, what it should be and that it is a plus as a rule.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dam.adjoint import estimator_loss, group_targets
from dam.ctmc import MaskedCTMC
from dam.files import usual_modes
from dam.models.denoiser import MaskedLM
from dam.tasks import countdown

LARGEST = 100  # number and target
SIZES = (2, 3)  # numbers of a problem
PAIRS = 1 / 8  # share of problems with two numbers
COMPLETION = 8  # tokens of the longest expression and its end
SLIP = 0.6
SIGNS = "+-*/"
MASK, PAD, END, UNKNOWN = "<mask>", "<pad>", "<|endoftext|>", "<unk>"
WORDS = [MASK, PAD, END, UNKNOWN, *SIGNS, "(", ")", "=", *(str(number) for number in range(1, LARGEST + 1))]
_ID = {word: number for number, word in enumerate(WORDS)}
PROMPT = max(SIZES) + 2  # tokens of the longest prompt


def tokenizer() -> Any:
    """A word for each number of 1 .. 100 and each sign; spaces between them count for nothing."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\S"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        mask_token=MASK,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def prompt(numbers: Sequence[int], target: int) -> str:
    """What stands in front of an expression.

    Raises:
        ValueError: the tokenizer has no word for one of the numbers, or they are too many or too few.
    """
    if len(numbers) not in SIZES or not all(1 <= number <= LARGEST for number in (*numbers, target)):
        raise ValueError(
            f"the model of dam countdown knows problems of {SIZES[0]} or {SIZES[1]} numbers from 1 to {LARGEST} with "
            f"a target from 1 to {LARGEST}; got {list(numbers)} and {target}"
        )
    return f"{' '.join(map(str, numbers))} = {target}"


# Corpus: problems by the rule of `countdown.draw_problems`, many at once.


class _Forms(NamedTuple):
    """All expressions of n numbers whose order, signs and nesting the rule draws, each as likely; F of them."""

    tokens: np.ndarray  # int64 [F, COMPLETION]: words, less what is in `slot`, filled up with END
    slot: np.ndarray  # int64 [F, COMPLETION]: which of the problem's numbers stands here; -1 where none does
    order: np.ndarray  # int64 [F, n]: numbers as they are combined
    signs: np.ndarray  # int64 [F, n - 1]: of SIGNS
    behind: np.ndarray  # bool [F]: what was combined first is the right-hand side of the second sign


def _binds(sign: int) -> bool:
    """Whether a sign goes before + and -."""
    return sign >= 2


def _form(order: tuple[int, ...], signs: tuple[int, ...], behind: bool) -> list[int | str]:
    """An expression: places of numbers, signs and the parentheses that it needs."""
    first: list[int | str] = [order[0], SIGNS[signs[0]], order[1]]
    if len(order) == 2:
        return first
    weaker = _binds(signs[1]) and not _binds(signs[0])
    if behind:
        needed = weaker or (_binds(signs[0]) == _binds(signs[1]) and SIGNS[signs[1]] in "-/")
        return [order[2], SIGNS[signs[1]], *(["(", *first, ")"] if needed else first)]
    return [*(["(", *first, ")"] if weaker else first), SIGNS[signs[1]], order[2]]


def _forms(size: int) -> _Forms:
    every = [
        (order, signs, behind)
        for order in itertools.permutations(range(size))
        for behind in ((False, True) if size > 2 else (False,))
        for signs in itertools.product(range(len(SIGNS)), repeat=size - 1)
    ]
    tokens = np.full((len(every), COMPLETION), _ID[END])
    slot = np.full((len(every), COMPLETION), -1)
    for number, form in enumerate(every):
        for place, part in enumerate(_form(*form)):
            if isinstance(part, int):
                slot[number, place] = part
            else:
                tokens[number, place] = _ID[part]
    orders, signs, behind = zip(*every, strict=True)
    return _Forms(tokens, slot, np.array(orders), np.array(signs), np.array(behind))


_FORMS = {size: _forms(size) for size in SIZES}


def _combined(sign: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64, or -1 where it is no whole number, 0 or more, or one of both is none."""
    whole = np.where(right > 0, right, 1)
    value = np.select([sign == 0, sign == 1, sign == 2], [left + right, left - right, left * right], left // whole)
    divides = (right > 0) & (left % whole == 0)
    return np.where((left < 0) | (right < 0) | ((sign == 3) & ~divides), -1, value)


def _values(numbers: np.ndarray, forms: _Forms, chosen: np.ndarray) -> np.ndarray:
    """What forms come to, -1 where the rule does not admit it: int64 [N, C].

    Args:
        numbers: int64 [N, n].
        chosen: int64 [N, C], forms of each problem.
    """
    rows = np.arange(len(numbers))[:, None]
    operands = [numbers[rows, forms.order[chosen, i]] for i in range(numbers.shape[1])]
    first = _combined(forms.signs[chosen, 0], operands[0], operands[1])
    if len(operands) == 2:
        return first
    behind = forms.behind[chosen]
    left, right = np.where(behind, operands[2], first), np.where(behind, first, operands[2])
    return np.where(first < 0, -1, _combined(forms.signs[chosen, 1], left, right))


class Lines(NamedTuple):
    """N lines of the corpus."""

    input_ids: Tensor  # int64 [N, PROMPT + COMPLETION], padded on the left
    attention_mask: Tensor  # int64 likewise


Excluded = frozenset[tuple[tuple[int, ...], int]]


def excluded(problems: Collection[tuple[Sequence[int], int]]) -> Excluded:
    """Problems, (numbers, target), that no line is to be of, in whatever order the numbers are."""
    return frozenset((tuple(sorted(numbers)), int(target)) for numbers, target in problems)


def corpus(count: int, seed: Sequence[int], without: Excluded = frozenset()) -> Lines:
    """Lines at random; none of a held-out problem (`countdown.is_held_out`).

    Of the expressions that reach a target a line has the first in `_forms`: numbers in their order where that will do.

    Args:
        count: of lines.
        seed: fixes them.
        without: problems that are not drawn.
    """
    generator = np.random.default_rng(seed)
    pairs = int(generator.binomial(count, PAIRS))
    parts = [_lines(size, many, generator, without) for size, many in zip(SIZES, (pairs, count - pairs), strict=True)]
    ids = torch.from_numpy(np.concatenate(parts))
    return Lines(ids, (ids != _ID[PAD]).long())


def _lines(size: int, count: int, generator: np.random.Generator, without: Excluded) -> np.ndarray:
    forms, found, total = _FORMS[size], [np.zeros((0, PROMPT + COMPLETION), dtype=np.int64)], 0
    every = np.arange(len(forms.order))[None]
    while total < count:
        numbers = generator.integers(1, LARGEST + 1, (8 * count + 8, size))
        target = _values(numbers, forms, generator.integers(0, every.size, (len(numbers), 1)))[:, 0]
        admitted = (target >= 1) & (target <= LARGEST)
        numbers, target = numbers[admitted][: count - total], target[admitted][: count - total]
        kept = [
            not countdown.is_held_out(given, wanted) and (tuple(sorted(given)), wanted) not in without
            for given, wanted in zip(numbers.tolist(), target.tolist(), strict=True)
        ]
        numbers, target = numbers[kept], target[kept]
        reaching = _values(numbers, forms, every.repeat(len(numbers), axis=0)) == target[:, None]
        found.append(_written(numbers, target, forms, reaching.argmax(axis=1), generator))
        total += len(numbers)
    return np.concatenate(found)


def _written(
    numbers: np.ndarray, target: np.ndarray, forms: _Forms, chosen: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Prompt and expression, with slips."""
    slot = forms.slot[chosen]
    words = np.array([_ID[str(number)] for number in range(1, LARGEST + 1)])
    stands = words[np.take_along_axis(numbers, np.maximum(slot, 0), axis=1) - 1]
    expression = np.where(slot >= 0, stands, forms.tokens[chosen])
    slips = generator.random(expression.shape) < SLIP
    expression = np.where(np.isin(expression, [_ID[sign] for sign in SIGNS]) & slips, _ID["+"], expression)
    padding = np.full((len(numbers), PROMPT - numbers.shape[1] - 2), _ID[PAD])
    equals = np.full((len(numbers), 1), _ID["="])
    return np.concatenate([padding, words[numbers - 1], equals, words[target - 1][:, None], expression], axis=1)


# Model


def network(seed: int) -> Any:
    """Before training. A third of a number's vector are waves in its value, by which sizes are compared."""
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # As of Sudoku: pre-norm and a wide initialisation learn faster at this size.
        configuration: dict[str, Any] = dict(
            vocab_size=len(WORDS),
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=PROMPT + COMPLETION + _ID[PAD] + 1,  # positions are counted from PAD + 1
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            pad_token_id=_ID[PAD],
            bos_token_id=None,
            eos_token_id=_ID[END],
            mask_token_id=_ID[MASK],
            attn_implementation="eager",  # faster than sdpa at this size on a CPU
            architectures=["RobertaPreLayerNormForMaskedLM"],
        )
        model: Any = RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**configuration))
        vectors = model.get_input_embeddings().weight.data
        waves = _waves(vectors.shape[1] // 3)
        vectors[_ID["1"] : _ID[str(LARGEST)] + 1, : waves.shape[1]] = waves
    return model


_PERIODS = (400, 200, 100, 50, 25, 10, 5, 2)
_WAVES_STD = 0.3  # the other entries' is 0.1: sizes stand out


def _waves(width: int) -> Tensor:
    """float32 [LARGEST, width]: size, its logarithm and waves of `_PERIODS`, mixed at random."""
    value = torch.arange(1, LARGEST + 1, dtype=torch.float64)
    angle = 2 * torch.pi * value[:, None] / torch.tensor(_PERIODS)
    sizes = torch.stack((value / (LARGEST / 2) - 1, (value / 10).log() - 1), dim=1)
    features = torch.cat((sizes, angle.sin(), angle.cos()), dim=1)
    mixed = features @ torch.randn(features.shape[1], width, dtype=torch.float64)
    return (_WAVES_STD * mixed / mixed.std()).float()


STEPS, BATCH = 2000, 256


def check_torch() -> None:
    """Raises an ImportError where torch has no Muon, which `optimizers_of` takes."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"dam countdown needs torch 2.9 or later, for torch.optim.Muon; this is {torch.__version__}")


def pretrained(
    folder: Path,
    seed: int,
    *,
    without: Excluded = frozenset(),
    steps: int | None = None,
    show: Callable[[Any, int], None] = lambda model, step: None,
) -> Any:
    """The base in a folder; made there unless it is, and gone on with where that was cut short, to the same weights.

    Deterministic for a seed and a number of threads.

    Args:
        folder: of the base and its tokenizer, as `save_pretrained` leaves them, and until then of `pretraining.pt`.
        without: problems that no line is of.
        steps: of `BATCH` lines each; `STEPS` unless given.
        show: is called with the model and the number of steps done, now and then.
    """
    from transformers import AutoModelForMaskedLM

    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "pretraining.pt"
        model = _pretrain(state, seed, without, STEPS if steps is None else steps, show)
        tokenizer().save_pretrained(folder)
        part = folder / "part"
        with usual_modes(part):
            model.save_pretrained(part)
        for file in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):  # which comes last
            os.replace(file, folder / file.name)
        part.rmdir()
        state.unlink(missing_ok=True)
    return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")


_SAVED_EVERY, _SHOWN_EVERY = 100, 500  # steps


def _pretrain(file: Path, seed: int, without: Excluded, steps: int, show: Callable[[Any, int], None]) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    from dam.train.terminal import bar

    model = network(seed)
    optimizers = optimizers_of(model)
    warmup = min(50, steps // 4)
    schedules = [get_cosine_schedule_with_warmup(each, warmup, num_training_steps=steps) for each in optimizers]
    parts: dict[str, Any] = {"model": model}
    for number, pair in enumerate(zip(optimizers, schedules, strict=True)):
        parts |= dict(zip((f"optimizer {number}", f"schedule {number}"), pair, strict=True))
    done = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        done = saved.pop("done")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    process, denoiser = MaskedCTMC(mask_token=_ID[MASK]), MaskedLM(model)
    with bar(total=steps, initial=done, desc="pretraining the base on careless sums", smoothing=0) as shown:
        for step in range(done, steps):
            loss = _denoising_loss(denoiser, process, corpus(BATCH, [seed, step], without), [seed, step])
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            shown.update()
            if step % 20 == 0:
                shown.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
            if (step + 1) % _SHOWN_EVERY == 0:
                show(model, step + 1)
                model.train()
            if (step + 1) % _SAVED_EVERY == 0 and step + 1 < steps:
                part = file.with_suffix(".part")
                torch.save({"done": step + 1, **{name: of.state_dict() for name, of in parts.items()}}, part)
                os.replace(part, file)  # a kill leaves the old one or the new one
    return model.eval()


def optimizers_of(model: Any) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the rest."""
    layers = [p for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2]
    others = [p for name, p in model.named_parameters() if ".layer." not in name or p.dim() != 2]
    return [
        torch.optim.Muon(layers, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _denoising_loss(denoiser: MaskedLM, process: MaskedCTMC, lines: Lines, seed: Sequence[int]) -> Tensor:
    """Denoising is matching with weight 1: the posterior under the data."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    blank = lines.input_ids.clone()
    blank[:, -COMPLETION:] = process.mask_token
    states = process.remask(blank, lines.input_ids, generator)
    weight = torch.ones(len(blank), 1)
    targets = group_targets("posterior", states[:, None], lines.input_ids[:, None], weight, process)
    return estimator_loss(denoiser, targets, process, lines.attention_mask[targets.group])
