"""A model and its base, which differ from some layer on, in one pass of the layers in front of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from dam.models.sharding import waits_for_others
from dam.models.tail import is_compiled


class SharedTrunk:
    """The layers of a model that run once for two passes with the same arguments, the second of which differs behind.

    Args:
        model: what is called.
        different: modules that compute something else in the second pass.

    Attributes:
        layers: how many of them run once: none where something other than later layers and the output layer differs,
            or the model is compiled or divided by FSDP2 or ZeRO-3.
    """

    def __init__(self, model: nn.Module, different: Collection[nn.Module]):
        every = layers_of(model)
        places: dict[int, int] = {}
        for n, layer in enumerate(every):
            for part in layer.modules():
                places.setdefault(id(part), n)  # the first, of one that several layers have
        # An embedding that is the output layer too runs in front.
        behind = _parts(model, "get_output_embeddings") - _parts(model, "get_input_embeddings")
        firsts = [places.get(id(module), 0) for module in different if id(module) not in behind]
        alone = waits_for_others(model) or any(is_compiled(module) for module in model.modules())
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
        """Context manager: what the last shared layer gives is kept.

        Where that, or what it is given, is not known to be hidden states, all layers run in both passes from now on.
        """

        def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, made = _given(args, kwargs), output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape == made.shape:
                self._kept = output
            else:
                self.give_up()

        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in self._shared[-1:]]
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
        hidden = _given(args, kwargs)
        return hidden if isinstance(self._kept, Tensor) else (hidden, *self._kept[1:])


def _given(args: Any, kwargs: Any) -> Any:
    """Hidden states that a layer is given."""
    return args[0] if args else kwargs.get("hidden_states")


def _parts(model: nn.Module, name: str) -> set[int]:
    """Ids of the modules of what a method of the model gives, if it has the method, and that gives something."""
    layer = getattr(model, name, lambda: None)()
    return set() if layer is None else {id(part) for part in layer.modules()}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that run one after another: the outermost list of modules of one class; none if there is none.

    Each once. Lists inside a list, such as the experts of layers of several classes, are no layers.
    """
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or id(module) in inside:
            continue
        if len({type(layer) for layer in module}) == 1:
            return list(dict.fromkeys(module))
        inside |= {id(part) for part in module.modules()}
    return []
