"""How a rollout chooses positions, and the law that it draws their tokens from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.ops import _group, _rows
from dam.ops._head import Head
from dam.ops.entropy import entropy
from dam.ops.jump import jump
from dam.ops.linear_jump import linear_jump
from dam.ops.linear_log_prob import linear_log_prob
from dam.ops.log_prob import log_prob

# Which position comes next does not depend on the model: the same under all, so that it cancels in path weights.
FREE_ORDERS = ("random", "left-to-right")
# It depends on what the model says at all positions that are masked.
MODEL_ORDERS = ("confidence", "entropy", "margin")
ORDERS = (*FREE_ORDERS, *MODEL_ORDERS)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Which position is filled next, and with what.

    A token v at a position is drawn from

        p(v) ~ exp(x(v) / temperature)  for v that top_k and top_p leave,     x = (w + 1) logits - w unguided logits

    w being `guidance`. Log-probabilities are those of this law.

    Args:
        order: which of a block's masked positions is filled next. "random": uniform, as the chain does.
            "left-to-right". "confidence": where the drawn token is likeliest (LLaDA's low_confidence remasking, Dream's
            maskgit_plus); "entropy": where p has the least; "margin": where the likeliest token is most ahead of the
            next one (Dream's topk_margin). Of equals the one that comes first in a uniform order. These three
            depend on the model, so do not cancel in path weights, and need the head at every masked position of
            the block in each call: for decoding, not for training.
        threshold: a network call fills all positions of the block whose token has at least this probability by
            "confidence", as Fast-dLLM does, at least this margin, or at most this entropy in nats; but one at least. So
            many positions a call, in each row others, that `steps` does not go with it. None: as `steps` says.
        temperature: divides x; 0 takes the likeliest token (the lowest id on ties), with log-probabilities, confidence,
            entropy and margin at temperature 1.
        top_k: only tokens whose x is among the k largest; those that equal the last of them too.
        top_p: only the fewest likeliest tokens, of those that top_k leaves, whose probabilities at `temperature` sum to
            at least this; those that equal the last of them too. In (0, 1].
        guidance: w >= 0, the scale of classifier-free guidance. Unguided logits are of a second pass, in which what the
            rollout hides, the prompt, is mask tokens. 0 is without.

    Raises:
        ValueError, TypeError: an argument is out of range, or two do not go together.

    Source: Nie et al., Large Language Diffusion Models, arXiv 2502.09992 (order, guidance); Ye et al., Dream 7B, arXiv
    2508.15487; Wu et al., Fast-dLLM, arXiv 2505.22618 (threshold); Kim et al., Train for the Worst, Plan for the Best,
    arXiv 2502.06768 (margin); Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751 (top_p).
    """

    order: str = "random"
    threshold: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 0.0

    def __post_init__(self) -> None:
        check_decoding(dataclasses.asdict(self))

    @property
    def by_model(self) -> bool:
        """Whether the order depends on the model."""
        return self.order in MODEL_ORDERS

    @property
    def least_score(self) -> float | None:
        """`Drawn.score` of positions that are filled by one call, if it depends on that."""
        if self.threshold is None:
            return None
        return -self.threshold if self.order == "entropy" else self.threshold

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out by what the model says."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    @property
    def own_temperature(self) -> float:
        """That log-probabilities are at."""
        return self.temperature or 1.0


