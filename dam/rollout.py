"""Trajectories of a masked chain: which position was filled with what, in what order, and how likely it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.models.attention import Blocks
from dam.models.denoiser import Denoiser, blocks_of, check_left_padding
from dam.ops import _philox
from dam.ops._philox import Use
from dam.ops.linear_jump import linear_jump
from dam.ops.linear_log_prob import linear_log_prob

ORDERS = ("random", "confidence")


@dataclasses.dataclass
class Trajectories:
    """B trajectories of at most S jumps over sequences of length L, in the order in which they jumped."""

    initial: Tensor  # int64 [B, L]: X_0, masks where something was filled in
    final: Tensor  # int64 [B, L]: X_1
    position: Tensor  # int64 [B, S]: where jump s went, -1 where a trajectory had fewer jumps
    token: Tensor  # int64 [B, S]: what it put there, -1 likewise
    call: Tensor  # int64 [B, S]: the network call that it came from, -1 likewise
    log_prob: Tensor  # float32 [B, S]: log-probability of the token under the sampler, 0 where no jump
    base_log_prob: Tensor | None = None  # float32 [B, S]: the same under the base model

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
        """Batched forward passes of the model that were made."""
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
            if field.name not in ("initial", "final"):
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


def log_mixture(log_path: Tensor, from_base: Tensor) -> Tensor:
    """log of how likely a trajectory is to be drawn where the base draws a share s of its group, over the model's.

        log(1 - s + s exp(log_path)),     s = mean_k from_base

    Args:
        log_path: floating point [G, K], log of how likely the base makes a trajectory over how likely the model does.
        from_base: bool [G, K], which the base drew.

    Returns:
        float64 [G, K].

    Source: Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995.
    """
    share = from_base.double().mean(dim=1, keepdim=True)
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
    order: str = "random",
    temperature: float = 1.0,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> Trajectories:
    """Fills in every masked position of `tokens`.

    The head runs only at the positions that jump: a trajectory costs as many head rows as it has masks, at
    any number of steps. Only the network below the head runs once per step: over the block that a row is at where the
    denoiser offers that (`Denoiser.prefix_cache`), else over the sequence.

    Args:
        denoiser: the model.
        tokens: int64 [B, L], X_0: mask tokens where something is to be filled in.
        process: names the mask token.
        base: also record the base model's log-probabilities of the same jumps (as many network calls again, but for
            the layers that a base knows to be the model's: `Denoiser.beside`).
        attention_mask: [B, L], passed on to the model.
        steps: network calls per trajectory. None fills one position per call, which simulates the chain
            exactly. With fewer calls, positions filled by one call are drawn independently: another chain,
            whose path weights against the base under the same steps are still exact. No call reaches into the next
            block, so there may be one more for each block.
        block_length: fill blocks of this many positions, counted from the end, from left to right; None is one block,
            or where the denoiser has blocks (`dam.models.blocks_of`) these.
        order: "random" unmasks in uniform order (within a block), as the chain does. "confidence" unmasks
            where the drawn token is likeliest; this order depends on the model, does not cancel in path
            weights, and needs the head at every masked position of the block: use it to decode, not to train.
        temperature: of the tokens; 0 takes the likeliest.
        seed: of the order and the tokens: what is drawn at a position depends on (seed, row id, position, states) only,
            not on the batch. Positions count from the end, so padding in front changes no draw.
        row_ids: int64 [B], names each trajectory's stream; 0 .. B-1 unless given.

    Returns:
        Trajectories, log-probabilities being those of the tempered distribution that was sampled.

    Raises:
        ValueError, TypeError: an argument is out of range, or a trajectory has nothing to fill in; block_length is
            another than that of the denoiser's attention, or the base's blocks are others; rows are padded on the left
            and the denoiser does not take such.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"rollout: tokens must be int64 [B, L]; got {tokens.dtype} {list(tokens.shape)}")
    if order not in ORDERS:
        raise ValueError(f"rollout: order must be one of {', '.join(ORDERS)}; got {order!r}")
    for name, value in (("steps", steps), ("block_length", block_length)):
        if value is not None and value < 1:
            raise ValueError(f"rollout: {name} must be at least 1; got {value}")
    count = process.masked(tokens).sum(dim=1)
    if bool((count == 0).any()):
        raise ValueError(f"rollout: row {int((count == 0).nonzero()[0])} of tokens has no mask token to fill in")

    blocks = blocks_for(denoiser, block_length, base)
    for model in (denoiser, base):
        check_left_padding(model, attention_mask)

    length = tokens.shape[1]
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    priority = process.jump_times(tokens, seed=seed, row_ids=row_ids)
    block = None if blocks is None else blocks.numbers(tokens, attention_mask)
    trajectories = _planned(tokens, priority, count, steps, block)
    begins = _first_call_of_block(trajectories, block)
    beside = _beside(base, denoiser, order)
    network = _Network(denoiser if beside is None else beside, trajectories, attention_mask)
    base_log_prob = torch.zeros_like(trajectories.log_prob)
    for n in range(trajectories.network_calls):
        # By confidence, everything still masked of the block is drawn, and the likeliest of it kept.
        drawn_now = (trajectories.call >= n) & (begins <= n) if order == "confidence" else trajectories.call == n
        # A position by confidence is drawn in call after call, in each anew.
        if n == 0 or order == "confidence":
            stream = _philox.ids(seed, Use.JUMP, row_ids, length, sample=n).flip(1)
        rows, at, hidden = network.hidden_at(trajectories, drawn_now, trajectories.final)
        if beside is not None:
            hidden, of_base = (part.contiguous() for part in hidden.chunk(2, dim=-1))
        head = denoiser.head()
        drawn = linear_jump(
            hidden,
            **head.arguments(hidden.dtype),
            **process.left_out(head.weight.shape[0]),
            temperature=temperature,
            seed=seed,
            row_ids=stream[rows, trajectories.position[rows, at]],
        )
        trajectories.token[rows, at] = drawn.target
        trajectories.log_prob[rows, at] = drawn.log_prob.to(trajectories.log_prob.dtype)
        if beside is not None:
            assert base is not None
            of_jumps = _log_prob(base, of_base, drawn.target, process, temperature)
            base_log_prob[rows, at] = of_jumps.to(base_log_prob.dtype)
        if order == "confidence":
            _likeliest_first(trajectories, n, block)
        rows, at = torch.nonzero(trajectories.call == n, as_tuple=True)
        trajectories.final[rows, trajectories.position[rows, at]] = trajectories.token[rows, at]
    if beside is not None:
        trajectories.base_log_prob = base_log_prob
    elif base is not None:
        trajectories.base_log_prob = jump_log_prob(
            base, trajectories, process, attention_mask=attention_mask, temperature=temperature
        )
    return trajectories


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
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability [B, S] of each jump of `trajectories` under another model that sampled in the same steps."""
    out = torch.zeros_like(trajectories.log_prob)
    network = _Network(denoiser, trajectories, attention_mask)
    for n in range(trajectories.network_calls):
        states = trajectories.states_before(n)
        rows, at, hidden = network.hidden_at(trajectories, trajectories.call == n, states)
        value = _log_prob(denoiser, hidden, trajectories.token[rows, at], process, temperature)
        out[rows, at] = value.to(out.dtype)
    return out


def _log_prob(denoiser: Denoiser, hidden: Tensor, target: Tensor, process: MaskedCTMC, temperature: float) -> Tensor:
    """Log-probabilities [jumps] of tokens where the hidden states of a denoiser are these, [jumps, D]."""
    head = denoiser.head()
    return linear_log_prob(
        hidden,
        target=target,
        **head.arguments(hidden.dtype),
        **process.left_out(head.weight.shape[0]),
        # log_prob at temperature 0 is by convention that at temperature 1, as for jump.
        temperature=temperature or 1.0,
    )


def _beside(base: Denoiser | None, denoiser: Denoiser, order: str) -> Denoiser | None:
    """Model and base as one denoiser, where the base has that and what is drawn at a state is what stays."""
    beside = getattr(base, "beside", None)
    return None if beside is None or order != "random" else beside(denoiser)


class PathLogProbs(NamedTuple):
    """Log-probabilities of outcomes as paths in M orders of unmasking, under the model and under its base."""

    log_prob: Tensor  # float64 [..., M], the first in the order in which the outcome was drawn
    base_log_prob: Tensor  # float64 [..., M], in the same orders

    @property
    def log_ratio(self) -> Tensor:
        """log of the mean of p_base(x | order) over the M orders, less that of p_model(x | order): float64 [...].

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
    temperature: float = 1.0,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> PathLogProbs:
    """How likely outcomes are by other orders of unmasking too, under the model and its base: [B, orders].

    Each order beyond a trajectory's own costs as many network calls of both as the rollout made.

    Args:
        denoiser: the model that drew.
        base: its base.
        trajectories: of `rollout` in random order, with `base=`.
        orders: M, the trajectory's own among them.
        attention_mask, steps, block_length, temperature, row_ids: as given to `rollout`.
        seed: of the other orders; they depend on (seed, row id, number of the order, position from the end) only, and
            share no draw with `rollout` under the same seed.

    Raises:
        ValueError: orders is below 1, or the trajectories carry no log-probabilities of the base.
    """
    if orders < 1:
        raise ValueError(f"log_prob_over_orders: orders must be at least 1; got {orders}")
    if trajectories.base_log_prob is None:
        raise ValueError("log_prob_over_orders: pass base= to rollout; these trajectories lack the base's")
    blocks = blocks_for(denoiser, block_length, base)
    block = None if blocks is None else blocks.numbers(trajectories.initial, attention_mask)
    paths = [(trajectories.log_prob, trajectories.base_log_prob)]
    for n in range(1, orders):
        other = _reordered(trajectories, process, n, steps, block, seed, row_ids)
        paths.append(
            tuple(  # type: ignore[arg-type]
                jump_log_prob(one, other, process, attention_mask=attention_mask, temperature=temperature)
                for one in (denoiser, base)
            )
        )
    return PathLogProbs(
        *(torch.stack([p.double().sum(dim=1) for p in each], dim=1) for each in zip(*paths, strict=True))
    )


