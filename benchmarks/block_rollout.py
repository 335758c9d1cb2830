"""A rollout of a block-causal model with and without the cache of what is in front of its block.

    python -m benchmarks.block_rollout

A random Qwen3 told to have blocks. Time is of this process' CPU, so that other work on the machine does not show.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from dam.ctmc import MaskedCTMC
from dam.models import Denoiser, as_denoiser
from dam.rollout import rollout


class _Whole:
    """A denoiser without its passes over blocks."""

    def __init__(self, denoiser: Any):
        self._denoiser, self.blocks = denoiser, denoiser.blocks

    def hidden_states(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self._denoiser.hidden_states(tokens, attention_mask)

    def head(self) -> Any:
        return self._denoiser.head()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "layers": 4,
        "hidden": 256,
        "vocabulary": 32_768,
        "prompt": 128,
        "completion": 128,
        "block": 32,
        "steps": 128,
        "sequences": 1,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        head_dim=64,
    )
    denoiser: Any = as_denoiser(Qwen3ForCausalLM(config).eval(), block_length=args.block)
    process = MaskedCTMC(mask_token=args.vocabulary - 1)
    tokens = torch.randint(process.mask_token, (args.sequences, args.prompt + args.completion))
    tokens[:, args.prompt :] = process.mask_token
    denoiser.prefix_cache(tokens)  # the trial

    def timed(model: Denoiser) -> tuple[float, torch.Tensor]:
        start = time.process_time()
        final = rollout(model, tokens, process, steps=args.steps, seed=0).final
        return time.process_time() - start, final

    times: dict[str, list[float]] = {"block by block": [], "whole sequences": []}
    for _ in range(args.repeats):
        finals = []
        for name, model in (("block by block", denoiser), ("whole sequences", _Whole(denoiser))):
            seconds, final = timed(model)
            times[name].append(seconds)
            finals.append(final)
        same = float((finals[0] == finals[1]).float().mean())
    for name, each in times.items():
        print(f"{name}: {statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f})")
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    print(f"ratio {ratio:.2f}, of tokens equal {same:.4f}")


if __name__ == "__main__":
    main()
