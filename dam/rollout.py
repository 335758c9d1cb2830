"""Trajectories of a masked chain: which position was filled with what, in what order, and how likely it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.backends import deferral
from dam.ctmc import MaskedCTMC
from dam.decoding import ORDERS as ORDERS
from dam.decoding import Decoding, Drawn, draw_tokens, given_decoding, token_log_prob
from dam.models.attention import Blocks
from dam.models.denoiser import Denoiser, blocks_of, check_left_padding, equal_rows, hidden_at
from dam.models.equal_rows import distinct, given
from dam.ops import _philox
from dam.ops._head import Head
from dam.ops._philox import Use


@dataclasses.dataclass
class Trajectories:
    """B trajectories of at most S jumps over sequences of length L, in the order in which they jumped.

    Of a trajectory that ended early, at a stop token, the jumps up to there; the rest is filled up with that token.
    """

    initial: Tensor  # int64 [B, L]: X_0, masks where something was filled in
    final: Tensor  # int64 [B, L]: X_1, without masks
    position: Tensor  # int64 [B, S]: where jump s went, -1 where a trajectory had fewer jumps
    token: Tensor  # int64 [B, S]: what it put there, -1 likewise
    call: Tensor  # int64 [B, S]: the network call that it came from, -1 likewise
    log_prob: Tensor  # float32 [B, S]: log-probability of the token under the sampler, 0 where no jump
    base_log_prob: Tensor | None = None  # float32 [B, S]: the same under the base model
    ended: Tensor | None = None  # bool [B]: at a stop token, by the last jump's call; None where none was looked for

    @property
    def log_ratio(self) -> Tensor:
        """log u_base - log u at each jump [B, S]; the path's log weight is its sum."""
        if self.base_log_prob is None:
            raise ValueError("these trajectories carry no log-probabilities of the base: pass base= to rollout")
        return self.base_log_prob - self.log_prob

    def exchanged(self) -> Trajectories:
        """As seen from the base, which is then the model: of trajectories that the base of another rollout drew."""
        if self.base_log_prob is None:
            raise ValueError("these trajectories carry no log-probabilities of the base: pass base= to rollout")
        return dataclasses.replace(self, log_prob=self.base_log_prob, base_log_prob=self.log_prob)

    def __getitem__(self, rows: slice | Tensor) -> Trajectories:
        """Some of the trajectories."""
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in given.items()}
        return Trajectories(**chosen)

    @property
    def network_calls(self) -> int:
        """Batched forward passes of the model that were made, two for each with guidance."""
        return int(self.call.max()) + 1 if self.call.numel() else 0

    @staticmethod
    def concatenate(pieces: Sequence[Trajectories]) -> Trajectories:
        """Trajectories of sequences of one length; shorter ones get empty jumps."""
        jumps = max(piece.position.shape[1] for piece in pieces)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(Trajectories):
            parts = [getattr(piece, field.name) for piece in pieces]
            if any(part is None for part in parts):
                values[field.name] = None
                continue
            if field.name not in ("initial", "final", "ended"):
                empty = 0.0 if parts[0].is_floating_point() else -1
                parts = [F.pad(part, (0, jumps - part.shape[1]), value=empty) for part in parts]
            values[field.name] = torch.cat(parts)
        return Trajectories(**values)

    def states_before(self, call: int) -> Tensor:
        """The states that network call `call` saw, int64 [B, L]."""
        tokens = self.initial.clone()
        rows, jumps = torch.nonzero((self.call >= 0) & (self.call < call), as_tuple=True)
        tokens[rows, self.position[rows, jumps]] = self.token[rows, jumps]
        return tokens


def log_mixture(log_path: Tensor, from_base: Tensor, kept: Tensor | None = None) -> Tensor:
    """log of how likely a trajectory is to be drawn where the base draws a share s of its group, over the model's.

        log(1 - s + s exp(log_path)),     s = mean_k from_base

    Args:
        log_path: floating point [G, K], log of how likely the base makes a trajectory over how likely the model does.
        from_base: bool [G, K], which the base drew.
        kept: bool [G, K], those that the mean is over; None is all.

    Returns:
        float64 [G, K].

    Source: Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.
    """
    counted = torch.ones_like(from_base) if kept is None else kept
    share = (from_base & counted).sum(dim=1, keepdim=True).double() / counted.sum(dim=1, keepdim=True)
    return torch.logaddexp((1 - share).log(), share.log() + log_path.double())


