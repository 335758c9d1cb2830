"""One checkout's calls, timed one at a time: what `python -m benchmarks builds` starts for each of two checkouts.

Run as a file, with the checkout as argument: nothing here may import another checkout's modules. Reads names of calls
from its input, a line each, and answers with the seconds that one took.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class _Kernels(importlib.abc.MetaPathFinder):
    """dam.kernels of a checkout that has no link dam/kernels, where an installation would map it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "dam.kernels":
            return None
        source, places = self._folder / "__init__.py", [str(self._folder)]
        return importlib.util.spec_from_file_location(name, source, submodule_search_locations=places)


def calls(rows: int, vocabulary: int, dtype: str, threads: int) -> dict[str, Callable[[], object]]:
    """Public calls only, which every commit has; inputs by a fixed seed, the same for both checkouts."""
    import torch

    import dam
    import dam._cpu  # type: ignore[import-not-found]
    from dam.ctmc import MaskedCTMC
    from dam.models import Head
    from dam.rollout import rollout

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logits, base = ((3 * torch.randn(rows, vocabulary)).to(getattr(torch, dtype)) for _ in range(2))
    target, weight, base_weight = torch.randint(vocabulary, (rows, 1)), torch.rand(rows, 1), torch.rand(rows)
    leaf = logits.clone().requires_grad_()
    hidden, head = (torch.randn(size, 8).to(logits.dtype) for size in (rows, vocabulary))
    state = hidden.clone().requires_grad_()
    masks, process = torch.full((16, 64), 99), MaskedCTMC(mask_token=99)

    class Free:
        """A network that costs nothing."""

        states, weight = torch.randn(16, 64, 8), torch.randn(100, 8)

        def hidden_states(self, tokens: Any, attention_mask: Any = None) -> Any:
            return self.states[: len(tokens)]

        def head(self) -> Any:
            return Head(self.weight, None)

    with_base = {"base_logits": base, "base_weight": base_weight}

    def gradient(loss: Any, of: Any = leaf) -> object:
        return torch.autograd.grad(loss, of)

    return {
        "plain read of the logits": lambda: dam._cpu.read(logits.data_ptr(), logits.nbytes // 8, threads),
        "jump": lambda: dam.jump(logits, seed=1),
        "log_prob": lambda: dam.log_prob(logits, target),
        "log_prob, forward and backward": lambda: gradient(dam.log_prob(leaf, target).sum()),
        "rate_ratio": lambda: dam.rate_ratio(logits, base, target),
        "matching_loss": lambda: gradient(dam.matching_loss(leaf, target, weight)),
        "matching_loss with base": lambda: gradient(dam.matching_loss(leaf, target, weight, **with_base)),
        "linear_jump, D = 8": lambda: dam.linear_jump(hidden, head, seed=1),
        "linear_log_prob, D = 8": lambda: dam.linear_log_prob(hidden, head, target),
        "linear_matching_loss, D = 8": lambda: gradient(dam.linear_matching_loss(state, head, target, weight), state),
        "rollout, 16 x 64 calls": lambda: rollout(Free(), masks, process, seed=0),
        "rollout with base, 16 x 64": lambda: rollout(Free(), masks, process, base=Free(), seed=0),
    }


def main() -> None:
    checkout, settings = Path(sys.argv[1]).resolve(), json.loads(sys.argv[2])
    sys.path[0] = str(checkout)  # in the place of this file's folder
    if not (checkout / "dam" / "kernels").exists():
        sys.meta_path.insert(0, _Kernels(checkout / "kernels"))
    functions = calls(**settings)
    import dam

    assert checkout in Path(dam.__file__).resolve().parents, f"{dam.__file__} is not of {checkout}"
    for function in functions.values():
        function()  # to warm up
    print(json.dumps(list(functions)), flush=True)
    for line in sys.stdin:
        function = functions[line.rstrip("\n")]
        start = time.perf_counter()
        function()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
