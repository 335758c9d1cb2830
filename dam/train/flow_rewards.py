"""Calling a reward that is differentiated, and saying clearly when it misbehaves, and on what."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dam.flows.adjoint import Cost, cost_gradient
from dam.train.flow_rows import Rows, shown
from dam.train.rewards import RewardError, with_outcomes_kept

DifferentiableReward = Callable[..., Tensor]  # states [B, ...] and columns of their rows by name, to [B]

_ELSEWHERE = (
    "FlowTrainer needs a reward with a gradient in the states, made of torch's operations on them. For one that has "
    "none there is the discrete part, dam.train.DAMTrainer (docs/method.md)"
)


def signature_of(called: Any) -> inspect.Signature | None:
    """What a function or a module takes; None where Python cannot tell."""
    try:
        return inspect.signature(called.forward if isinstance(called, nn.Module) else called)
    except (TypeError, ValueError):
        return None


def check_takes(called: Any, name: str, positional: int, columns: Mapping[str, Any]) -> None:
    """That a function or module can be called with so many arguments, and columns by their names.

    Raises:
        ValueError: it cannot; names what it is called with.
    """
    signature = signature_of(called)
    if signature is None:
        return
    try:
        signature.bind(*[None] * positional, **columns)
    except TypeError as error:
        given = ", ".join(columns) or "no columns"
        raise ValueError(
            f"{name} takes {signature}, and is called with {positional} tensors and {given}: {error}"
        ) from None


class Judge:
    """Calls a reward, and checks what it gives.

    Args:
        reward: differentiable, of states [B, ...] and columns by name, [B]; a module is frozen.
        output_dir: where the states are kept that it fails on.
    """

    def __init__(self, reward: DifferentiableReward, output_dir: str):
        if not callable(reward):
            raise TypeError(f"the reward must be a function or a module; got {type(reward).__name__}")
        self.name = getattr(reward, "__name__", type(reward).__name__)
        self._reward, self._output_dir = reward, output_dir
        self._within = 0  # states
        self._failed: Any = None  # states that `within` was called at last in vain
        if isinstance(reward, nn.Module):
            reward.eval().requires_grad_(False)

    def check(self, state: Tensor, rows: Rows) -> None:
        """That the reward can be called and differentiated, at states that it need not be sensible at.

        Raises:
            ValueError: it cannot; says what to do.
        """
        check_takes(self._reward, f"the reward {self.name!r}", 1, rows.columns)
        with torch.enable_grad():
            leaf = state.detach().clone().requires_grad_()
            try:
                value = self._of(leaf, rows)
            except Exception as error:
                raise ValueError(
                    f"the reward {self.name!r} raised {type(error).__name__} at {shown(leaf, rows.columns)}: {error}"
                ) from error
            if not isinstance(value, Tensor):
                raise ValueError(f"the reward {self.name!r} returned {type(value).__name__}, no tensor. {_ELSEWHERE}")
            if value.shape != state.shape[:1]:
                raise ValueError(
                    f"the reward {self.name!r} must give a number for each row, [{len(state)}]; got {list(value.shape)}"
                )
            # Of the first row's own.
            slope = torch.autograd.grad(value[0], leaf, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise ValueError(
                f"the reward {self.name!r} does not depend on the states in a way that autograd can follow: it is "
                f"computed without a gradient, or of numbers. {_ELSEWHERE}"
            )
        of_others = slope[1:]
        if bool(((of_others != 0) & of_others.isfinite()).any()):
            raise ValueError(
                f"the reward {self.name!r} of a state depends on the other states of its batch, as one less the "
                "batch's mean does: their sum, which is differentiated, has another gradient, or none. Give each row "
                "its own, and fixed numbers for a mean and a scale"
            )

    def rewards(self, state: Tensor, rows: Rows, step: int) -> Tensor:
        """[B], in the graph of states [B, ...] if these have one.

        Raises:
            RewardError: the reward raised, or gave something that is not one finite number a row. The states are kept
                in output_dir/failed_rollouts.pt.
        """
        try:
            return self._checked(state, rows)
        except RewardError as error:
            raise self._kept(error, state, rows, step) from error.__cause__

    def _checked(self, state: Tensor, rows: Rows) -> Tensor:
        """As `rewards`, and nothing is kept."""
        try:
            value = self._of(state, rows)
        except Exception as error:
            raise RewardError(f"the reward {self.name!r} raised {type(error).__name__}: {error}") from error
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != [len(state)]:
            raise RewardError(f"the reward {self.name!r} must give a number for each row, [{len(state)}]; got {shape}")
        bad = (~value.detach().isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise RewardError(
                f"the reward {self.name!r} is {float(value.detach()[bad[0]])} at path {bad[0]}, row id "
                f"{int(rows.row_id[bad[0]])}, and not finite at {len(bad)} of {len(state)}"
            )
        return value

    def slopes(self, state: Tensor, rows: Rows, beta: float, step: int) -> tuple[Tensor, Tensor]:
        """The gradient of g = -reward / beta at states, of their shape, and the rewards [B].

        Raises:
            RewardError: as `rewards`, or the gradient is not finite.
        """
        found: list[Tensor] = []

        def cost(x: Tensor) -> Tensor:
            value = self.rewards(x, rows, step)
            found.append(value.detach())
            return -value / beta

        try:
            slope = cost_gradient(cost, state)
        except ValueError as error:
            raise self._kept(RewardError(f"the reward {self.name!r}: {error}"), state, rows, step) from error
        return slope, found[0]

    def within(self, rows: Rows, beta: float) -> Cost:
        """g = -reward / beta for torch.func to differentiate, inside of `keeping`: states are counted (`taken`)."""

        def cost(state: Tensor) -> Tensor:
            self._within += len(state)
            try:
                return -self._checked(state, rows) / beta
            except RewardError:
                # As numbers: what torch.func has wrapped is no tensor to save.
                self._failed = state.detach().tolist(), state.dtype, rows
                raise

        return cost

    @contextlib.contextmanager
    def keeping(self, step: int) -> Iterator[None]:
        """Context manager: what `within` gives raises as `rewards` does."""
        self._failed = None
        try:
            yield
        except RewardError as error:
            if self._failed is None:  # of another call, whose states are kept
                raise
            states, dtype, rows = self._failed
            failed = torch.tensor(states, dtype=dtype, device="cpu")
            raise self._kept(error, failed, rows, step) from error.__cause__

    def taken(self) -> int:
        """For how many states what `within` gave was called since the last time."""
        count, self._within = self._within, 0
        return count

    def cost(self, rows: Rows, step: int, found: list[Tensor]) -> Cost:
        """g = -reward, in a graph; what it gives is added to `found`."""

        def cost(state: Tensor) -> Tensor:
            value = self.rewards(state, rows, step)
            found.append(value.detach())
            return -value

        return cost

    def to(self, device: torch.device) -> None:
        """Moves a reward that is a module."""
        if isinstance(self._reward, nn.Module):
            self._reward.to(device)

    def _of(self, state: Tensor, rows: Rows) -> Tensor:
        """Of a copy of the states: a reward may write into what it is given."""
        return self._reward(state.clone(), **rows.columns)

    def _kept(self, error: RewardError, state: Tensor, rows: Rows, step: int) -> RewardError:
        outcomes = {"states": state.detach().cpu(), "row_ids": rows.row_id.cpu(), "columns": rows.columns}
        return with_outcomes_kept(error, self._output_dir, outcomes, step)