def path_of(states: Tensor, final: Tensor, position: Tensor, call: Tensor) -> Trajectories:
    """Trajectories of groups, without their log-probabilities.

    Args:
        states: int64 [G, L], X_0 of each group.
        final: int64 [G, K, L], the outcomes X_1.
        position, call: int64 [G, K, S], as `Trajectories` has them.
    """
    outcome, position, call = final.flatten(0, 1), position.flatten(0, 1), call.flatten(0, 1)
    return Trajectories(
        initial=states[:, None].expand_as(final).flatten(0, 1),
        final=outcome,
        position=position,
        token=torch.where(call >= 0, outcome.gather(1, position.clamp(min=0)), -1),
        call=call,
        log_prob=torch.zeros(position.shape, dtype=torch.float32, device=position.device),
    )


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    tokens: Tensor,  # [B, L]
    process: MaskedCTMC,
    *,
    base: Denoiser | None = None,
    attention_mask: Tensor | None = None,  # [B, L]
    steps: int | None = None,
    block_length: int | None = None,
    order: str | None = None,
    temperature: float | None = None,
    decoding: Decoding | None = None,
    hide: Tensor | None = None,  # bool [B, L]
    stop_tokens: Sequence[int] = (),
    start: Tensor | None = None,  # [B]
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Trajectories:
    """Fills in every masked position of `tokens`, or of each row what is in front of its end.

    The head runs only at the positions that jump: a trajectory costs as many head rows as it has jumps, at
    any number of steps. Only the network below the head runs once per step: over the block that a row is at where the
    denoiser offers that (`Denoiser.prefix_cache`), else over the sequence.

    With stop_tokens a row ends once a stop token stands in it with no mask in front: what is behind is no part of its
    text. It takes no more network calls. When that is, its state tells, so it is a stopping time of the chain:
    jumps up to there are drawn as without stop_tokens (to the bit), their log-probabilities sum to that of the path
    so far, and exp of the sum of `log_ratio` has mean 1 under the model and is the weight that gives the base's law of
    texts. Left out is a factor of mean 1, of jumps that nobody reads. One block in random order seldom ends
    early; blocks from left to right do.

    Rows that are equal are run by the network once in each call, where the denoiser says that this changes nothing
    (`Denoiser.equal_rows`): of K trajectories of one prompt those that stand at the same state, in the first call all.

    Args:
        denoiser: the model.
        tokens: int64 [B, L], X_0: mask tokens where something is to be filled in.
        process: names the mask token.
        base: also record the base model's log-probabilities of the same jumps (as many network calls again, but for
            the layers that a base knows to be the model's: `Denoiser.beside`), under the same decoding of its own
            logits; -inf where it would not draw the token. With an order that depends on
            the model they are those of the tokens alone, and `log_ratio` is no weight of paths.
        attention_mask: [B, L], passed on to the model.
        steps: network calls per trajectory. None fills one position per call, which simulates the chain
            exactly. With fewer calls, positions filled by one call are drawn independently: another chain,
            whose path weights against the base under the same steps are still exact. No call reaches into the next
            block, so there may be one more for each block. Where its calls do not divide the positions of a block, the
            first ones fill one more, as LLaDA's do.
        block_length: fill blocks of this many positions, counted from the end, from left to right; None is one block,
            or where the denoiser has blocks (`dam.models.blocks_of`) these.
        order, temperature: short for decoding=Decoding(order=..., temperature=...); "random" and 1 unless given.
        decoding: which position of a block is next, and the law that tokens are drawn from; with a threshold also how
            many positions a call fills.
        hide: bool [B, L], what the second pass of decoding.guidance has mask tokens for; all that is given, less what
            attention_mask hides, unless given. Each network call is then two passes.
        stop_tokens: tokens that end a row.
        start: int64 [B], position from which on they do; each row's first mask unless given.
        seed: of the order and the tokens: what is drawn at a position depends on (seed, row id, position, states) only,
            not on the batch. Positions count from the end, so padding in front changes no draw.
        row_ids: int64 [B], names each trajectory's stream; 0 .. B-1 unless given.

    Returns:
        Trajectories, log-probabilities being those of the distribution that was sampled.

    Raises:
        ValueError, TypeError: an argument is out of range, or a trajectory has nothing to fill in; block_length is
            another than that of the denoiser's attention, or the base's blocks are others; rows are padded on the left
            and the denoiser does not take such; guidance of a head with a soft cap.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"rollout: tokens must be int64 [B, L]; got {tokens.dtype} {list(tokens.shape)}")
    decoding = given_decoding(decoding, order=order, temperature=temperature)
    for name, value in (("steps", steps), ("block_length", block_length)):
        if value is not None and value < 1:
            raise ValueError(f"rollout: {name} must be at least 1; got {value}")
    if steps is not None and decoding.threshold is not None:
        raise ValueError(f"rollout: a threshold tells how many positions a call fills: leave out steps={steps}")
    masked = process.masked(tokens)
    count = masked.sum(dim=1)
    if bool((count == 0).any()):
        raise ValueError(f"rollout: row {int((count == 0).nonzero()[0])} of tokens has no mask token to fill in")
    ends = Ends(stop_tokens, start, masked, process) if len(stop_tokens) > 0 else None

    blocks = blocks_for(denoiser, block_length, base)
    for model in (denoiser, base):
        check_left_padding(model, attention_mask)

    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    block = None if blocks is None else blocks.numbers(tokens, attention_mask)
    trajectories = plan(tokens, process, decoding.order, steps, block, seed=seed, row_ids=row_ids)
    beside = None if base is None or decoding.by_model or decoding.guidance else _beside(base, denoiser)
    _fill(denoiser, trajectories, process, decoding, block, ends, hide, attention_mask, seed, row_ids, base, beside)
    if base is not None and beside is None:
        trajectories.base_log_prob = jump_log_prob(
            base, trajectories, process, attention_mask=attention_mask, decoding=decoding, hide=hide
        )
    return trajectories


def plan(
    tokens: Tensor,  # [B, L]
    process: MaskedCTMC,
    order: str,
    steps: int | None,
    block: Tensor | None,  # [B, L]
    *,
    seed: int,
    row_ids: Tensor,  # [B]
) -> Trajectories:
    """Trajectories before anything is drawn: where each jump goes, and by which network call.

    By an order that depends on the model, which sorts them anew, the calls alone. Of tokens it counts where masks are.

    Args:
        tokens, process, order, steps, seed, row_ids: as for `rollout`.
        block: int64 [B, L], numbers of the blocks that are filled one after another; None is one block.
    """
    masked = process.masked(tokens)
    if order == "left-to-right":
        place = torch.arange(tokens.shape[1], dtype=torch.float64, device=tokens.device) / tokens.shape[1]
        priority = torch.where(masked, place, torch.inf)
    else:
        priority = process.jump_times(tokens, seed=seed, row_ids=row_ids)
    return _planned(tokens, priority, masked.sum(dim=1), steps, block)


def _fill(
    denoiser: Denoiser,
    trajectories: Trajectories,
    process: MaskedCTMC,
    decoding: Decoding,
    block: Tensor | None,
    ends: Ends | None,
    hide: Tensor | None,
    attention_mask: Tensor | None,
    seed: int,
    row_ids: Tensor,
    base: Denoiser | None,
    beside: Denoiser | None,
) -> None:
    """Makes the jumps of planned trajectories, in place; with `beside`, model and base as one, the base's too."""
    network = _network(beside or denoiser, trajectories, process, decoding, hide, attention_mask)
    if beside is not None:
        trajectories.base_log_prob = torch.zeros_like(trajectories.log_prob)
    if ends is not None:
        ends.cut(trajectories, call=-1)
    # Whether a row could be sampled is read once, at the end: a GPU is not waited for at each call.
    with deferral.deferred_checks():
        if decoding.by_model:
            _fill_by_model(denoiser, network, trajectories, process, decoding, block, ends, seed, row_ids)
        else:
            _fill_as_planned(denoiser, network, trajectories, process, decoding, ends, seed, row_ids, base, beside)