def check_decoding(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """That fields of `Decoding` are in range and go together.

    Args:
        values: by field.
        names: what messages are to call them, where that is something else.

    Raises:
        ValueError, TypeError: they are not; names the field.
    """
    called = {name: name for name in values} | dict(names or {})
    order, threshold, top_k = (values[name] for name in ("order", "threshold", "top_k"))
    if order not in ORDERS:
        raise ValueError(f"{called['order']} must be one of {', '.join(ORDERS)}; got {order!r}")
    for name, value in values.items():
        if name == "order" or (value is None and name in ("threshold", "top_k", "top_p")):
            continue
        kind = int if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "an int" if name == "top_k" else "a number"
            raise TypeError(f"{called[name]} must be {what}; got {type(value).__name__}")
    for name in ("temperature", "guidance"):
        if not 0 <= values[name] < math.inf:
            raise ValueError(f"{called[name]} must be >= 0 and finite; got {values[name]}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{called['top_k']} must be at least 1; got {top_k}")
    if values["top_p"] is not None and not 0 < values["top_p"] <= 1:
        raise ValueError(f"{called['top_p']} must be in (0, 1]; got {values['top_p']}")
    if threshold is not None and math.isnan(threshold):
        raise ValueError(f"{called['threshold']} must be a number; got nan")
    if threshold is not None and order not in MODEL_ORDERS:
        raise ValueError(
            f"{called['threshold']} goes with {called['order']} {', '.join(MODEL_ORDERS)}, of which it is a bound; "
            f"got {order!r}"
        )


def given_decoding(decoding: Decoding | None, **short: Any) -> Decoding:
    """The decoding given, or of the fields given beside it, which are None where they are not.

    Raises:
        ValueError: a field is given beside a decoding.
    """
    short = {name: value for name, value in short.items() if value is not None}
    if decoding is None:
        return Decoding(**short)
    if short:
        raise ValueError(f"{', '.join(short)} and decoding= exclude each other: say it in Decoding(...)")
    return decoding


class Drawn(NamedTuple):
    """Tokens of T positions."""

    token: Tensor  # int64 [T]
    log_prob: Tensor  # [T], float32 (float64 for float64 hidden states): of the token under the law it was drawn from
    score: Tensor  # by the orders of the model float64 [T], higher scores are filled first; else of no meaning


def draw_tokens(
    hidden: Tensor,  # [T, D]
    head: Head,
    process: MaskedCTMC,
    decoding: Decoding,
    *,
    seed: int,
    row_ids: Tensor,  # int64 [T]
) -> Drawn:
    """Draws a token at each of T positions of guided hidden states, as `dam.linear_jump` does.

    top_k, top_p, "entropy" and "margin" form logits, of a chunk of positions at a time: extra memory is
    bounded by the environment variable DAM_WORKSPACE_MB. Else none are.
    """
    if not decoding.cuts and decoding.order not in ("entropy", "margin"):
        left_out = process.left_out(head.weight.shape[0])
        drawn = linear_jump(
            hidden,
            **head.arguments(hidden.dtype),
            **left_out,
            temperature=decoding.temperature,
            seed=seed,
            row_ids=row_ids,
        )
        return Drawn(
            drawn.target, drawn.log_prob, drawn.log_prob.double().exp() if decoding.by_model else drawn.log_prob
        )
    token, value = torch.empty_like(row_ids), hidden.new_empty(len(hidden), dtype=_rows.accumulator(hidden.dtype))
    score = hidden.new_empty(len(hidden), dtype=torch.float64)
    for part, logits in _logits(hidden, head, process, decoding):
        drawn = jump(logits, temperature=decoding.temperature, seed=seed, row_ids=row_ids[part])
        token[part], value[part] = drawn.target, drawn.log_prob
        score[part] = _score(logits, drawn.log_prob, decoding)
    return Drawn(token, value, score)


def token_log_prob(hidden: Tensor, token: Tensor, head: Head, process: MaskedCTMC, decoding: Decoding) -> Tensor:
    """Log-probabilities [T] of tokens int64 [T] under the law that `draw_tokens` draws from; -inf where it does not."""
    if not decoding.cuts:
        return linear_log_prob(
            hidden,
            target=token,
            **head.arguments(hidden.dtype),
            **process.left_out(head.weight.shape[0]),
            # log_prob at temperature 0 is by convention that at temperature 1, as for jump.
            temperature=decoding.own_temperature,
        )
    out = hidden.new_empty(len(hidden), dtype=_rows.accumulator(hidden.dtype))
    for part, logits in _logits(hidden, head, process, decoding):
        out[part] = log_prob(logits, token[part], temperature=decoding.own_temperature)
    return out


def _logits(hidden: Tensor, head: Head, process: MaskedCTMC, decoding: Decoding) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of positions with their logits [chunk, V], -inf where a token is not drawn."""
    size = head.weight.shape[0]
    if _group.is_dtensor(head.weight):
        raise ValueError(
            'top_k, top_p and orders "entropy" and "margin" look at all logits of a position, but processes share the '
            "head's rows: leave them out, or the output layer out of the plan of tensor parallelism"
        )
    never = [token for token in (process.excluded(size), *process.suppressed(size)) if token >= 0]
    columns = torch.tensor(never, dtype=torch.int64, device=hidden.device)
    # Logits and a comparison; and of sorted ones their indices and three arrays in float64, generously counted.
    bytes_per_row = size * (64 if decoding.cuts else 16)
    head = head.to(hidden.dtype)  # once, not for each chunk
    for part in _rows.chunks(len(hidden), bytes_per_row):
        logits = head.logits(hidden[part]).index_fill_(1, columns, -torch.inf)
        yield part, _cut(logits, decoding)


def _cut(logits: Tensor, decoding: Decoding) -> Tensor:
    """Logits [T, V], in place, without the tokens that top_k and then top_p leave out.

    By what is least of those kept, so that equals are kept or left out together, whatever order a sort leaves them in.
    """
    top_k, top_p = decoding.top_k, decoding.top_p
    if top_k is not None and top_k < logits.shape[1]:
        logits.masked_fill_(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        falling = logits.sort(dim=1, descending=True).values
        below = (falling.double() - falling[:, :1]) / decoding.own_temperature
        before = F.pad(below.softmax(dim=1).cumsum(dim=1)[:, :-1], (1, 0))  # of what is likelier than each
        least = falling.gather(1, (before < top_p).sum(dim=1, keepdim=True) - 1)
        logits.masked_fill_(logits < least, -torch.inf)
    return logits


def _score(logits: Tensor, of_drawn: Tensor, decoding: Decoding) -> Tensor:
    if decoding.order == "entropy":
        return -entropy(logits, temperature=decoding.own_temperature).double()
    if decoding.order == "margin":
        likeliest = logits.topk(min(2, logits.shape[1]), dim=1).indices
        p = log_prob(logits, likeliest, temperature=decoding.own_temperature).double().exp()
        return p[:, 0] - p[:, 1:].sum(dim=1)
    return of_drawn.double().exp()
