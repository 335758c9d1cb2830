"""Prompts to trajectories: in this process, or by an engine that serves the model."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding, given_decoding
from dam.engines import InProcess, Prompts, RolloutEngine, served_parameters
from dam.engines.contract import check_same_model
from dam.models.denoiser import Denoiser, MaskedLM, blocks_of, equal_rows, hidden_at
from dam.models.sharding import waits_for_others
from dam.rollout import PathLogProbs, Trajectories, blocks_for, jump_log_prob, log_prob_over_orders
from dam.train.base import Base, DenoiserFactory
from dam.train.config import DAMConfig
from dam.train.networks import evaluating
from dam.train.processes import in_step, together
from dam.train.turns import in_turns

_COMPARED = 4  # trajectories of an engine whose log-probabilities are looked at, once


class _InBlocks:
    """A base whose attention has no blocks, as it draws in those of the model."""

    def __init__(self, base: Denoiser, model: Denoiser):
        self.hidden_states, self.head = base.hidden_states, base.head
        self.blocks = blocks_of(model)
        self.left_padding = getattr(base, "left_padding", True)
        self._base = base

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        return hidden_at(self._base, tokens, attention_mask, row, position)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        return equal_rows(self._base, tokens, attention_mask)


class Sampler:
    """Draws trajectories of a model, with the log-probabilities of its base where they are asked for.

    Args:
        denoiser: makes a `Denoiser` of a module.
        process: names the mask token.
        args: steps, blocks and trajectories per network call of a rollout.
        base: the base model.
        precision: makes the context in which networks run, such as autocast.
        engine: draws the model's trajectories of training; None draws them in this process.
    """

    def __init__(
        self,
        denoiser: DenoiserFactory,
        process: MaskedCTMC,
        args: DAMConfig,
        base: Base,
        precision: Callable[[], AbstractContextManager[Any]],
        engine: RolloutEngine | None = None,
    ):
        self._denoiser, self._process, self._args = denoiser, process, args
        self._base, self._precision, self._engine = base, precision, engine
        self._engine_is_compared = engine is None
        self._run: int | None = None  # names this run's weights, on all processes alike

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager: the model without dropout and gradients."""
        return evaluating(model, self._precision())

    def base(self, model: nn.Module) -> Denoiser:
        return self._base.denoiser(model, self._denoiser)

    def is_divided(self, model: nn.Module) -> bool:
        """Whether a network call of one process waits for those of others."""
        reference = getattr(self._base, "model", None)
        return waits_for_others(model) or (reference is not None and waits_for_others(reference))

    @contextlib.contextmanager
    def _denoisers(
        self, model: nn.Module, tokens: Tensor, attention_mask: Tensor
    ) -> Iterator[tuple[Denoiser, Denoiser]]:
        """Context manager: of the model and its base, of which processes may make as many calls as each needs."""
        both = (self._denoiser(model), self.base(model))
        if not self.is_divided(model):
            yield both
            return
        with in_turns(both, tokens, attention_mask) as (denoiser, base):
            yield denoiser, base

    def compare(self, model: nn.Module, tokens: Tensor, attention_mask: Tensor) -> None:
        """That log-probabilities of the model and of its base are those of their own logits, where they return some.

        Raises:
            ValueError, TypeError: they are not; as `dam.models.MaskedLM`.
        """
        for denoiser in (self._denoiser(model), self.base(model)):
            if isinstance(denoiser, MaskedLM):
                denoiser.compare(tokens, attention_mask)

    def _pieces(self, rows: int) -> Iterator[slice]:
        size = self._args.rollout_batch_size
        return (slice(start, start + size) for start in range(0, rows, size))

    def send(self, model: nn.Module, step: int) -> None:
        """Sends the engine, if there is one, the model's weights, which are those of a step; called by all processes.

        Raises:
            EngineError: it did not take them; on all processes, as `in_step` says.
        """
        engine = self._engine
        if engine is None:
            return
        if self._run is None:
            self._run = together(lambda: secrets.randbits(31))[0]
        version = self._run << 32 | step
        # Gathered by all before anything can fail in one process alone; kept by the first, in the host's memory.
        sends, parameters = self._args.process_index == 0, []
        for name, value in served_parameters(model):
            if sends:
                parameters.append((name, value.cpu()))
        in_step(lambda: engine.update(parameters if sends else None, version))

    def rollout(
        self,
        model: nn.Module,
        tokens: Tensor,
        attention_mask: Tensor,
        *,
        seed: int,
        row_ids: Tensor,
        served: bool = False,
        base: bool = False,
        from_base: Tensor | None = None,
        decoding: Decoding | None = None,
        temperature: float | None = None,
        stop_tokens: Sequence[int] = (),
        start: Tensor | None = None,
    ) -> Trajectories:
        """`dam.rollout.rollout` in pieces of rollout_batch_size, whose draws are those of the whole.

        Where from_base, bool [B], says so the base draws; log_prob stays that of the model, base_log_prob the base's.
        What the model draws is drawn by the engine, if there is one, where `served`: by the weights of the last `send`.
        """
        by_threshold = decoding is not None and decoding.threshold is not None
        denoiser = self._denoiser(model)
        blocks = blocks_for(denoiser, self._args.block_length)
        prompts = Prompts(
            tokens,
            self._process,
            seed,
            row_ids,
            attention_mask,
            steps=None if by_threshold else self._args.diffusion_steps,
            block_length=None if blocks is None else blocks.length,
            decoding=given_decoding(decoding, temperature=temperature),
            stop_tokens=tuple(stop_tokens),
            start=start,
        )
        size = self._args.rollout_batch_size
        everything = torch.arange(len(tokens), device=tokens.device)
        with self._denoisers(model, tokens, attention_mask) as (denoiser, reference):
            engine = self._engine if served and self._engine is not None else InProcess(denoiser, size)
            if from_base is None:
                return self._drawn(engine, prompts, denoiser, reference if base else None)
            mine, others = everything[~from_base], everything[from_base]
            pieces = [self._drawn(engine, prompts[mine], denoiser, reference)] if len(mine) else []
            if len(others):
                drawer = reference if blocks_of(reference) == blocks_of(denoiser) else _InBlocks(reference, denoiser)
                pieces.append(InProcess(drawer, size).rollout(prompts[others], denoiser).exchanged())
            return Trajectories.concatenate(pieces)[torch.cat((mine, others)).argsort()]

    def _drawn(
        self, engine: RolloutEngine, prompts: Prompts, denoiser: Denoiser, base: Denoiser | None
    ) -> Trajectories:
        """By the engine; with the base's log-probabilities, whether it has these or not."""
        way = engine.rollout(prompts, base)
        if engine is self._engine and not self._engine_is_compared:
            few = slice(0, _COMPARED)
            check_same_model(way[few], self._log_prob(denoiser, way[few], prompts[few]))
            self._engine_is_compared = True
        if base is not None and way.base_log_prob is None:
            parts = list(self._pieces(len(prompts)))
            way.base_log_prob = torch.cat([self._log_prob(base, way[part], prompts[part]) for part in parts])
        return way

    def _log_prob(self, denoiser: Denoiser, way: Trajectories, prompts: Prompts) -> Tensor:
        mask, decoding = prompts.attention_mask, prompts.decoding
        return jump_log_prob(denoiser, way, prompts.process, attention_mask=mask, decoding=decoding)

    def over_orders(
        self,
        model: nn.Module,
        trajectories: Trajectories,
        attention_mask: Tensor,
        *,
        orders: int,
        seed: int,
        row_ids: Tensor,
        temperature: float,
    ) -> PathLogProbs:
        """`dam.rollout.log_prob_over_orders` in pieces of rollout_batch_size, whose draws are those of the whole."""
        with self._denoisers(model, trajectories.initial, attention_mask) as (denoiser, base):
            pieces = [
                log_prob_over_orders(
                    denoiser,
                    base,
                    trajectories[part],
                    self._process,
                    orders=orders,
                    attention_mask=attention_mask[part],
                    steps=self._args.diffusion_steps,
                    block_length=self._args.block_length,
                    temperature=temperature,
                    seed=seed,
                    row_ids=row_ids[part],
                )
                for part in self._pieces(len(row_ids))
            ]
        return PathLogProbs(*(torch.cat(each) for each in zip(*pieces, strict=True)))

    def states(self, model: nn.Module, tokens: Tensor, attention_mask: Tensor, *, seed: int, row_ids: Tensor) -> Tensor:
        """A partly filled-in state of each prompt: an outcome of the model, re-masked."""
        way = self.rollout(
            model, tokens, attention_mask, seed=seed, row_ids=row_ids, temperature=self._args.temperature
        )
        return self._process.remask(tokens, way.final, seed=seed, row_ids=row_ids)