def _fill_as_planned(
    denoiser: Denoiser,
    network: _Network | _Guided,
    trajectories: Trajectories,
    process: MaskedCTMC,
    decoding: Decoding,
    ends: Ends | None,
    seed: int,
    row_ids: Tensor,
    base: Denoiser | None,
    beside: Denoiser | None,
) -> None:
    """By an order that does not depend on the model."""
    stream = streams(seed, row_ids, trajectories.final.shape[1])
    calls = _by_call(trajectories)
    made: list[tuple[Tensor, ...]] = []
    n = 0
    while n < len(calls):
        jumps = calls[n]
        hidden = network.hidden_at(jumps, trajectories.final)
        if beside is not None:
            hidden, of_base = (part.contiguous() for part in hidden.chunk(2, dim=-1))
        where = stream[jumps.rows, jumps.position]
        drawn = _drawn(hidden, denoiser.head(), process, decoding, seed, where)
        trajectories.final[jumps.rows, jumps.position] = drawn.token
        made.append((jumps.rows, jumps.at, drawn.token, drawn.log_prob))
        if beside is not None:
            assert base is not None
            made[-1] += (token_log_prob(of_base, drawn.token, base.head(), process, decoding),)
        if ends is not None and ends.cut(trajectories, call=n):
            calls = _by_call(trajectories)
        n += 1
    _enter(trajectories, ("token", "log_prob", *(() if beside is None else ("base_log_prob",))), made)


def _fill_by_model(
    denoiser: Denoiser,
    network: _Network | _Guided,
    trajectories: Trajectories,
    process: MaskedCTMC,
    decoding: Decoding,
    block: Tensor | None,
    ends: Ends | None,
    seed: int,
    row_ids: Tensor,
) -> None:
    """By an order of the model: everything still masked of the block is drawn, and the best of it kept."""
    begins, n = _first_call_of_block(trajectories, block), 0
    while n < trajectories.network_calls:
        candidates = (trajectories.call >= n) & (begins <= n)
        jumps = _jumps(trajectories, candidates)
        hidden = network.hidden_at(jumps, trajectories.final)
        # Such a position is drawn in call after call, in each anew.
        where = streams(seed, row_ids, trajectories.final.shape[1], call=n)[jumps.rows, jumps.position]
        drawn = _drawn(hidden, denoiser.head(), process, decoding, seed, where)
        _enter(trajectories, ("token", "log_prob"), [(jumps.rows, jumps.at, drawn.token, drawn.log_prob)])
        score = torch.zeros_like(trajectories.log_prob, dtype=torch.float64)
        score[jumps.rows, jumps.at] = drawn.score
        score = _best_first(trajectories, score, n, block)
        if decoding.least_score is not None:
            _all_above(trajectories, candidates, score >= decoding.least_score, n)
            begins = _first_call_of_block(trajectories, block)
        rows, at = torch.nonzero(trajectories.call == n, as_tuple=True)
        trajectories.final[rows, trajectories.position[rows, at]] = trajectories.token[rows, at]
        if ends is not None:
            ends.cut(trajectories, call=n)
        n += 1