def _reordered(
    trajectories: Trajectories,
    process: MaskedCTMC,
    number: int,
    steps: int | None,
    block: Tensor | None,
    seed: int,
    row_ids: Tensor | None,
) -> Trajectories:
    """The same outcomes by another order, drawn uniformly; its log-probabilities are left 0."""
    tokens = trajectories.initial
    row_ids = _philox.row_ids_of(tokens.shape[:1], tokens.device, row_ids)
    uniform = _philox.uniform(seed, Use.OTHER_ORDER, row_ids, tokens.shape[1], sample=number).flip(1)
    masked = process.masked(tokens)
    other = _planned(tokens, torch.where(masked, uniform, torch.inf), masked.sum(dim=1), steps, block)
    there = trajectories.final.gather(1, other.position.clamp(min=0))
    return dataclasses.replace(other, final=trajectories.final, token=torch.where(other.call >= 0, there, -1))


def _planned(tokens: Tensor, priority: Tensor, count: Tensor, steps: int | None, block: Tensor | None) -> Trajectories:
    """Trajectories that fill the `count` [B] masks of tokens by rising priority in [0, 1); +inf where nothing is.

    Blocks, whose numbers are int64 [B, L], one after another.
    """
    if block is not None:
        priority = priority + block
    jumps = int(count.max())
    # Unmasked positions have priority +inf, so a trajectory's own jumps come first.
    position = priority.argsort(dim=1)[:, :jumps]
    index = torch.arange(jumps, device=tokens.device).expand_as(position)
    calls = count if steps is None else count.clamp(max=steps)
    call = index * calls[:, None] // count[:, None]
    if block is not None:
        # A call ends with its block at the latest.
        number = block.gather(1, position)
        begins = (call.diff(dim=1) != 0) | (number.diff(dim=1) != 0)
        call = F.pad(begins.long().cumsum(dim=1), (1, 0))
    call = torch.where(index < count[:, None], call, -1)
    return Trajectories(
        initial=tokens,
        final=tokens.clone(),
        position=torch.where(call >= 0, position, -1),
        token=torch.full_like(position, -1),
        call=call,
        log_prob=torch.zeros(position.shape, dtype=torch.float32, device=tokens.device),
    )


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

    def hidden_at(self, trajectories: Trajectories, chosen: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and jump indices of the chosen jumps, bool [B, S], and the hidden states [jumps, D] where they go.

        Those of a row are in one block.
        """
        rows, at = torch.nonzero(chosen, as_tuple=True)
        active, compact = torch.unique_consecutive(rows, return_inverse=True)
        position = trajectories.position[rows, at]
        if self._passes is None:
            mask = None if self._attention_mask is None else self._attention_mask[active]
            return rows, at, self._denoiser.hidden_states(states[active], mask)[compact, position]
        block, number = self._block[active], torch.empty_like(active)
        number[compact] = self._block[rows, position]
        begin, end = (block < number[:, None]).sum(dim=1), (block <= number[:, None]).sum(dim=1)
        hidden = self._passes.hidden_states(active, states[active], begin, end)
        return rows, at, hidden[compact, position - begin[compact]]


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


def _likeliest_first(trajectories: Trajectories, call: int, block: Tensor | None) -> None:
    """Reorders the jumps from network call `call` on, so that it fills where the drawn tokens are likeliest."""
    # By block first, then by falling probability; a stable sort leaves earlier jumps in front, empty ones behind.
    key = -trajectories.log_prob.double().exp()
    if block is not None:
        key += 2.0 * block.gather(1, trajectories.position.clamp(min=0))
    key[trajectories.call < call] = -torch.inf
    key[trajectories.call < 0] = torch.inf
    order = key.argsort(dim=1, stable=True)
    for name in ("position", "token", "log_prob"):
        setattr(trajectories, name, getattr(trajectories, name).gather(1, order))
