"""Trajectories drawn by an SGLang server that runs `dam.engines.sglang_dllm`.

Not run against a server on a GPU: none was to be had. What was run is in `sglang_dllm`.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dam.engines.contract import EngineError, Prompts, StaleWeights, checked
from dam.engines.rows import KEY, Request
from dam.engines.weights import write_weights
from dam.models.attention import padding
from dam.models.denoiser import Denoiser
from dam.rollout import Ends, Trajectories

ALGORITHM = "DAMRollout"


class SGLangEngine:
    """A `RolloutEngine` for models whose attention has blocks, counted from the sequence's start (SDAR, LLaDA 2).

    The server fills whole blocks, so each prompt and its completion must be a whole number of them together. Masks must
    be all that is behind the prompt.

    Weights go by a folder that the server reads too, as model.safetensors in a folder of each version, of which the
    last is kept. A server that answers with other weights than the last is found out (`StaleWeights`).

    Args:
        url: of the server, `http://host:port`.
        weights: the folder.
        block_length: of the model's attention (SDAR 4 unless its config says so, LLaDA 2 32), and so of the server's.
        dtype: that weights are sent in; each parameter's own unless given.
        timeout: seconds that an answer may take, to all prompts of a rollout together, or to new weights.
        api_key: of the server, where it has one.

    Raises:
        ValueError: the URL is none, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        weights: str | os.PathLike[str],
        *,
        block_length: int,
        dtype: torch.dtype | None = None,
        timeout: float = 1800.0,
        api_key: str | None = None,
    ):
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or place.hostname is None:
            raise ValueError(f"url must be http://host:port; got {url!r}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be > 0 seconds; got {timeout}")
        if block_length < 1:
            raise ValueError(f"block_length must be at least 1; got {block_length}")
        self.url, self._place, self._timeout = url, place, timeout
        self._weights, self._block_length, self._dtype = os.path.abspath(weights), block_length, dtype
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._version: str | None = None
        self._known = False  # that the server draws by our algorithm

    def update(self, parameters: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """As `RolloutEngine.update`; needs `safetensors` (extra `train`).

        Raises:
            EngineError: the server draws by another algorithm, or did not take the weights.
        """
        self._version = None  # until they are there, nothing is right
        if parameters is not None:
            self._check_server()
            folder = write_weights(parameters, self._weights, version, self._dtype)
            told = {"model_path": folder, "weight_version": str(version), "flush_cache": True}
            answer = self._ask("POST", "/update_weights_from_disk", told)
            if not isinstance(answer, dict) or not answer.get("success"):
                raise EngineError(f"{self.url} did not take the weights of version {version}: {_short(answer)}")
        self._version = str(version)

    def rollout(self, prompts: Prompts, base: Denoiser | None = None) -> Trajectories:
        """As `RolloutEngine.rollout`; without the log-probabilities of `base`, which the server does not have.

        Raises:
            ValueError: the server cannot draw what is asked for; names the row.
            StaleWeights, EngineError: its weights are others; it is gone, late, or answers something else.
        """
        if self._version is None:
            raise EngineError(f"{self.url} has been sent no weights, or did not take them: call update() first")
        rows, asked = _rows(prompts, self._block_length)
        answers = self._ask("POST", "/generate", _generate(rows, asked))
        if not isinstance(answers, list) or len(answers) != len(rows):
            found = f"{len(answers)} answers" if isinstance(answers, list) else _short(answers)
            raise EngineError(f"{self.url} was asked for {len(rows)} rows and gave {found}")
        jumps = [self._jumps(row, answer) for row, answer in enumerate(answers)]
        return checked(_trajectories(prompts, jumps, self.url), prompts, self.url)

    def _check_server(self) -> None:
        if self._known:
            return
        found = self._ask("GET", "/server_info", None)
        algorithm = found.get("dllm_algorithm") if isinstance(found, dict) else None
        if algorithm != ALGORITHM:
            raise EngineError(
                f"{self.url} draws by {algorithm!r}: start it with --dllm-algorithm {ALGORITHM}, which "
                "dam.engines.sglang_dllm is"
            )
        self._known = True

    def _jumps(self, row: int, answer: Any) -> list[Sequence[Any]]:
        """The jumps of one answer, in their order."""
        told = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(told, dict):
            raise EngineError(f"{self.url}: the answer to row {row} has no meta_info: {_short(answer)}")
        reason = told.get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise EngineError(f"{self.url} gave up row {row}: {reason.get('message')}")
        versions = {told.get("weight_version"), *(span.get("version") for span in told.get("weight_versions") or [])}
        if versions != {self._version}:
            raise StaleWeights(
                f"{self.url}: row {row} was drawn with the weights {', '.join(sorted(map(str, versions)))}, and "
                f"{self._version} were sent last: is another run using this server?"
            )
        entries = told.get(KEY)
        if not isinstance(entries, list):
            raise EngineError(
                f"{self.url}: the answer to row {row} says no jumps (meta_info[{KEY!r}]): the server's file "
                "sglang_dllm.py is of another release than this one's"
            )
        return [jump for entry in entries if entry is not None for jump in entry]

    def _ask(self, method: str, path: str, body: Any) -> Any:
        """What the server answers, as JSON.

        Raises:
            EngineError: none in time; it is not there, is gone, or refuses; or this is no JSON.
        """
        deadline = time.monotonic() + self._timeout
        kind = http.client.HTTPSConnection if self._place.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._place.hostname or "", self._place.port, timeout=self._timeout)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, self._place.path.rstrip("/") + path, sent, self._headers)
            response, parts = connection.getresponse(), []
            # A server that sends a byte now and then is late too.
            while part := response.read1(1 << 20):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
        except TimeoutError:
            raise EngineError(f"{self.url}{path} did not answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.url}{path}: the server is not there: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        text = b"".join(parts).decode(errors="replace")
        if response.length:
            raise EngineError(f"{self.url}{path}: the server is gone: {response.length} bytes of its answer lack")
        if response.status >= 400:
            raise EngineError(f"{self.url}{path} refused with status {response.status}: {_short(text)}")
        try:
            return json.loads(text)
        except ValueError:
            raise EngineError(f"{self.url}{path} answered no JSON: {_short(text)}") from None


def _rows(prompts: Prompts, block_length: int) -> tuple[list[list[int]], list[Request]]:
    """The tokens of each prompt, and how what is behind them is drawn.

    Raises:
        ValueError: a server cannot; names the row.
    """
    decoding = prompts.decoding
    if decoding.cuts or decoding.guidance or decoding.by_model:
        raise ValueError(
            f"a server draws from the model's own law in an order that does not depend on it; got {decoding}"
        )
    if prompts.block_length != block_length:
        raise ValueError(
            f"the model's block_length is {prompts.block_length}, and that of the server's {block_length}: what is "
            "trained would not be what is served (dam.models.as_denoiser)"
        )
    tokens, mask = prompts.tokens, prompts.attention_mask
    _ends(prompts)
    shown = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    rows, asked = [], []
    for n, left in enumerate(_pad(prompts)):
        row = tokens[n, left:]
        masked = prompts.process.masked(row)
        count, length = int(masked.sum()), len(row)
        if count == 0 or not bool(masked[length - count :].all()) or not bool(shown[n, left:].all()):
            raise ValueError(
                f"row {n}: a server fills in what is behind a prompt; masks, or what is hidden, lie within it, or none "
                "are there"
            )
        try:
            request = Request(
                seed=prompts.seed,
                row_id=int(prompts.row_ids[n]),
                length=length,
                block_length=block_length,
                mask_token=prompts.process.mask_token,
                steps=prompts.steps,
                order=decoding.order,
                temperature=float(decoding.temperature),
                stop_tokens=tuple(prompts.stop_tokens),
                start=length - count if prompts.start is None else int(prompts.start[n]) - left,
                suppress=tuple(prompts.process.suppress),
                vocabulary=prompts.process.vocabulary,
            )
        except ValueError as error:
            raise ValueError(f"row {n}: {error}") from None
        rows.append(row[: length - count].tolist())
        asked.append(request)
    return rows, asked


def _generate(rows: list[list[int]], asked: list[Request]) -> dict[str, Any]:
    """The body of a request for all rows. The algorithm ends a row at its stop tokens, and no other token does."""
    params = [
        {"max_new_tokens": request.length - len(row), "ignore_eos": True, "custom_params": request.as_parameters()}
        for row, request in zip(rows, asked, strict=True)
    ]
    return {"input_ids": rows, "sampling_params": params}


def _pad(prompts: Prompts) -> list[int]:
    """How many columns of each row are padding on the left."""
    mask = prompts.attention_mask
    return [0] * len(prompts) if mask is None else padding(mask).tolist()


def _trajectories(prompts: Prompts, jumps: Sequence[Sequence[Sequence[Any]]], engine: str) -> Trajectories:
    """Of the jumps of each row, (position, token, call, log-probability), positions counted without padding."""
    tokens, masked = prompts.tokens, prompts.process.masked(prompts.tokens)
    shape = len(tokens), int(masked.sum(dim=1).max())
    position, token, call = (torch.full(shape, -1, device="cpu") for _ in range(3))
    log_prob = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for row, (made, pad) in enumerate(zip(jumps, _pad(prompts), strict=True)):
        try:
            values = torch.tensor([[float(x) for x in jump] for jump in made], dtype=torch.float64, device="cpu")
            where, what, when, how = values.reshape(-1, 4).unbind(dim=1)
            position[row, : len(made)], token[row, : len(made)], call[row, : len(made)] = where + pad, what, when
            log_prob[row, : len(made)] = how
        except (TypeError, ValueError, RuntimeError) as error:
            raise EngineError(f"{engine}: the jumps of row {row} are none: {_short(made)}") from error
    if bool(((position >= tokens.shape[1]) | ((position < 0) & (call >= 0))).any()):
        raise EngineError(f"{engine}: jumps are at no position of their sequences")
    position, token, call, log_prob = (x.to(tokens.device) for x in (position, token, call, log_prob))
    final = tokens.clone()
    rows, at = torch.nonzero(call >= 0, as_tuple=True)
    final[rows, position[rows, at]] = token[rows, at]
    way = Trajectories(initial=tokens, final=final, position=position, token=token, call=call, log_prob=log_prob)
    ends = _ends(prompts)
    if ends is not None:
        ends.cut(way, call=way.network_calls)
    return way


def _ends(prompts: Prompts) -> Ends | None:
    """Raises ValueError: as `Ends`."""
    if not prompts.stop_tokens:
        return None
    return Ends(prompts.stop_tokens, prompts.start, prompts.process.masked(prompts.tokens), prompts.process)


def _short(answer: Any) -> str:
    text = answer if isinstance(answer, str) else repr(answer)
    return text if len(text) <= 300 else f"{text[:300]} ..."
