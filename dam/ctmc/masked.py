"""The masked (absorbing) chain of masked-diffusion models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dam.ctmc.schedules import Linear, Schedule, sampled
from dam.ops import _philox
from dam.ops._philox import Use


@dataclasses.dataclass(frozen=True)
class MaskedCTMC:
    """A chain that starts with masks where something is to be filled in, and unmasks one position per jump.

        u_t(y, x) = lambda_t(x) (1 / m(x)) p(v | i, x),      lambda_t(x) = m(x) alpha'(t) / (1 - alpha(t))

    for y = x with the masked position i filled with token v; m(x) counts the masked positions. The escape
    rate lambda does not depend on the model, so that two models' path weights have no escape integral, and
    the order of unmasking is uniform and independent of the tokens.

    Args:
        mask_token: token that stands for "not known yet"; it is never drawn.
        schedule: unmasked fraction alpha(t).
        suppress: more tokens that are never drawn.
        vocabulary: tokens from this one on are never drawn either, as those of rows that a head has beyond its
            tokenizer; None where all are tokens.

    Source: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Prop. 2.5.
    """

    mask_token: int
    schedule: Schedule = dataclasses.field(default_factory=Linear)
    suppress: tuple[int, ...] = ()
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        start = float(self.schedule.alpha(torch.zeros((), dtype=torch.float64, device="cpu")))
        if abs(start) > 1e-9:
            raise ValueError(f"MaskedCTMC: a schedule must start with nothing unmasked; alpha(0) is {start:g}")

    def log_rates(self, prediction: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """log u_t(y, x) of logits of p(v | i, x) [B, L, V] at tokens [B, L] and times [B], float64 [B, L, V].

        -inf at positions that are filled in, and for the mask token and suppressed ones.
        """
        logits, destinations = prediction.double(), prediction.shape[2]
        never = [token for token in (self.excluded(destinations), *self.suppressed(destinations)) if token >= 0]
        if never:
            logits = logits.index_fill(2, torch.tensor(never, device=tokens.device), -torch.inf)
        rate = self.schedule.unmasking_rate(time.double()).log()[:, None, None]
        return torch.where(self.masked(tokens)[..., None], rate + logits.log_softmax(dim=2), -torch.inf)

    def escape_bound(self, start: float, end: float, length: int) -> float:
        """What no escape rate of `length` positions exceeds on [start, end].

        For schedules whose rate changes by less than 5% within 1/256 of the interval.
        """
        return 1.05 * length * float(self.schedule.unmasking_rate(sampled(start, end)).max())

    def excluded(self, destinations: int) -> int:
        """What a draw among so many tokens leaves out: the mask, or -1, nothing, where a head has no row for it."""
        return self.mask_token if self.mask_token < destinations else -1

    def suppressed(self, destinations: int) -> list[int]:
        """What else a draw among so many tokens leaves out; the mask may be among it."""
        known = destinations if self.vocabulary is None else self.vocabulary
        return [*(token for token in self.suppress if token < destinations), *range(known, destinations)]

    def left_out(self, destinations: int) -> dict[str, Any]:
        """Both, as the operations' arguments `exclude` and `suppress`."""
        return {"exclude": self.excluded(destinations), "suppress": self.suppressed(destinations)}

    def masked(self, tokens: Tensor) -> Tensor:
        """Boolean, like tokens: where something is left to fill in."""
        return tokens == self.mask_token

    def escape_rate(self, tokens: Tensor, time: Tensor) -> Tensor:
        """lambda_t(x) for tokens [..., L] at time [...]."""
        return self.masked(tokens).sum(dim=-1) * self.schedule.unmasking_rate(time)

    def jump_times(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        row_ids: Tensor | None = None,
    ) -> Tensor:
        """Times at which positions unmask, like tokens [..., L] in float32 (float64 by seed); +inf where nothing is.

        Exact simulation: given nothing else, they are independent with distribution function alpha.

        Args:
            tokens: int64 [..., L].
            generator: torch's, which draws for all rows together; its default one unless given.
            seed: instead of a generator: a row's times then depend on (seed, row id, position from the end) only.
            row_ids: int64 [...], names each row's stream; counted from 0 unless given.
        """
        uniform = _philox.drawn(Use.ORDER, tokens.shape, tokens.device, generator, seed, row_ids)
        return torch.where(self.masked(tokens), self.schedule.inverse(uniform), torch.inf)

    def remask(
        self,
        initial: Tensor,
        final: Tensor,
        generator: torch.Generator | None = None,
        *,
        seed: int | None = None,
        row_ids: Tensor | None = None,
        stratified: bool = False,
        antithetic: bool = False,
    ) -> Tensor:
        """A state on the way from `initial` to `final` [..., L], drawn from the jumps of the trajectory.

        A trajectory visits one state with each number 1 .. m of masks, and every subset of positions of a
        given number is equally likely; so the number is uniform and the subset too.

        Args:
            initial, final: int64 [..., L].
            generator, seed, row_ids: as for `jump_times`.
            stratified: of outcomes [..., K, L], each draws its number of masks from another K-th of them, so that a
                group has few and many: the law of each is as without, means over a group have less noise.
            antithetic: of outcomes [..., K, L], the later half has masks where the earlier half has none, and none
                where that has. The number of masks is then uniform over 0 .. m: a mean over such states, of what is 0
                where nothing is masked, is m / (m + 1) times that without.

        Raises:
            ValueError: K is odd, with antithetic.

        Source: stratified and antithetic draws, Owen, Monte Carlo theory, methods and examples, ch. 8.
        """
        if antithetic:
            return self._in_pairs(initial, final, generator, seed, row_ids, stratified)
        maskable = self.masked(initial)
        count = maskable.sum(dim=-1, keepdim=True)
        waiting = self._waiting(maskable, 1, count, generator, seed, row_ids, stratified)
        return torch.where(waiting, self.mask_token, final)

    def _in_pairs(
        self,
        initial: Tensor,
        final: Tensor,
        generator: torch.Generator | None,
        seed: int | None,
        row_ids: Tensor | None,
        stratified: bool,
    ) -> Tensor:
        if initial.dim() < 2 or initial.shape[-2] % 2:
            raise ValueError(f"remask: antithetic outcomes must be [..., K, L] with an even K; got {list(final.shape)}")
        maskable, half = self.masked(initial), initial.shape[-2] // 2
        ids = None if row_ids is None else row_ids[..., :half]
        first = maskable[..., :half, :]
        waiting = self._waiting(first, 0, first.sum(dim=-1, keepdim=True), generator, seed, ids, stratified)
        waiting = torch.cat((waiting, maskable[..., half:, :] & ~waiting), dim=-2)
        return torch.where(waiting, self.mask_token, final)

    def _waiting(
        self,
        maskable: Tensor,
        fewest: int,
        count: Tensor,
        generator: torch.Generator | None,
        seed: int | None,
        row_ids: Tensor | None,
        stratified: bool,
    ) -> Tensor:
        """Which of the `count` [..., 1] maskable positions [..., L] still wait: `fewest` .. count, any subset."""
        device = maskable.device
        uniform = _philox.drawn(Use.REMASK_COUNT, count.shape, device, generator, seed, row_ids)
        if stratified:
            rank = _philox.drawn(Use.REMASK_STRATUM, count.shape, device, generator, seed, row_ids)
            uniform = (rank.argsort(dim=-2).argsort(dim=-2) + uniform) / count.shape[-2]
        left = fewest + (uniform * (count + 1 - fewest)).long().clamp(max=count - fewest)
        priority = _philox.drawn(Use.REMASK_ORDER, maskable.shape, device, generator, seed, row_ids)
        order = torch.where(maskable, priority, torch.inf).argsort(dim=-1).argsort(dim=-1)
        # The last `left` positions to unmask still wait; unmaskable ones sort behind them and are kept out.
        return maskable & (order >= count - left)
