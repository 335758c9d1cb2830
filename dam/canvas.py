"""Discrete Adjoint Matching of models that undo uniform noise on a canvas: trajectories, path weights and losses.

The chain is `dam.ctmc.UniformCTMC` at N + 1 times: from t to s every position of the canvas moves by itself, as the
reversal does whose data has the law p(X_1^i | x_t) that the model predicts at x_t:

    P(x_s^i = v | x_t) = sum_z p(X_1^i = z | x_t) q(x_s^i = v | x_t^i, X_1^i = z)

q being the bridge of uniform noise. So one network call a step, at whatever times; and no array [B, C, V], as P needs
p at two tokens of each position only, x_t^i and v. A position that stays has a probability too. Over steps that
shrink its ratio under base and model tends to exp(integral of (Lambda - Lambda_base) dt), the escape integral of the
path weight in continuous time, and P to the rates of `UniformCTMC.log_rates`; at any number of steps the weights of the
chain that is sampled are exact.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dam.ctmc import UniformCTMC
from dam.models.canvas import CanvasDenoiser
from dam.ops import _philox
from dam.ops._head import Head
from dam.ops._philox import Use
from dam.ops.jump import jump
from dam.ops.linear_jump import linear_jump
from dam.ops.linear_log_prob import linear_log_prob
from dam.ops.linear_matching_loss import linear_matching_loss
from dam.ops.log_prob import log_prob


@dataclasses.dataclass
class CanvasPaths:
    """B trajectories of canvases of C tokens, in N steps."""

    times: Tensor  # float64 [N + 1], from 0 to 1
    canvas: Tensor  # int64 [B, N + 1, C]: X at these times, from uniform noise to the outcome
    log_prob: Tensor  # float64 [B, N]: log P of each step of all positions, jumps and stays, under the sampler
    base_log_prob: Tensor | None = None  # float64 [B, N]: the same under the base

    @property
    def final(self) -> Tensor:
        """The outcomes X_1, int64 [B, C]."""
        return self.canvas[:, -1]

    @property
    def log_ratio(self) -> Tensor:
        """log P_base - log P of each step [B, N]; the path's log weight is its sum, and `tilted_weights` takes it."""
        if self.base_log_prob is None:
            raise ValueError("these trajectories carry no log-probabilities of the base: pass base= to rollout")
        return self.base_log_prob - self.log_prob


