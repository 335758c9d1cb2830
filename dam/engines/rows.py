"""Rows as a server fills them in, block by block, from the logits that its model gives: knows no server.

A server has requests that come and go, each at a block and a network call of its own. What is drawn for one depends on
none of that: which positions a call fills is planned by `dam.rollout.plan`, and tokens are drawn by `dam.jump` from the
streams of `dam.rollout.streams`, from the rows of logits that are filled alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dam.ctmc import MaskedCTMC
from dam.decoding import FREE_ORDERS, Decoding
from dam.models.attention import Blocks
from dam.ops.jump import jump
from dam.rollout import plan, streams

CONTRACT = 1  # of what a request says and a record holds: client and server must have the same
KEY = "dam"  # of the contract in what a request says, and of the records in an answer


def check_contract(given: Mapping[str, Any]) -> None:
    """Raises ValueError: a request was made by a release whose requests say something else."""
    if given.get(KEY) != CONTRACT:
        raise ValueError(
            f"the request is of contract {given.get(KEY)!r} and this server's dam of {CONTRACT}: install one release "
            "of discrete-adjoint-matching in both environments"
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """How a row is to be drawn, in numbers and lists of numbers, which JSON keeps: as parameters of a request."""

    seed: int
    row_id: int
    length: int  # of the sequence that is filled in, the prompt included
    block_length: int
    mask_token: int
    steps: int | None = None
    order: str = "random"
    temperature: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    start: int = 0  # position from which on they end the row
    suppress: tuple[int, ...] = ()
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        Decoding(order=self.order, temperature=self.temperature)  # raises
        if self.order not in FREE_ORDERS:
            raise ValueError(f"a server draws by the orders {', '.join(FREE_ORDERS)}; got {self.order!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if self.length % self.block_length:
            raise ValueError(
                f"a server fills whole blocks of {self.block_length}: a sequence of {self.length} tokens, prompt and "
                "completion, ends inside one. DAMConfig(whole_blocks=True) has completions end with a block"
            )

    @property
    def process(self) -> MaskedCTMC:
        return MaskedCTMC(self.mask_token, suppress=self.suppress, vocabulary=self.vocabulary)

    def as_parameters(self) -> dict[str, Any]:
        """Of 64 bits as text, as some parsers of JSON have numbers of 53."""
        fields = {f"{KEY}_{name}": value for name, value in dataclasses.asdict(self).items() if value is not None}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        return {KEY: CONTRACT, **fields, **lists, f"{KEY}_seed": str(self.seed), f"{KEY}_row_id": str(self.row_id)}

    @classmethod
    def of_parameters(cls, given: Mapping[str, Any]) -> Request:
        """Raises ValueError, TypeError: they are those of another contract, or no request's."""
        check_contract(given)
        prefix = f"{KEY}_"
        fields = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**{**fields, "seed": int(fields["seed"]), "row_id": int(fields["row_id"])})


class _Law(NamedTuple):
    """What tokens are drawn by, but for the logits; rows with the same are drawn together."""

    seed: int
    temperature: float
    process: MaskedCTMC


class Jump(NamedTuple):
    """One jump of a row."""

    position: int  # from the sequence's start
    token: int
    call: int  # which of the row's network calls filled it, as `Trajectories.call`
    log_prob: float


