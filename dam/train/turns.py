"""Network calls of processes among which a model is divided: a call is made by all of them, or by none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dam.models.denoiser import Denoiser, hidden_at
from dam.ops._head import Head

_DONE, _FAILED = 0, -1  # what a process announces that has no call to make


class _OtherFailed(RuntimeError):
    """Another process has failed, as all know."""


class _Turns:
    """What each process is to call next, told to all before any does: the least of it is called by all.

    A process that has another one to make, or none, calls that on a row of its own and leaves out what comes of it. So
    processes may make different numbers of calls, of several networks, and in different orders.

    Args:
        calls: what may be called, by number from 1, on a row of no importance.
        device: of what processes tell each other.
    """

    def __init__(self, calls: dict[int, Callable[[], Any]], device: torch.device):
        self._calls, self._device = calls, device
        self._is_calling = False

    def _announced(self, number: int) -> int:
        """The call that is next, once all processes have said what theirs is; _DONE where none has one.

        Raises:
            _OtherFailed: another process has failed.
        """
        mine = torch.full((1,), number, dtype=torch.int64, device=self._device)
        given = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(given, mine)
        told = torch.cat(given).tolist()
        if number != _FAILED and _FAILED in told:
            raise _OtherFailed(f"process {told.index(_FAILED)} failed in a rollout")
        return min((each for each in told if each > _DONE), default=_DONE)

    def called(self, number: int, call: Callable[[], Any]) -> Any:
        """What `call`, which is of that number, gives when it is its turn."""
        while (chosen := self._announced(number)) != number:
            self._made(self._calls[chosen])
        return self._made(call)

    def _made(self, call: Callable[[], Any]) -> Any:
        self._is_calling = True
        given = call()
        self._is_calling = False
        return given

    def finish(self) -> None:
        """Makes the calls that other processes still have to make."""
        while (chosen := self._announced(_DONE)) != _DONE:
            self._made(self._calls[chosen])

    def give_up(self) -> None:
        """Tells the others that this process has failed, unless in a call, in which they wait for it."""
        if not self._is_calling:
            self._announced(_FAILED)


class _InTurn:
    """A denoiser whose calls wait for their turn.

    Args:
        denoiser: the one that is called.
        turns: say when.
        number: of its hidden states; that of its head is the next one.
    """

    def __init__(self, denoiser: Denoiser, turns: _Turns, number: int):
        self._denoiser, self._turns, self._number = denoiser, turns, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._turns.called(self._number, lambda: self._denoiser.hidden_states(tokens, attention_mask))

    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        return self._turns.called(
            self._number, lambda: hidden_at(self._denoiser, tokens, attention_mask, row, position)
        )

    def head(self) -> Head:
        return self._turns.called(self._number + 1, self._denoiser.head)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        """No trial, which processes would not all make."""
        return False

    def prefix_cache(self, tokens: Tensor, attention_mask: Tensor | None = None) -> None:
        """No passes over blocks alone, likewise.

        Raises:
            ValueError: they are asked for.
        """
        if getattr(self._denoiser, "approximate_cache", None) is not None:
            raise ValueError("a model that is divided among processes has no approximate_cache: leave it out")

    def beside(self, denoiser: Denoiser) -> None:
        """No layers that run once for model and base."""


@contextlib.contextmanager
def in_turns(denoisers: Sequence[Denoiser], tokens: Tensor, attention_mask: Tensor) -> Iterator[list[Denoiser]]:
    """Context manager: the denoisers, of which processes may make different numbers of calls; entered by all alike.

    Calls by which a denoiser tries something first must be behind them (`dam.train.sampling.Sampler.compare`).

    Args:
        tokens, attention_mask: [B, L], of which a row is called where another process has a call to make.

    Raises:
        RuntimeError: another process has failed in between.
    """
    row, mask = tokens[:1], attention_mask[:1]
    calls: dict[int, Callable[[], Any]] = {}
    for n, denoiser in enumerate(denoisers):
        calls[2 * n + 1] = lambda denoiser=denoiser: denoiser.hidden_states(row, mask)  # type: ignore[misc]
        calls[2 * n + 2] = denoiser.head
    turns = _Turns(calls, tokens.device)
    try:
        yield [_InTurn(denoiser, turns, 2 * n + 1) for n, denoiser in enumerate(denoisers)]
        turns.finish()
    except _OtherFailed:
        raise
    except Exception:
        turns.give_up()
        raise