def step_times(process: UniformCTMC, steps: int) -> Tensor:
    """Times 0 = t_0 < ... < t_N = 1 of a chain of N steps, float64 [N + 1]: alpha(t) rises by as much in each."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    start = float(process.schedule.alpha(torch.zeros((), dtype=torch.float64, device="cpu")))
    times = process.schedule.inverse(torch.linspace(start, 1.0, steps + 1, dtype=torch.float64, device="cpu"))
    times[0], times[-1] = 0.0, 1.0
    return times


@torch.no_grad()
def rollout(
    denoiser: CanvasDenoiser,
    prompt: Tensor,  # [B, P]
    process: UniformCTMC,
    *,
    steps: int,
    base: CanvasDenoiser | None = None,
    attention_mask: Tensor | None = None,  # [B, P]
    canvas_length: int | None = None,
    temperature: float = 1.0,
    seed: int,
    row_ids: Tensor | None = None,  # [B]
) -> CanvasPaths:
    """Trajectories of one canvas behind each prompt, from uniform noise at time 0 to an outcome at time 1.

    The model is called `steps` times, at the times of `step_times` but the last, on all B canvases, and the head runs
    at all positions twice for each: for a draw, and for two log-probabilities. The base likewise, once. Text longer
    than a canvas is one canvas after another: the next one's prompt is the prompt and the outcome, and log weights add.

    It is no decoder. DiffusionGemma's own `generate` keeps the tokens of least entropy and draws all others anew,
    cools, conditions on the step before, and stops when nothing changes: no chain of this kind, but for one step, where
    both give the likeliest tokens at temperature 0.

    Args:
        denoiser: the model.
        prompt: int64 [B, P].
        process: names the size of the vocabulary, and alpha(t); of models that predict data.
        steps: N.
        base: also record the base's log-probabilities of the same steps (as many network calls again).
        attention_mask: [B, P], of prompts padded on the left.
        canvas_length: C; the denoiser's unless given.
        temperature: of the predicted data p(X_1^i | x); 0 takes the likeliest. The noise has none.
        seed: what is drawn at a position depends on (seed, row id, number of the step, position, canvas) only.
        row_ids: int64 [B], names each trajectory's stream; 0 .. B-1 unless given.

    Returns:
        CanvasPaths, log-probabilities being those of the chain of the tempered model (at temperature 0, which has none,
        of that at 1).

    Raises:
        ValueError, TypeError: an argument is out of range, the process predicts something else, or its size is not
            that of the head; or as the denoiser says.

    Source: posterior steps: Austin et al., Structured Denoising Diffusion Models in Discrete State-Spaces, arXiv
    2107.03006, Eq. 4; weights: So et al., Discrete Adjoint Matching, arXiv 2602.07132, Eq. 12.
    """
    times = step_times(process, steps)
    length = denoiser.canvas_length if canvas_length is None else canvas_length
    if length < 1:
        raise ValueError(f"rollout: canvas_length must be at least 1; got {length}")
    _check(denoiser, process)
    row_ids = _philox.row_ids_of(prompt.shape[:1], prompt.device, row_ids)
    conditioned = denoiser.conditioned(prompt, attention_mask)
    states, log_probs = [first_canvas(process, length, seed=seed, row_ids=row_ids)], []
    # log_prob at temperature 0 is by convention that at temperature 1, as for jump.
    for n in range(steps):
        before = states[-1]
        hidden = conditioned.hidden_states(before, times[n].to(prompt.device).expand(len(prompt)))
        head = denoiser.head()
        data = linear_jump(
            hidden,
            **head.arguments(hidden.dtype),
            temperature=temperature,
            seed=seed,
            row_ids=_philox.ids(seed, Use.JUMP, row_ids, length, sample=n),
        ).target
        bridge = _Bridge.between(process, times[n], times[n + 1])
        after = _after(process, bridge, before, data, n, seed, row_ids)
        log_probs.append(_log_prob(hidden, head, before, after, bridge, temperature or 1.0).sum(dim=1))
        states.append(after)
    paths = CanvasPaths(times.to(prompt.device), torch.stack(states, dim=1), torch.stack(log_probs, dim=1))
    if base is not None:
        paths.base_log_prob = path_log_prob(
            base, prompt, paths, process, attention_mask=attention_mask, temperature=temperature
        )
    return paths


def first_canvas(process: UniformCTMC, length: int, *, seed: int, row_ids: Tensor) -> Tensor:
    """The uniform noise that trajectories begin with, int64 [B, length], as of `rollout`."""
    return _uniform_tokens(process, seed, row_ids, length, 0)


class Step(NamedTuple):
    """What becomes of canvases in one step."""

    canvas: Tensor  # int64 [B, C]
    log_prob: Tensor  # float64 [B, C]: log P of what becomes of each position, a jump or a stay


@torch.no_grad()
def step(
    logits: Tensor,  # [B, C, V]
    canvas: Tensor,  # [B, C]
    process: UniformCTMC,
    number: int,
    *,
    steps: int,
    temperature: float = 1.0,
    seed: int,
    row_ids: Tensor,  # [B]
) -> Step:
    """Step `number`, from 0 on, of the chain that `rollout` draws, by logits that another has made of the model.

    For a server, whose sampler is given logits: the draws of `rollout` from equal ones, and no further array of
    [B, C, V].

    Args:
        logits: of the data, at these canvases: the head's, after its soft cap.
        canvas: int64 [B, C], X at the step's first time.
        process, steps, temperature, seed, row_ids: as for `rollout`.

    Raises:
        ValueError, TypeError: as `dam.jump`, or steps is below 1.
    """
    times = step_times(process, steps)
    bridge = _Bridge.between(process, times[number], times[number + 1])
    data = jump(
        logits,
        temperature=temperature,
        seed=seed,
        row_ids=_philox.ids(seed, Use.JUMP, row_ids, canvas.shape[1], sample=number),
    ).target
    after = _after(process, bridge, canvas, data, number, seed, row_ids)
    value = log_prob(logits, torch.stack((canvas, after), dim=2), temperature=temperature or 1.0)
    return Step(after, _of_bridge(bridge, value, canvas, after))


@torch.no_grad()
def path_log_prob(
    denoiser: CanvasDenoiser,
    prompt: Tensor,  # [B, P]
    paths: CanvasPaths,
    process: UniformCTMC,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log P of each step of trajectories under another model, float64 [B, N], by as many network calls."""
    _check(denoiser, process)
    conditioned = denoiser.conditioned(prompt, attention_mask)
    out = []
    for n in range(paths.canvas.shape[1] - 1):
        before, after = paths.canvas[:, n], paths.canvas[:, n + 1]
        hidden = conditioned.hidden_states(before, paths.times[n].expand(len(prompt)))
        bridge = _Bridge.between(process, paths.times[n], paths.times[n + 1])
        out.append(_log_prob(hidden, denoiser.head(), before, after, bridge, temperature or 1.0).sum(dim=1))
    return torch.stack(out, dim=1)