class Row:
    """What one request is planned to be.

    Args:
        request: how it is drawn.
        prompt_length: positions that are given.

    Raises:
        ValueError: nothing is left to fill in, or its end may lie in the prompt.
    """

    def __init__(self, request: Request, prompt_length: int):
        if not 0 <= prompt_length < request.length:
            raise ValueError(
                f"a prompt of {prompt_length} tokens leaves nothing to fill in of {request.length}, or has none"
            )
        if request.stop_tokens and request.start < prompt_length:
            raise ValueError(f"start is {request.start}, in the prompt of {prompt_length} tokens: it must be behind it")
        self.request, self.prompt_length = request, prompt_length
        self.law = _Law(request.seed, request.temperature, request.process)
        ids = torch.tensor([request.row_id])
        tokens = torch.full((1, request.length), request.mask_token)
        tokens[:, :prompt_length] = -1  # which tokens is all the same
        number = Blocks(request.block_length, "sequence").numbers(tokens)
        path = plan(tokens, self.law.process, request.order, request.steps, number, seed=request.seed, row_ids=ids)
        self.stream: list[int] = streams(request.seed, ids, request.length)[0].tolist()
        self.calls: list[list[int]] = [[] for _ in range(path.network_calls)]  # the positions of each
        self._first_call: dict[int, int] = {}  # of each block
        for position, call in zip(path.position[0].tolist(), path.call[0].tolist(), strict=True):
            self.calls[call].append(position)
            self._first_call.setdefault(position // request.block_length, call)

    def block(self, begin: int, masks: int) -> Block:
        """The block that begins at a position, of which so many positions are masks: all that it is to fill, or none.

        None where it is the prompt's, or was filled in before, and is gone through for its keys and values alone.
        """
        return Block(self, begin, masks, self._first_call.get(begin // self.request.block_length, len(self.calls)))


class Block:
    """A block of a row on its way; one that is given up, as when a server takes back its memory, leaves no trace."""

    def __init__(self, row: Row, begin: int, masks: int, call: int):
        self.row, self.begin = row, begin
        self.stop = begin + row.request.block_length
        self._call = call if masks else len(row.calls)
        self._is_whole = masks in (0, self.stop - max(begin, row.prompt_length)) and begin % (self.stop - begin) == 0
        self.jumps: list[Jump] = []
        self.ended: int | None = None  # the stop token that ends the row in this block
        self.is_done = False  # and has been seen by a network call as it is

    def due(self) -> list[int]:
        """The positions that the next network call fills.

        Raises:
            ValueError: some of the block was filled in before, and by what calls is not known.
        """
        if not self._is_whole:
            raise ValueError(f"the server hands on a block half filled in, from position {self.begin} on")
        if self.ended is not None or self._call >= len(self.row.calls):
            return []
        positions = self.row.calls[self._call]
        return positions if positions[0] < self.stop else []

    def enter(self, tokens: Sequence[int], log_probs: Sequence[float]) -> list[int]:
        """Takes what was drawn for the positions that were due; which others are to be filled up, as the row ended."""
        for position, token, log_prob in zip(self.due(), tokens, log_probs, strict=True):
            self.jumps.append(Jump(position, token, self._call, log_prob))
        self._call += 1
        request, filled = self.row.request, {jump.position: jump.token for jump in self.jumps}
        for position in range(max(self.begin, self.row.prompt_length), self.stop):
            if position not in filled:
                return []  # a mask stands in front of whatever comes
            if position >= request.start and filled[position] in request.stop_tokens:
                self.ended = filled[position]
                return [p for p in range(position, self.stop) if p not in filled]
        return []


@torch.no_grad()
def advance(blocks: Sequence[Block], input_ids: Tensor, logits: Tensor) -> list[bool]:
    """Fills in what one network call of n blocks is to fill, in place.

    Args:
        blocks: of n rows, of W positions each.
        input_ids: integer [n W], what the call saw.
        logits: floating point [n W, V], of it, no mask or temperature put on them.

    Returns:
        Of each block whether it is done: all of it was filled in before this call, so that keys and values of its
        tokens are kept.

    Raises:
        ValueError: logits that a position is drawn from hold a NaN or +inf, or nothing that can be drawn; or as
            `Block.due`.
    """
    width = len(input_ids) // max(1, len(blocks))
    due = [block.due() for block in blocks]
    alike: dict[_Law, list[int]] = {}
    for n, (block, positions) in enumerate(zip(blocks, due, strict=True)):
        block.is_done = not positions
        if positions:
            alike.setdefault(block.row.law, []).append(n)
    for law, numbers in alike.items():
        at = [n * width + position - blocks[n].begin for n in numbers for position in due[n]]
        stream = [blocks[n].row.stream[position] for n in numbers for position in due[n]]
        where = torch.tensor(at, device=logits.device)
        drawn = jump(
            logits if len(at) == len(logits) and at == sorted(at) else logits[where],
            **law.process.left_out(logits.shape[1]),
            temperature=law.temperature,
            seed=law.seed,
            row_ids=torch.tensor(stream, device=logits.device),
        )
        input_ids[where] = drawn.target.to(input_ids.dtype)
        tokens, log_probs = drawn.target.tolist(), drawn.log_prob.tolist()
        for n in numbers:
            count = len(due[n])
            block = blocks[n]
            rest = block.enter(tokens[:count], log_probs[:count])
            del tokens[:count], log_probs[:count]
            if block.ended is not None:
                for position in rest:
                    input_ids[n * width + position - block.begin] = block.ended
    return [block.is_done for block in blocks]
