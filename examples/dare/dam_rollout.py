"""Rollouts in DARE by the law that Discrete Adjoint Matching weighs: `dam.rollout.rollout` in the worker's own model.

Goes to verl/workers/rollout/dam_rollout.py of DARE (README.md here; `install.py` puts it there), in the place of its
rollouts of Hugging Face models (rollout.name=hf). Those unmask where the model is surest, by an order that depends on
the model: sums of their log-probabilities are no weights of paths. Here the order is random, which costs quality of
single samples and makes the weights right.

Not run here: DARE's trainer and workers, Ray, a GPU. Run here on a CPU: this file, by tests/examples/test_dare.py
behind the interfaces of DARE at commit 83ae8a3 that dare_interfaces.py there records, in one process and under FSDP2 in
two, and by dare_itself.py on DARE's own DataProto and modelling code of LLaDA and Dream, small and random.

Facts of DARE that it goes by: prompts are padded on the left to one length; generate_sequences gives rollout.n
responses for each prompt, one after another, one where meta_info has validate; the trainer adds what is returned to its
batch, meta_info too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo.dam_loss import CALL, LAW, Law
from verl.workers.rollout.base import BaseRollout

from dam.ctmc import MaskedCTMC
from dam.decoding import Decoding
from dam.models import as_denoiser
from dam.models.denoiser import blocks_of
from dam.rollout import Trajectories, rollout
from dam.train.tokens import limits_of, special_tokens


class DAMRollout(BaseRollout):
    """Responses of response_length tokens, all of them drawn: num_diffusion_steps network calls, block_length blocks.

    In training in random order; in validation where the model is surest, as DARE does. Each process makes as many
    network calls as each other, as FSDP2 needs: rows are filled in to the end, and attention_mask says where the text
    of each ends.

    Args:
        module: the actor's model.
        config: DARE's `actor_rollout_ref.rollout`; besides what DARE reads there `stop_token_ids`, the tokenizer's
            end-of-text token unless given, and `suppress_tokens`.
        tokenizer: of the run.

    Raises:
        ValueError: tokens that the model does not take, or guidance.
    """

    def __init__(self, module: torch.nn.Module, config: Any, tokenizer: Any):
        super().__init__()
        if config.get("cfg_scale", 0.0):
            raise ValueError(f"rollouts are without guidance: set cfg_scale=0.0; got {config.get('cfg_scale')}")
        self.module, self.config = module, config
        denoiser = as_denoiser(module)
        self._tokens = special_tokens(
            None,
            tokenizer,
            module.config,
            denoiser,
            stop=_listed(config.get("stop_token_ids")),
            suppress=_listed(config.get("suppress_tokens")),
            ids=limits_of(module).ids,
        )
        length, block_length = int(config["response_length"]), int(config["block_length"])
        self._in_blocks = blocks_of(denoiser) is not None or block_length < length
        self._block_length = block_length if self._in_blocks else None

    @torch.no_grad()
    def generate_sequences(self, prompts: Any, **_: Any) -> Any:
        """Prompts int64 [b, P] to responses [b n, R], with the call that drew each token and the `Law` they are of."""
        config, tokens = self.config, self._tokens
        length, validate = int(config["response_length"]), bool(prompts.meta_info.get("validate", False))
        chosen = config["val_kwargs"] if validate else config
        times = 1 if validate else int(config["n"])
        given, mask, position = (
            prompts.batch[name].repeat_interleave(times, dim=0)
            for name in ("input_ids", "attention_mask", "position_ids")
        )
        temperature, steps = float(chosen["temperature"]), int(chosen["num_diffusion_steps"])
        if not validate and temperature <= 0:
            raise ValueError(f"rollout.temperature must be > 0 in training: nothing is drawn at {temperature}")
        law = Law(
            mask_token=tokens.mask,
            temperature=temperature,
            exact=not self._in_blocks and steps >= length,
            stop=tokens.stop,
            suppress=tokens.suppress,
            vocabulary=tokens.vocabulary,
        )
        masks = given.new_full((len(given), length), tokens.mask)
        paths = self._drawn(
            torch.cat((given, masks), dim=1),
            torch.cat((mask, torch.ones_like(masks)), dim=1),
            law.process,
            steps,
            Decoding(order="confidence" if validate else "random", temperature=temperature),
        )
        responses = paths.final[:, -length:]
        later = position[:, -1:] + 1 + torch.arange(length, device=position.device)
        return DataProto.from_dict(
            tensors={
                "prompts": given,
                "responses": responses,
                "input_ids": paths.final,
                "attention_mask": torch.cat((mask, self._text(responses).to(mask.dtype)), dim=1),
                "position_ids": torch.cat((position, later), dim=1),
                CALL: torch.zeros_like(responses).scatter(1, paths.position - given.shape[1], paths.call),
            },
            meta_info={} if validate else {LAW: law},
        )

    def _drawn(self, tokens: Tensor, mask: Tensor, process: MaskedCTMC, steps: int, decoding: Decoding) -> Trajectories:
        """Trajectories of all rows, as many at a time as max_num_batched_tokens allows."""
        seed, was_training = int(torch.randint(2**62, ())), self.module.training
        at_once = max(1, int(self.config["max_num_batched_tokens"]) // tokens.shape[1])
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        row_ids = rank * len(tokens) + torch.arange(len(tokens), device=tokens.device)
        self.module.eval()
        device = tokens.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            pieces = [
                rollout(
                    as_denoiser(self.module),
                    tokens[start : start + at_once],
                    process,
                    attention_mask=mask[start : start + at_once],
                    steps=steps,
                    block_length=self._block_length,
                    decoding=decoding,
                    seed=seed,
                    row_ids=row_ids[start : start + at_once],
                )
                for start in range(0, len(tokens), at_once)
            ]
        self.module.train(was_training)
        return Trajectories.concatenate(pieces)

    def _text(self, responses: Tensor) -> Tensor:
        """Bool [B, R]: the text of each response, up to its first stop token and with it."""
        stop = torch.tensor(self._tokens.stop, dtype=responses.dtype, device=responses.device)
        end = torch.isin(responses, stop)
        return end.cumsum(dim=1) - end.long() == 0


def _listed(given: Any) -> list[int] | None:
    """Token ids of a configuration, whose lists are omegaconf's."""
    return None if given is None else [int(token) for token in given]
