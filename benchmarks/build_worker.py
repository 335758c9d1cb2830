"""One checkout's calls, timed one at a time: what `python -m benchmarks builds` starts for each of two checkouts.

Run as a file, with the checkout as argument: nothing here may import another checkout's modules. Says first, in JSON,
what calls there are and under which releases; then reads from its input, a line each, how many calls of which name to
make, and answers with the seconds of the clock, and those of the CPU, that one of them took.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import platform
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


def calls(rows: int, vocabulary: int, hidden: int, dtype: str, threads: int) -> dict[str, Callable[[], object]]:
    """Public calls only, which other commits have too; inputs by a fixed seed, the same for both checkouts.

    And some of torch's own, which tell what another torch changes from what it changes in ours.
    """
    import torch
    import torch.nn.functional as F

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
    states, base_states = (torch.randn(rows, hidden).to(logits.dtype) for _ in range(2))
    head = (torch.randn(vocabulary, hidden) * 3 / hidden**0.5).to(logits.dtype)
    free_states, free_head = (x.clone().requires_grad_() for x in (states, head))
    log_ratio = (0.1 * torch.randn(rows, 8, max(1, vocabulary // 8))).to(logits.dtype)  # as many numbers as logits
    cost, reward = torch.randn(rows, 8).to(logits.dtype), torch.randn(rows, 64).to(logits.dtype)
    uniform, terminal = dam.generators.Uniform(vocabulary), torch.rand(rows, vocabulary).to(logits.dtype)
    masks, process = torch.full((16, 64), 99), MaskedCTMC(mask_token=99)

    class Free:
        """A network that costs nothing."""

        states, weight = torch.randn(16, 64, 8), torch.randn(100, 8)

        def hidden_states(self, tokens: Any, attention_mask: Any = None) -> Any:
            return self.states[: len(tokens)]

        def head(self) -> Any:
            return Head(self.weight, None)

    with_base = {"base_logits": base, "base_weight": base_weight}
    with_base_head = {"base_hidden": base_states, "base_head_weight": head, "base_weight": base_weight}

    def gradient(loss: Any, *of: Any) -> object:
        return torch.autograd.grad(loss, of or leaf)

    def linear_log_prob(*of: Any, w: Any = head) -> object:
        return gradient(dam.linear_log_prob(free_states, w, target).sum(), *of)

    def linear_loss(*of: Any, w: Any = head, **base: Any) -> object:
        return gradient(dam.linear_matching_loss(free_states, w, target, weight, **base), *of)

    def torch_log_prob() -> Any:
        return F.log_softmax(leaf, -1, dtype=torch.float32).gather(1, target).sum()

    both, trained = (free_states, free_head), {"w": free_head}
    return {
        "plain read of the logits": lambda: dam._cpu.read(logits.data_ptr(), logits.nbytes // 8, threads),
        "jump": lambda: dam.jump(logits, seed=1),
        "log_prob": lambda: dam.log_prob(logits, target),
        "log_prob, forward and backward": lambda: gradient(dam.log_prob(leaf, target).sum()),
        "entropy": lambda: dam.entropy(logits),
        "entropy, forward and backward": lambda: gradient(dam.entropy(leaf).sum()),
        "rate_ratio": lambda: dam.rate_ratio(logits, base, target),
        "matching_loss": lambda: gradient(dam.matching_loss(leaf, target, weight)),
        "matching_loss with base": lambda: gradient(dam.matching_loss(leaf, target, weight, **with_base)),
        "linear_jump": lambda: dam.linear_jump(states, head, seed=1),
        "linear_log_prob": lambda: dam.linear_log_prob(states, head, target),
        "linear_log_prob, forward and backward, frozen head": lambda: linear_log_prob(free_states),
        "linear_log_prob, forward and backward, trained head": lambda: linear_log_prob(*both, **trained),
        "linear_matching_loss, frozen head": lambda: linear_loss(free_states),
        "linear_matching_loss, frozen head, with base": lambda: linear_loss(free_states, **with_base_head),
        "linear_matching_loss, trained head": lambda: linear_loss(*both, **trained),
        "linear_matching_loss, trained head, with base": lambda: linear_loss(*both, **trained, **with_base_head),
        "adjoint_weights": lambda: dam.adjoint_weights(log_ratio, cost),
        "backward_kolmogorov, uniform": lambda: dam.backward_kolmogorov(uniform, terminal, 0.7),
        "tilt_to_ess": lambda: dam.tilt_to_ess(reward, 16.0, max_tilt=100.0),
        "rollout, 16 x 64 calls": lambda: rollout(Free(), masks, process, seed=0),
        "rollout with base, 16 x 64": lambda: rollout(Free(), masks, process, base=Free(), seed=0),
        "torch, sum of two": lambda: logits + base,
        "torch, logsumexp": lambda: torch.logsumexp(logits, -1),
        "torch, log_softmax + gather, forward and backward": lambda: gradient(torch_log_prob()),
        "torch, matmul": lambda: states @ head.t(),
        "torch, matmul, forward and backward, frozen head": lambda: gradient(
            (free_states @ head.t()).sum(), free_states
        ),
        "torch, matmul, forward and backward, trained head": lambda: gradient(
            (free_states @ free_head.t()).sum(), *both
        ),
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
    import torch

    versions = {"dam": dam.__version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"calls": list(functions), "versions": versions}), flush=True)
    for line in sys.stdin:
        number, name = line.rstrip("\n").split(" ", 1)
        function, repeats = functions[name], range(int(number))
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in repeats:
            function()
        cpu, clock = time.process_time() - start_cpu, time.perf_counter() - start
        print(clock / len(repeats), cpu / len(repeats), flush=True)


if __name__ == "__main__":
    main()