def _drawn(hidden: Tensor, head: Head, process: MaskedCTMC, decoding: Decoding, seed: int, row_ids: Tensor) -> Drawn:
    """`draw_tokens`, and some token where there is none to draw, of which the check tells later.

    The network's next call must not fail by it: no kernel runs any more on a GPU after an index out of range.
    """
    drawn = draw_tokens(hidden, head, process, decoding, seed=seed, row_ids=row_ids)
    drawn.token.clamp_(0, head.weight.shape[0] - 1)
    return drawn


def streams(seed: int, row_ids: Tensor, length: int, call: int = 0) -> Tensor:
    """Names of the streams that `dam.jump` draws tokens from under `seed`, int64 [B, L], of rows int64 [B].

    By an order that depends on the model those of a network call; else of all calls, as a position is drawn once.
    """
    return _philox.ids(seed, Use.JUMP, row_ids, length, sample=call).flip(1)


def _enter(trajectories: Trajectories, names: Sequence[str], made: Sequence[tuple[Tensor, ...]]) -> None:
    """Writes what jumps have come to, by name, in place: of each network call rows and indices, and values."""
    if not made:
        return
    rows, at, *values = (torch.cat(parts) for parts in zip(*made, strict=True))
    for name, value in zip(names, values, strict=True):
        into = getattr(trajectories, name)
        into[rows, at] = value.to(into.dtype)


class Ends:
    """Where rows end: at a stop token, from a position on, with no mask in front of it.

    Raises:
        ValueError: such a token is never drawn, or `start` is none.
    """

    def __init__(self, stop_tokens: Sequence[int], start: Tensor | None, masked: Tensor, process: MaskedCTMC):
        never = {process.mask_token, *process.suppress}
        for token in stop_tokens:
            if token in never or (process.vocabulary is not None and token >= process.vocabulary):
                raise ValueError(f"rollout: token {token} ends a row but is never drawn: take it out of stop_tokens")
        if start is None:
            start = masked.long().argmax(dim=1)
        if start.shape != masked.shape[:1] or start.dtype != torch.int64:
            raise ValueError(f"rollout: start must be int64 [{len(masked)}]; got {start.dtype} {list(start.shape)}")
        self._stop = torch.tensor(list(stop_tokens), dtype=torch.int64, device=masked.device)
        self._behind = torch.arange(masked.shape[1], device=masked.device) >= start.to(masked.device)[:, None]
        self._process = process

    def cut(self, trajectories: Trajectories, call: int) -> bool:
        """Takes the jumps behind network call `call` from trajectories that have ended by it, in place: whether any."""
        masked = self._process.masked(trajectories.final)
        stop = torch.isin(trajectories.final, self._stop) & self._behind
        # Positions in front of which, and at which, no mask stands.
        ended = (stop & (masked.cumsum(dim=1) == 0)).any(dim=1, keepdim=True)
        end = trajectories.final.gather(1, stop.long().argmax(dim=1, keepdim=True))
        trajectories.final = torch.where(masked & ended, end, trajectories.final)
        trajectories.ended = ended[:, 0]
        behind = ended & (trajectories.call > call)
        if not bool(behind.any()):
            return False
        _drop(trajectories, behind)
        return True


def _drop(trajectories: Trajectories, jumps: Tensor) -> None:
    """Empties these jumps, bool [B, S], in place."""
    for name in ("position", "token", "call"):
        getattr(trajectories, name).masked_fill_(jumps, -1)
    trajectories.log_prob.masked_fill_(jumps, 0.0)


def blocks_for(denoiser: Denoiser, block_length: int | None, base: Denoiser | None = None) -> Blocks | None:
    """The blocks that a rollout fills one after another: those asked for, or those of the denoiser's attention.

    Raises:
        ValueError: its attention has others than asked for, or than the base's.
    """
    own, theirs = blocks_of(denoiser), None if base is None else blocks_of(base)
    if theirs not in (None, own):
        raise ValueError(f"the base's attention has {theirs}, the model's {own}: they fill positions in other orders")
    if own is None:
        return None if block_length is None else Blocks(block_length)
    if block_length not in (None, own.length):
        raise ValueError(
            f"block_length is {block_length}, but the model's attention has blocks of {own.length}: leave block_length "
            "out, or make the denoiser with that block_length (dam.models.as_denoiser)"
        )
    return own


@torch.no_grad()
def jump_log_prob(
    denoiser: Denoiser,
    trajectories: Trajectories,
    process: MaskedCTMC,
    *,
    attention_mask: Tensor | None = None,
    temperature: float | None = None,
    decoding: Decoding | None = None,
    hide: Tensor | None = None,
) -> Tensor:
    """Log-probability [B, S] of each jump of `trajectories` under another model that sampled in the same steps.

    Of its token; 0 where there is no jump. temperature, decoding and hide as for `rollout`.
    """
    decoding = given_decoding(decoding, temperature=temperature)
    network = _network(denoiser, trajectories, process, decoding, hide, attention_mask)
    states = trajectories.initial.clone()
    made = []
    for jumps in _by_call(trajectories):
        hidden = network.hidden_at(jumps, states)
        token = trajectories.token[jumps.rows, jumps.at]
        made.append((jumps.rows, jumps.at, token_log_prob(hidden, token, denoiser.head(), process, decoding)))
        states[jumps.rows, jumps.position] = token
    found = dataclasses.replace(trajectories, log_prob=torch.zeros_like(trajectories.log_prob))
    _enter(found, ("log_prob",), made)
    return found.log_prob


