"""A model and its base, which differ from some layer on, in one pass of the layers in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from dam.models.sharding import is_fsdp


class SharedTrunk:
    """The layers of a model that run once for two passes with the same arguments, the second of which differs behind.

    Args:
        model: what is called.
        different: modules that compute something else in the second pass.

    Attributes:
        layers: how many of them run once: none where something other than later layers and the output layer differs,
            or the model is compiled or divided by FSDP2.
    """

    def __init__(self, model: nn.Module, different: Collection[nn.Module]):
        every = layers_of(model)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        places = {id(part): n for n, layer in enumerate(every) for part in layer.modules()}
        behind = set() if output is None else {id(part) for part in output.modules()}
        firsts = [places.get(id(module), 0) for module in different if id(module) not in behind]
        alone = hasattr(model, "_orig_mod") or any(is_fsdp(module) for module in model.modules())
        self._shared = [] if alone else every[: min(firsts, default=len(every))]
        self._kept: Any = None

    @property
    def layers(self) -> int:
        return len(self._shared)

    def give_up(self) -> None:
        """From now on all layers run in both passes."""
        self._shared = []

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Context manager: what the last shared layer gives is kept."""

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._kept = output

        handles = [layer.register_forward_hook(keep) for layer in self._shared[-1:]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def second_pass(self) -> Iterator[None]:
        """Context manager: shared layers hand on what they are given, the last of them what is kept."""
        own = [vars(layer).get("forward") for layer in self._shared]  # accelerate's hooks put one there
        try:
            for layer in self._shared:
                layer.forward = self._passed_on  # type: ignore[method-assign]
            for layer in self._shared[-1:]:
                layer.forward = lambda *_, **__: self._kept  # type: ignore[method-assign]
            yield
        finally:
            for layer, forward in zip(self._shared, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward  # type: ignore[method-assign]
            self._kept = None

    def _passed_on(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(self._kept, Tensor) else (hidden, *self._kept[1:])


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that run one after another: the outermost list of modules of one class; none if there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(layer) for layer in module}) == 1:
            return list(module)
    return []
