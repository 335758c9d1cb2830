"""`--dllm-algorithm DAMRollout`: trajectories for `dam.engines.SGLangEngine`, drawn by an SGLang server.

Not run on a GPU, nor in a whole server: none was to be had. What was run: this file on the base class of SGLang 0.5.23,
in both of its scheduling modes, in a server process that stands in for the rest (tests/engines). What it uses of SGLang
is recorded in tests/engines/sglang_interface.py, which checks itself against a wheel.

SGLang finds algorithms as the modules of one folder, so put this file there; dam must be installed in its environment:

    from=$(python -c "import dam.engines as e; print(e.__path__[0])")
    to=$(python -c "from importlib.util import find_spec as f; print(f('sglang').submodule_search_locations[0])")
    cp $from/sglang_dllm.py $to/srt/dllm/algorithm/
    python -m sglang.launch_server --model-path JetLM/SDAR-1.7B-Chat --dllm-algorithm DAMRollout

A request of `SGLangEngine` says in its `custom_params` how it is drawn (`dam.engines.rows.Request`), and its answer has
in `meta_info["dam"]` of each block, at the block's first new token, its jumps: position, token, network call,
log-probability. Any other request is drawn too, one token a network call, under a seed made of its id.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any, ClassVar

from sglang.srt.dllm.algorithm.base import DllmAlgorithm

from dam.engines.rows import KEY, Block, Request, Row, advance

# Parameters of SGLang's own that would change the law of a draw, and what they are where they do not.
_NEUTRAL = {
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "logit_bias": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
}
_NO_TOP_K = 1 << 30  # 1 is what SGLang makes of temperature 0


class DAMRollout(DllmAlgorithm):
    """Exact draws by position, with their log-probabilities and network calls; no array of a whole block's softmax."""

    # A scheduler hands requests to `validate_request` and their ids to `step`, both in one process.
    _requests: ClassVar[weakref.WeakValueDictionary[str, Any]] = weakref.WeakValueDictionary()

    @classmethod
    def validate_request(cls, req: Any) -> str | None:
        """Why a request cannot be drawn, before it is."""
        params = req.sampling_params
        given = params.custom_params or {}
        of_dam = KEY in given
        wrong = [name for name, value in _NEUTRAL.items() if getattr(params, name) not in (value, None)]
        if params.top_k not in (_NO_TOP_K, 1, -1) or (of_dam and params.top_k == 1):
            wrong.append("top_k")
        if wrong:
            return f"{cls.__name__} draws from the model's own law: leave out {', '.join(wrong)}"
        try:
            request = Request.of_parameters(given) if of_dam else _plain(req)
            _check(request, req)
            req.dam_row = Row(request, len(req.origin_input_ids))
        except (ValueError, TypeError, KeyError) as error:
            return f"{cls.__name__}: {type(error).__name__}: {error}"
        req.dam_records = [] if of_dam else None
        cls._requests[req.rid] = req
        return None

    def init_step_state(self, forward_batch: Any) -> list[Block]:
        """The block that each request is at; those that it is at already keep theirs."""
        shape = forward_batch.batch_size, self.block_size
        begins = forward_batch.positions.view(shape)[:, 0].tolist()
        masks = (forward_batch.input_ids.view(shape) == self.mask_id).sum(dim=1).tolist()
        rows = [self._requests[rid].dam_row for rid in forward_batch.rids]
        return [row.block(begin, count) for row, begin, count in zip(rows, begins, masks, strict=True)]

    def step(self, forward_batch: Any, full_logits: Any, states: list[Block]) -> list[bool]:
        """One network call: draws what it is to fill, from those rows of the logits alone."""
        already = [block.is_done for block in states]
        requests = [self._requests[rid] for rid in forward_batch.rids]
        try:
            done = advance(states, forward_batch.input_ids, full_logits)
        except ValueError as error:  # of the logits: a server must not end by it
            from sglang.srt.managers.schedule_batch import FINISH_ABORT

            for req in requests:
                req.to_finish = FINISH_ABORT(f"{type(self).__name__}: {error}")
            # An id of no token, as masks may be one, would end the detokenizer.
            forward_batch.input_ids.masked_fill_(forward_batch.input_ids == self.mask_id, 0)
            return [True] * len(states)
        for req, block, was, now in zip(requests, states, already, done, strict=True):
            if now and not was:
                _finish(req, block)
        return done


def _plain(req: Any) -> Request:
    """Of a request that is none of `SGLangEngine`: any seed, one token a network call, up to the end of a block."""
    config, params = req.dllm_config, req.sampling_params
    length = len(req.origin_input_ids) + (params.max_new_tokens or 1)
    return Request(
        seed=int.from_bytes(hashlib.blake2b(req.rid.encode(), digest_size=7).digest(), "little"),
        row_id=0,
        length=-(-length // config.block_size) * config.block_size,
        block_length=config.block_size,
        mask_token=config.mask_id,
        temperature=0.0 if params.top_k == 1 else params.temperature,
    )


def _check(request: Request, req: Any) -> None:
    """Raises ValueError: the server's model has other blocks, or another mask token, than who asks."""
    for name, asked, own in (
        ("block_length", request.block_length, req.dllm_config.block_size),
        ("mask token", request.mask_token, req.dllm_config.mask_id),
    ):
        if asked != own:
            raise ValueError(f"the server's {name} is {own}, and {asked} is asked for")


def _finish(req: Any, block: Block) -> None:
    """Puts a block that is done into its request's answer, an entry for each of its new tokens; ends a row that has."""
    if not block.jumps:
        return
    if req.dam_records is not None:
        if req.customized_info is None:
            req.customized_info = {}
        new = block.stop - max(block.begin, block.row.prompt_length)
        entries = req.customized_info.setdefault(KEY, req.dam_records)
        entries += [[list(jump) for jump in block.jumps], *[None] * (new - 1)]
    if block.ended is not None:
        from sglang.srt.managers.schedule_batch import FINISH_MATCHED_TOKEN

        req.to_finish = FINISH_MATCHED_TOKEN(matched=block.ended)


Algorithm = DAMRollout