def _beside(base: Denoiser, denoiser: Denoiser) -> Denoiser | None:
    """Model and base as one denoiser, where the base has that."""
    beside = getattr(base, "beside", None)
    return None if beside is None else beside(denoiser)


class PathLogProbs(NamedTuple):
    """Log-probabilities of outcomes as paths in M orders of unmasking, under the model and under its base."""

    log_prob: Tensor  # float64 [..., M], the first in the order in which the outcome was drawn
    base_log_prob: Tensor  # float64 [..., M], in the same orders

    @property
    def log_ratio(self) -> Tensor:
        """log of the mean of p_base(x | order) over the M orders, less that of p_model(x | order), float64 [...].

        With outcomes x of the model, its exponential times any f(x) has the mean sum_x p_base(x) f(x), p_base the law
        that the base's sampler has, at every M; M orders make it quieter.
        """
        return self.base_log_prob.logsumexp(dim=-1) - self.log_prob.logsumexp(dim=-1)


@torch.no_grad()
def log_prob_over_orders(
    denoiser: Denoiser,
    base: Denoiser,
    trajectories: Trajectories,
    process: MaskedCTMC,
    *,
    orders: int,
    attention_mask: Tensor | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float | None = None,
    decoding: Decoding | None = None,
    hide: Tensor | None = None,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> PathLogProbs:
    """How likely outcomes are by other orders of unmasking too, under the model and its base: [B, orders].

    Each order beyond a trajectory's own costs as many network calls of both as the rollout made.

    Of a trajectory that ended at a stop token the outcome is what was filled in, where, and which of it by the last
    call: by another order that comes last too, as the text would else have ended before. So no tokens have to be summed
    over that the trajectory lacks, and what `PathLogProbs.log_ratio` says holds for these outcomes, and so for texts.

    Args:
        denoiser: the model that drew.
        base: its base.
        trajectories: of `rollout` in random order, with `base=`.
        orders: M, the trajectory's own among them.
        attention_mask, steps, block_length, temperature, decoding, hide, row_ids: as given to `rollout`.
        seed: of the other orders; they depend on (seed, row id, number of the order, position from the end) only, and
            share no draw with `rollout` under the same seed.

    Raises:
        ValueError: orders is below 1, decoding has another order than "random", or the trajectories carry no
            log-probabilities of the base.
    """
    if orders < 1:
        raise ValueError(f"log_prob_over_orders: orders must be at least 1; got {orders}")
    decoding = given_decoding(decoding, temperature=temperature)
    if decoding.order != "random":
        raise ValueError(f'log_prob_over_orders: other orders are drawn as "random" draws them; got {decoding.order!r}')
    if trajectories.base_log_prob is None:
        raise ValueError("log_prob_over_orders: pass base= to rollout; these trajectories lack the base's")
    blocks = blocks_for(denoiser, block_length, base)
    block = None if blocks is None else blocks.numbers(trajectories.initial, attention_mask)
    paths = [(trajectories.log_prob, trajectories.base_log_prob)]
    for n in range(1, orders):
        other = _reordered(trajectories, process, n, steps, block, seed, row_ids)
        paths.append(
            tuple(  # type: ignore[arg-type]
                jump_log_prob(one, other, process, attention_mask=attention_mask, decoding=decoding, hide=hide)
                for one in (denoiser, base)
            )
        )
    return PathLogProbs(
        *(torch.stack([p.double().sum(dim=1) for p in each], dim=1) for each in zip(*paths, strict=True))
    )


@torch.no_grad()
def outcome_log_prob(
    denoiser: Denoiser,
    tokens: Tensor,  # [B, L]
    outcome: Tensor,  # [B, L]
    process: MaskedCTMC,
    *,
    orders: int,
    attention_mask: Tensor | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float | None = None,
    decoding: Decoding | None = None,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Tensor:
    """log p(outcome | order) of given outcomes by random orders of unmasking: float64 [B, orders], exact for each.

    Its mean over orders bounds log p(outcome) from below in expectation, p being the law that the sampler draws by, a
    mean over orders: it is the bound which masked diffusion models are trained by. logsumexp less log(orders) is a
    tighter one, that tends to log p(outcome) as orders grow. Each order takes the network calls of a rollout.

    Args:
        denoiser: the model.
        tokens: int64 [B, L], mask tokens where something was filled in.
        outcome: int64 [B, L], what was.
        process: names the mask token.
        orders: M.
        attention_mask, steps, block_length, temperature, decoding, row_ids: as for `rollout`; the decoding's order is
            "random".
        seed: of the orders, which depend on (seed, row id, number of the order, position from the end) only.

    Raises:
        ValueError: orders is below 1, decoding has another order than "random", or an outcome is none of its tokens.
    """
    if orders < 1:
        raise ValueError(f"outcome_log_prob: orders must be at least 1; got {orders}")
    decoding = given_decoding(decoding, temperature=temperature)
    if decoding.order != "random":
        raise ValueError(f'outcome_log_prob: orders are drawn as "random" draws them; got {decoding.order!r}')
    masked = process.masked(tokens)
    if outcome.shape != tokens.shape or bool(process.masked(outcome).any()) or bool((outcome != tokens)[~masked].any()):
        raise ValueError("outcome_log_prob: outcome must be tokens with all masks filled in, and nothing else changed")
    check_left_padding(denoiser, attention_mask)
    blocks = blocks_for(denoiser, block_length)
    block = None if blocks is None else blocks.numbers(tokens, attention_mask)
    stage = torch.zeros_like(tokens)
    found = []
    for number in range(orders):
        path = _by_order(tokens, outcome, process, number, steps, block, stage, seed, row_ids)
        log_prob = jump_log_prob(denoiser, path, process, attention_mask=attention_mask, decoding=decoding)
        found.append(log_prob.double().sum(dim=1))
    return torch.stack(found, dim=1)


def _reordered(
    trajectories: Trajectories,
    process: MaskedCTMC,
    number: int,
    steps: int | None,
    block: Tensor | None,
    seed: int,
    row_ids: Tensor | None,
) -> Trajectories:
    """The same outcomes by another order; its log-probabilities are left 0."""
    stage = _stage(trajectories)
    other = _by_order(trajectories.initial, trajectories.final, process, number, steps, block, stage, seed, row_ids)
    jumps = (trajectories.call >= 0).sum(dim=1, keepdim=True)
    _drop(other, torch.arange(other.call.shape[1], device=stage.device) >= jumps)
    return other


def _by_order(
    tokens: Tensor,
    outcome: Tensor,
    process: MaskedCTMC,
    number: int,
    steps: int | None,
    block: Tensor | None,
    stage: Tensor,
    seed: int,
    row_ids: Tensor | None,
) -> Trajectories:
    """From tokens to an outcome by an order drawn uniformly within stages, int64 [B, L] from 0 to 2, one by one."""
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    uniform = _philox.uniform(seed, Use.OTHER_ORDER, row_ids, tokens.shape[1], sample=number).flip(1)
    masked = process.masked(tokens)
    priority = torch.where(masked, uniform + stage, torch.inf)
    path = _planned(tokens, priority, masked.sum(dim=1), steps, block, levels=3)
    there = outcome.gather(1, path.position.clamp(min=0))
    return dataclasses.replace(path, final=outcome, token=torch.where(path.call >= 0, there, -1))


def _stage(trajectories: Trajectories) -> Tensor:
    """Of trajectories that ended 1 where their last call jumped, 2 where none did, 0 elsewhere; int64 like `final`."""
    if trajectories.ended is None:
        return torch.zeros_like(trajectories.final)
    call, position = trajectories.call, trajectories.position
    last = call.max(dim=1, keepdim=True).values
    stage = torch.full_like(trajectories.final, 2)
    rows, at = torch.nonzero(call >= 0, as_tuple=True)
    stage[rows, position[rows, at]] = (call == last)[rows, at].long()
    return torch.where(trajectories.ended[:, None], stage, 0)


def _planned(
    tokens: Tensor, priority: Tensor, count: Tensor, steps: int | None, block: Tensor | None, levels: int = 1
) -> Trajectories:
    """Trajectories that fill the `count` [B] masks of tokens by rising priority in [0, levels); +inf where nothing is.

    Blocks, whose numbers are int64 [B, L], one after another.
    """
    if block is not None:
        priority = priority + levels * block
    jumps = int(count.max())
    # Unmasked positions have priority +inf, so a trajectory's own jumps come first.
    position = priority.argsort(dim=1)[:, :jumps]
    index = torch.arange(jumps, device=tokens.device).expand_as(position)
    made = index < count[:, None]
    calls = count if steps is None else count.clamp(max=steps)
    call = index * calls[:, None] // count[:, None]
    number = torch.zeros_like(position) if block is None else block.gather(1, position)
    # A call ends with its block at the latest.
    call = F.pad(((call.diff(dim=1) != 0) | (number.diff(dim=1) != 0)).long().cumsum(dim=1), (1, 0))
    call = torch.where(made, _larger_first(call, number, made), -1)
    return Trajectories(
        initial=tokens,
        final=tokens.clone(),
        position=torch.where(call >= 0, position, -1),
        token=torch.full_like(position, -1),
        call=call,
        log_prob=torch.zeros(position.shape, dtype=torch.float32, device=tokens.device),
    )


def _network(
    denoiser: Denoiser,
    trajectories: Trajectories,
    process: MaskedCTMC,
    decoding: Decoding,
    hide: Tensor | None,
    attention_mask: Tensor | None,
) -> _Network | _Guided:
    if decoding.guidance == 0:
        return _Network(denoiser, trajectories, attention_mask)
    return _Guided(denoiser, trajectories, process, decoding.guidance, hide, attention_mask)


def _larger_first(call: Tensor, number: Tensor, made: Tensor) -> Tensor:
    """The calls [B, S] of jumps, as many in each block, whose positions they share out evenly, the larger shares first.

    As LLaDA has them (`get_num_transfer_tokens`). Numbers of blocks int64 [B, S]; what is not `made` does not count.
    """
    index = torch.arange(call.shape[1], device=call.device).expand_as(call)
    opens = F.pad(number.diff(dim=1) != 0, (1, 0), value=True)
    first = index.where(opens, 0).cummax(dim=1).values
    place, block = index - first, opens.cumsum(dim=1) - 1
    first_call = call.gather(1, first)
    size = torch.zeros_like(call).scatter_add(1, block, made.long()).gather(1, block)
    begun = made & (opens | F.pad(call.diff(dim=1) != 0, (1, 0)))
    calls = torch.zeros_like(call).scatter_add(1, block, begun.long()).gather(1, block).clamp(min=1)
    share, larger = size // calls, size % calls
    bound = larger * (share + 1)
    rest = larger + (place - bound) // share.clamp(min=1)
    return first_call + torch.where(place < bound, place // (share + 1), rest)


class _Jumps(NamedTuple):
    """The jumps of one network call, by row."""

    rows: Tensor  # int64 [jumps]: which trajectories make them
    at: Tensor  # int64 [jumps]: which of these trajectories' jumps they are
    position: Tensor  # int64 [jumps]
    active: Tensor  # int64 [b]: the rows that make one, rising
    compact: Tensor  # int64 [jumps]: which of them each is in


def _jumps(trajectories: Trajectories, chosen: Tensor) -> _Jumps:
    """Those chosen, bool [B, S]."""
    rows, at = torch.nonzero(chosen, as_tuple=True)
    active, compact = torch.unique_consecutive(rows, return_inverse=True)
    return _Jumps(rows, at, trajectories.position[rows, at], active, compact)


def _by_call(trajectories: Trajectories) -> list[_Jumps]:
    """The jumps of each network call, all at once: a GPU is waited for here, and not at each call."""
    rows, at = torch.nonzero(trajectories.call >= 0, as_tuple=True)
    call = trajectories.call[rows, at]
    order = call.argsort(stable=True)
    rows, at, call = rows[order], at[order], call[order]
    opens = torch.ones_like(rows, dtype=torch.bool)
    opens[1:] = (call.diff() != 0) | (rows.diff() != 0)  # the first jump of a row in a call
    active, of = rows[opens], opens.long().cumsum(dim=0) - 1
    calls = trajectories.network_calls
    jumps, actives = (torch.bincount(some, minlength=calls) for some in (call, call[opens]))
    compact = of - (actives.cumsum(dim=0) - actives)[call]
    split, split_active = torch.stack((jumps, actives)).tolist()
    parts = (x.split(split) for x in (rows, at, trajectories.position[rows, at], compact))
    return [
        _Jumps(rows, at, position, active, compact)
        for rows, at, position, compact, active in zip(*parts, active.split(split_active), strict=True)
    ]


class _Network:
    """Hidden states of a denoiser along trajectories: of whole sequences, or where it offers them of blocks alone."""

    def __init__(self, denoiser: Denoiser, trajectories: Trajectories, attention_mask: Tensor | None):
        self._denoiser, self._attention_mask = denoiser, attention_mask
        blocks, begin = blocks_of(denoiser), getattr(denoiser, "prefix_cache", None)
        self._passes: Any = None
        if blocks is not None and begin is not None:
            self._block = blocks.numbers(trajectories.initial, attention_mask)
            usable = _one_block_after_another(trajectories, self._block)
            if attention_mask is not None:  # padding on the left is in no block
                padding = attention_mask.cumsum(dim=1) == 0
                self._block = self._block.masked_fill(padding, self._block.min() - 1)
                jumps = padding.gather(1, trajectories.position.clamp(min=0)) & (trajectories.call >= 0)
                usable = usable and not bool(jumps.any())
            if usable:
                self._passes = begin(trajectories.initial, attention_mask)
        if self._passes is None and getattr(denoiser, "approximate_cache", None) is not None:
            raise ValueError(
                "these trajectories do not go from block to block, as approximate_cache does: leave it out"
            )
        # Rows can be equal later on only where some are at first.
        initial = given(trajectories.initial, attention_mask)
        some_equal = self._passes is None and len(distinct(initial).first) < len(initial)
        self._once = some_equal and equal_rows(denoiser, trajectories.initial, attention_mask)

    def hidden_at(self, jumps: _Jumps, states: Tensor) -> Tensor:
        """Hidden states [jumps, D] at states int64 [B, L] where jumps go; those of a row are in one block."""
        rows, position, active, compact = jumps.rows, jumps.position, jumps.active, jumps.compact
        if self._passes is None:
            return self._of_sequences(active, states[active], compact, position)
        block, number = self._block[active], torch.empty_like(active)
        number[compact] = self._block[rows, position]
        begin, end = (block < number[:, None]).sum(dim=1), (block <= number[:, None]).sum(dim=1)
        hidden = self._passes.hidden_states(active, states[active], begin, end)
        return hidden[compact, position - begin[compact]]

    def _of_sequences(self, active: Tensor, states: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Hidden states [jumps, D] at positions of the states [b, L] of active rows, by a call of the distinct ones.

        A call in which all are is the last that is looked at: trajectories part, and looking makes a GPU wait.
        """
        mask = None if self._attention_mask is None else self._attention_mask[active]
        if self._once:
            first, of = distinct(given(states, mask))
            self._once = len(first) < len(states)
            if self._once:
                states, mask, row = states[first], None if mask is None else mask[first], of[row]
        return hidden_at(self._denoiser, states, mask, row, position)


class _Guided:
    """Hidden states that the head maps to guided logits: as it is linear, logits and they are mixed alike."""

    def __init__(
        self,
        denoiser: Denoiser,
        trajectories: Trajectories,
        process: MaskedCTMC,
        scale: float,
        hide: Tensor | None,
        attention_mask: Tensor | None,
    ):
        if denoiser.head().softcap is not None:
            raise ValueError(
                "guidance mixes logits by mixing hidden states, which a soft cap behind the head does not allow: "
                "leave out guidance for this model"
            )
        initial = trajectories.initial
        if hide is None:
            hide = ~process.masked(initial)
            hide = hide if attention_mask is None else hide & (attention_mask != 0)
        elif hide.shape != initial.shape or hide.dtype != torch.bool:
            raise ValueError(f"hide must be bool {list(initial.shape)}; got {hide.dtype} {list(hide.shape)}")
        self._scale, self._hide, self._mask_token = scale, hide, process.mask_token
        self._given = _Network(denoiser, trajectories, attention_mask)
        unguided = dataclasses.replace(trajectories, initial=self._hidden(initial))
        self._unguided = _Network(denoiser, unguided, attention_mask)

    def _hidden(self, states: Tensor) -> Tensor:
        return states.masked_fill(self._hide, self._mask_token)

    def hidden_at(self, jumps: _Jumps, states: Tensor) -> Tensor:
        """As `_Network.hidden_at`."""
        given = self._given.hidden_at(jumps, states)
        without = self._unguided.hidden_at(jumps, self._hidden(states))
        wide = torch.promote_types(given.dtype, torch.float32)
        mixed = without.to(wide) + (self._scale + 1.0) * (given.to(wide) - without.to(wide))
        return mixed.to(given.dtype)


def _one_block_after_another(trajectories: Trajectories, block: Tensor) -> bool:
    """Whether no call reaches into two blocks, and none goes back to one before; numbers of blocks int64 [B, L]."""
    call, number = trajectories.call, block.gather(1, trajectories.position.clamp(min=0))
    both = (call[:, 1:] >= 0) & (call[:, :-1] >= 0)
    later, further = call.diff(dim=1), number.diff(dim=1)
    return not bool((both & ((further < 0) | ((later == 0) & (further != 0)) | (later < 0))).any())


def _first_call_of_block(trajectories: Trajectories, block: Tensor | None) -> Tensor:
    """The first network call at the block of each jump, int64 [B, S], of trajectories as planned."""
    if block is None:
        return torch.zeros_like(trajectories.call)
    number = block.gather(1, trajectories.position.clamp(min=0))
    begins = F.pad(number.diff(dim=1) != 0, (1, 0), value=True)
    return trajectories.call.where(begins, 0).cummax(dim=1).values


def _best_first(trajectories: Trajectories, score: Tensor, call: int, block: Tensor | None) -> Tensor:
    """Reorders the jumps from network call `call` on, so that it fills where the score [B, S] is highest.

    Returns the scores in that order.
    """
    # By block first, then by falling score; stable sorts leave earlier jumps in front, empty ones behind.
    made, empty = (trajectories.call >= 0) & (trajectories.call < call), trajectories.call < 0
    key = (-score).masked_fill(made, -torch.inf).masked_fill(empty, torch.inf)
    order = key.argsort(dim=1, stable=True)
    if block is not None:
        number = block.gather(1, trajectories.position.clamp(min=0))
        number = number.masked_fill(made, int(block.min()) - 1).masked_fill(empty, int(block.max()) + 1)
        order = order.gather(1, number.gather(1, order).argsort(dim=1, stable=True))
    for name in ("position", "token", "log_prob"):
        setattr(trajectories, name, getattr(trajectories, name).gather(1, order))
    return score.gather(1, order)


def _all_above(trajectories: Trajectories, candidates: Tensor, above: Tensor, call: int) -> None:
    """Lets network call `call` make those of its candidates that are above a bound, and one at least, in place.

    Candidates, bool [B, S], are the jumps of a row's block that are left, sorted so that those above it come first.
    What follows is planned at one a call.
    """
    index = torch.arange(above.shape[1], device=above.device)
    done = ((trajectories.call >= 0) & (trajectories.call < call)).sum(dim=1, keepdim=True)
    now = candidates & (above | (index == done))
    later = index - done - now.sum(dim=1, keepdim=True) + call + 1
    waiting = trajectories.call >= call
    trajectories.call = torch.where(now, call, torch.where(waiting, later, trajectories.call))