def path_loss(
    denoiser: CanvasDenoiser,
    prompt: Tensor,  # [B, P]
    paths: CanvasPaths,
    weight: Tensor,  # [B]
    process: UniformCTMC,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The weighted cross-entropy -weight log P(x_s | x_t) / C of one step of each trajectory, drawn uniformly.

    At states that the trajectories went through, and of the chain that drew them: with weights of p* its minimum is the
    chain of these steps that is nearest to p*, in KL(p* || p), over paths. Where all weights are equal a model stays
    what it is, in expectation, at any number of steps and however its predictions at different canvases and times fit
    each other. For that the model must be the one that drew, and weights may have any baseline: `weight - 1`.

    Arguments are those of `rollout`, and:
        paths: of `rollout`.
        weight: of each trajectory, as of `dam.adjoint.tilted_weights`.
        generator: draws the steps.

    Source: So et al., arXiv 2602.07132, Eq. 14 at the states of Alg. 1.
    """
    _check(denoiser, process)
    rows = torch.arange(len(prompt), device=prompt.device)
    device = prompt.device if generator is None else generator.device
    step = torch.randint(paths.canvas.shape[1] - 1, (len(prompt),), generator=generator, device=device).to(rows.device)
    before, after = paths.canvas[rows, step], paths.canvas[rows, step + 1]
    hidden = denoiser.conditioned(prompt, attention_mask).hidden_states(before, paths.times[step])
    bridge = _Bridge.between(process, paths.times[step][:, None], paths.times[step + 1][:, None])
    log_prob = _log_prob(hidden, denoiser.head(), before, after, bridge, temperature)
    return -(weight.to(log_prob.dtype) * log_prob.mean(dim=1)).mean()


class Renoised(NamedTuple):
    """States on the way to outcomes, at one of the times of a chain that the model is called at."""

    canvas: Tensor  # int64 [B, C]
    time: Tensor  # float64 [B]


def renoised(
    final: Tensor,  # [B, C]
    process: UniformCTMC,
    *,
    steps: int,
    generator: torch.Generator | None = None,
) -> Renoised:
    """States X_t of outcomes X_1, by noise on each position: q(x_t | X_1), t drawn uniformly from those of `steps`."""
    device = final.device if generator is None else generator.device
    at = torch.randint(steps, (len(final),), generator=generator, device=device)
    time = step_times(process, steps).to(final.device)[at.to(final.device)]
    return Renoised(process.noise(final, time, generator), time)


def posterior_loss(
    denoiser: CanvasDenoiser,
    prompt: Tensor,  # [B, P]
    states: Renoised,
    final: Tensor,  # [B, C]
    weight: Tensor,  # [B]
    process: UniformCTMC,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The matching loss at re-noised outcomes: the mean over rows and positions of -weight log p(X_1^i | i, X_t).

    Its minimum is the terminal posterior p*(X_1^i | X_t) of outcomes with law p*, with which the chain generates p* as
    its steps shrink. Of a model that is not told the time, it is the mean of the posteriors at the times that canvas
    may be of. A base whose predictions are not those of one joint law, as no network's are, or of few steps, is no
    minimum of it, even with equal weights: it drifts without a reward, which `path_loss` does not. One outcome serves
    for as many states as it is re-noised to, of older models too.

    Args:
        denoiser: the model.
        prompt, attention_mask: as for `rollout`.
        states: of `renoised`.
        final: the outcomes that they are of.
        weight: of each, as of `dam.adjoint.tilted_weights`.
        process: names the size of the vocabulary.
        temperature: that the trajectories were drawn at: what is trained is the model at it.

    Source: So et al., arXiv 2602.07132, Eq. 14; docs of `dam.adjoint`: estimator "posterior", normalizer "group".
    """
    _check(denoiser, process)
    hidden = denoiser.conditioned(prompt, attention_mask).hidden_states(states.canvas, states.time)
    head = denoiser.head()
    return linear_matching_loss(
        hidden,
        target=final[..., None],
        weight=weight[:, None, None].expand(*final.shape, 1),
        **head.arguments(hidden.dtype),
        temperature=temperature,
    )


def check_process(process: UniformCTMC) -> None:
    """Raises TypeError: the process is none of a canvas."""
    if not isinstance(process, UniformCTMC) or process.predicts != "data":
        raise TypeError(
            f'the process of a canvas must be a UniformCTMC with predicts="data"; got {process!r}: other noise has '
            "another bridge"
        )


def _check(denoiser: CanvasDenoiser, process: UniformCTMC) -> None:
    check_process(process)
    rows = denoiser.head().weight.shape[0]
    if process.size != rows:
        raise ValueError(
            f"the process has {process.size} values and the model's head {rows} tokens: noise is uniform over all that "
            f"the model knows, so it must be UniformCTMC({rows})"
        )


def _uniform_tokens(process: UniformCTMC, seed: int, row_ids: Tensor, length: int, sample: int) -> Tensor:
    uniform = _philox.uniform(seed, Use.NOISE, row_ids, length, sample=sample)
    return (uniform * process.size).long().clamp(max=process.size - 1)


class _Bridge(NamedTuple):
    """q(x_s | x_t, X_1) of one position for t < s, by what becomes of it: kept, made that of X_1, or drawn uniformly.

    With a = alpha(t) / alpha(s) a position is kept from s to t with probability a, else drawn; and from 1 to s with
    alpha(s). The four cases of both, given x_t and X_1.
    """

    keep: Tensor  # x_s = x_t where x_t != X_1, by a (1 - alpha(s)) / (1 - alpha(t))
    take: Tensor  # x_s = X_1 there, by (1 - a) alpha(s) / (1 - alpha(t))
    replace: Tensor  # x_s is uniform there, by the rest
    replace_same: Tensor  # where x_t = X_1, which stays else
    size: int

    @classmethod
    def between(cls, process: UniformCTMC, start: Tensor, end: Tensor) -> _Bridge:
        before, after = (process.schedule.alpha(time.double()) for time in (start, end))
        ratio, gone = before / after, 1.0 - before
        both = (1.0 - ratio) * (1.0 - after)
        return cls(
            ratio * (1.0 - after) / gone,
            (after - before) / gone,
            both / gone,
            both / (process.size * before + gone),
            process.size,
        )

    def draw(self, before: Tensor, data: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """x_s of x_t = before and X_1 = data, by uniforms in (0, 1) and uniform tokens, all [B, C]."""
        keep, take, replace_same = (x.to(before.device) for x in (self.keep, self.take, self.replace_same))
        moved = torch.where(uniform < keep, before, torch.where(uniform < keep + take, data, noise))
        return torch.where(before == data, torch.where(uniform < replace_same, noise, before), moved)

    def log_prob(self, log_before: Tensor, log_after: Tensor, stays: Tensor) -> Tensor:
        """log P(x_s | x_t) of log p(X_1 = x_t) and log p(X_1 = x_s), float64 [B, C]; bool [B, C] whether they are one.

        A sum of what is not negative, so that no digits are lost.
        """
        keep, take, replace, replace_same = (x.to(stays.device) for x in self[:4])
        right, other = log_before.exp(), -torch.expm1(log_before)
        noise = (replace * other + replace_same * right) / self.size
        kept = keep * other + (1.0 - replace_same) * right + noise
        return torch.where(stays, kept, take * log_after.exp() + noise).log()


def _log_prob(hidden: Tensor, head: Head, before: Tensor, after: Tensor, bridge: _Bridge, temperature: float) -> Tensor:
    """log P(x_s^i | x_t) of every position, float64 [B, C], by one fused pass over the head."""
    value = linear_log_prob(
        hidden,
        target=torch.stack((before, after), dim=2),
        **head.arguments(hidden.dtype),
        temperature=temperature,
    )
    return _of_bridge(bridge, value, before, after)


def _of_bridge(bridge: _Bridge, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """log P(x_s^i | x_t), float64 [B, C], of log p(X_1^i) at what it was and what it is, [B, C, 2]."""
    log_before, log_after = value.double().clamp(max=0.0).unbind(dim=2)  # of rounding above 0
    return bridge.log_prob(log_before, log_after, before == after)


def _after(
    process: UniformCTMC, bridge: _Bridge, before: Tensor, data: Tensor, n: int, seed: int, row_ids: Tensor
) -> Tensor:
    """Canvases after step n, whose data was drawn."""
    length = before.shape[1]
    uniform = _philox.uniform(seed, Use.THINNING, row_ids, length, sample=n)
    return bridge.draw(before, data, uniform, _uniform_tokens(process, seed, row_ids, length, n + 1))
