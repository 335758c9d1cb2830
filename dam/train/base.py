"""The base model of a run: a model of its own, or what the trained one was when the run began."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dam.models.denoiser import Denoiser, blocks_of, equal_rows, hidden_at
from dam.models.sharding import is_divided, is_fsdp, is_partitioned, is_placed, partitions_of, shape_of
from dam.models.trunk import SharedTrunk
from dam.ops._head import Head
from dam.train.adapters import check_targets
from dam.train.networks import check_apart
from dam.train.processes import match

DenoiserFactory = Callable[[nn.Module], Denoiser]


class Base(Protocol):
    """The fixed model that a run stays close to."""

    def denoiser(self, model: nn.Module, factory: DenoiserFactory) -> Denoiser:
        """The base as a `Denoiser`; `model` is the trained one, `factory` makes a denoiser of a module."""

    def module(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """Context manager: the base as a module, for one call; `model` is the trained one, of which it may be parts."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Moves what the base keeps; to a dtype, where the trained model will be of it."""


class ReferenceModel:
    """A base that is a module of its own, frozen. It stays where accelerate has put it, on other devices or offloaded.

    Args:
        model: the base.
        trained: the model to train.

    Raises:
        ValueError: they share parameters.
    """

    def __init__(self, model: nn.Module, trained: nn.Module):
        check_apart(model, "ref_model", trained, cure=", or leave ref_model out")
        self.model = model.eval().requires_grad_(False)

    def denoiser(self, model: nn.Module, factory: DenoiserFactory) -> Denoiser:
        return factory(self.model)

    def module(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(self.model)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        if not is_placed(self.model):
            self.model.to(device=device, dtype=dtype)


# Of the copy that is the base of a model without an adapter, on each device.
LARGEST_COPY = 8 * 2**30  # bytes


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, as its base.

    Raises:
        ValueError: it would be larger than LARGEST_COPY, or the model is not all here.
    """
    cure = (
        "train an adapter (peft_config), whose base is the model itself, or pass ref_model, which accelerate may "
        "divide or offload (device_map, accelerate.cpu_offload)"
    )
    if is_placed(model):
        raise ValueError(f"the model is divided or offloaded by accelerate and cannot be copied to be the base: {cure}")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > LARGEST_COPY:
        raise ValueError(f"the base would be a frozen copy of {size / 2**30:.1f} GiB on each device: {cure}")
    return copy.deepcopy(model)


class InitialParameters:
    """A base that is the trained model itself with the trainable parameters that it had at first: a copy of these only.

    Of a model with an adapter that is the adapter, and whatever else is trained beside it: biases, modules_to_save,
    tokens. What stays frozen is the base's too. Nothing is switched off or on, and nothing of it is in a checkpoint.
    Where FSDP2 has divided the model since, the values of each process's part are exchanged instead.

    Args:
        model: as it is now.

    Raises:
        ValueError: nothing of the model is trainable, or it has statistics that training changes without a gradient.
    """

    def __init__(self, model: nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ValueError(
                    f"{name}, {type(module).__name__}, of the model follows the batches of training, and the base, "
                    "which is the model with its first parameters, would too; nor does a checkpoint of an adapter hold "
                    "that: set track_running_stats=False, take another norm, or train without an adapter"
                )
        copies: dict[nn.Parameter, nn.Parameter] = {}
        self._model = model
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    copies.setdefault(parameter, nn.Parameter(parameter.detach().clone(), requires_grad=False))
                    self._places.append((module, name, parameter))
        if not copies:
            raise ValueError(
                "no parameter of the model is trainable: load a trained adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        self._copies = copies
        # Whether a trial has shown that layers that do not differ can be left out of the base's pass.
        self.shares = False

    def denoiser(self, model: nn.Module, factory: DenoiserFactory) -> Denoiser:
        units = _units(model)
        self._check_trainable(model, units)
        return _AtFirst(factory(model), self, units)

    @contextlib.contextmanager
    def module(self, model: nn.Module) -> Iterator[nn.Module]:
        self._check_trainable(model, [])
        with self.in_place():
            yield model

    def _check_trainable(self, model: nn.Module, units: list[Any]) -> None:
        """That what is trained is what was copied.

        Raises:
            ValueError: it is more, or other parameters.
        """
        known = {getattr(module, name, None) if units else each for module, name, each in self._places}
        new = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
        if new:
            raise ValueError(
                f"{len(new)} parameters are trainable now that were not, or were others, when the trainer was made "
                f"({new[0]}, ...), so the base is not what the model was: make them trainable before, or pass ref_model"
            )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """They follow the model's."""

    @contextlib.contextmanager
    def in_parts(self, units: list[Any]) -> Iterator[None]:
        """Context manager: the model, divided by FSDP2, has its first parameters. To be entered by all processes.

        Args:
            units: modules of it that FSDP2 divides.
        """
        _reshard(units)  # what is gathered now is of other values
        parts: list[tuple[Tensor, Tensor]] = []
        for module, name, parameter in self._places:
            part = _part_here(getattr(module, name))
            kept = _part_of(self._copies[parameter], getattr(module, name))
            parts.append((part, part.detach().clone()))
            with torch.no_grad():
                part.copy_(kept)
        try:
            yield
        finally:
            _reshard(units)
            with torch.no_grad():
                for part, own in parts:
                    part.copy_(own)

    def different(self) -> list[nn.Module]:
        """Modules whose parameters are others now than at first, or may be, where ZeRO-3 has divided them."""
        return [
            module
            for module, _, parameter in self._places
            if is_partitioned(parameter) or not torch.equal(self._copies[parameter].to(parameter), parameter)
        ]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: the model has its first parameters.

        Raises:
            ValueError: the model's parameters are others now.
        """
        for module, name, parameter in self._places:
            if getattr(module, name, None) is not parameter or self._copies[parameter].shape != shape_of(parameter):
                raise ValueError(
                    f"a trainable parameter, {name} of {type(module).__name__}, was replaced or divided after the "
                    "trainer was made: the base cannot be put in its place; pass ref_model"
                )
        if any(map(is_partitioned, self._copies)):
            with partitions_of(self._model, {parameter: kept.data for parameter, kept in self._copies.items()}):
                yield
            return
        for parameter, kept in self._copies.items():
            # Only where they have moved: torch.func, which may be at work, ends the process where data are replaced.
            if (kept.device, kept.dtype) != (parameter.device, parameter.dtype):
                kept.data = kept.data.to(device=parameter.device, dtype=parameter.dtype)
        try:
            for module, name, parameter in self._places:
                setattr(module, name, self._copies[parameter])
            yield
        finally:
            for module, name, parameter in self._places:
                setattr(module, name, parameter)


def _units(model: nn.Module) -> list[Any]:
    """What FSDP2 gathers at a time."""
    return [module for module in model.modules() if is_fsdp(module)]


def _reshard(units: list[Any]) -> None:
    for unit in units:
        unit.reshard()


def _part_here(parameter: Any) -> Tensor:
    """What this process holds of a parameter, in its own memory."""
    return parameter.to_local() if is_divided(parameter) else parameter


def _part_of(whole: Tensor, parameter: Any) -> Tensor:
    """The same part of a tensor that each process has whole."""
    if not is_divided(parameter):
        return whole.to(parameter)
    from torch.distributed.tensor import distribute_tensor

    whole = whole.detach().to(parameter.device, parameter.dtype)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


class _AtFirst:
    """A denoiser whose model has its first parameters during each call.

    Args:
        denoiser: of the model.
        initial: the parameters.
        units: of the model that FSDP2 divides.
    """

    def __init__(self, denoiser: Denoiser, base: InitialParameters, units: list[Any]):
        self._denoiser, self._base, self._units = denoiser, base, units
        self.blocks = blocks_of(denoiser)

    def _in_place(self) -> contextlib.AbstractContextManager[None]:
        return self._base.in_parts(self._units) if self._units else self._base.in_place()

    @property
    def left_padding(self) -> bool:
        return getattr(self._denoiser, "left_padding", True)

    @property
    def approximate_cache(self) -> Any:
        return getattr(self._denoiser, "approximate_cache", None)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with self._in_place():
            return self._denoiser.hidden_states(tokens, attention_mask)

    @torch.no_grad()
    def hidden_at(self, tokens: Tensor, attention_mask: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        with self._in_place():
            return hidden_at(self._denoiser, tokens, attention_mask, row, position)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        with self._in_place():
            return equal_rows(self._denoiser, tokens, attention_mask)

    def prefix_cache(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Any:
        begin = getattr(self._denoiser, "prefix_cache", None)
        with self._in_place():
            passes = None if begin is None else begin(tokens, attention_mask)
        return None if passes is None else _PassesAtFirst(passes, self._base)

    @torch.no_grad()
    def head(self) -> Head:
        with self._in_place():
            return self._denoiser.head()

    def beside(self, denoiser: Denoiser) -> Denoiser | None:
        """The model and this base of it as one denoiser, whose hidden states are [B, L, 2 D]: the model's, the base's.

        None where that saves nothing: they differ from the first layer on, or passes are over blocks alone; and where
        FSDP2 divides them, as a trial that each process makes of its own rows would tell them apart.

        Args:
            denoiser: of the model as it is now.
        """
        model = getattr(denoiser, "model", None)
        if getattr(self._denoiser, "model", None) is not model or not isinstance(model, nn.Module):
            return None
        if self._units or (blocks_of(denoiser) is not None and hasattr(denoiser, "prefix_cache")):
            return None
        different = self._base.different()
        trunk = SharedTrunk(model, different)
        if different and not trunk.layers:
            return None
        return _Beside(denoiser, self, self._base, trunk if different else None)


class _Beside:
    """A model and its base, called at the same states: layers in front of the first that differs run once.

    Args:
        denoiser: of the model.
        at_first: the base as a denoiser.
        base: keeps what a trial has shown.
        trunk: the layers that are not to differ; None where nothing does.
    """

    def __init__(self, denoiser: Any, at_first: _AtFirst, base: InitialParameters, trunk: SharedTrunk | None):
        self._denoiser, self._at_first, self._base, self._trunk = denoiser, at_first, base, trunk
        self.head = denoiser.head
        self.left_padding = getattr(denoiser, "left_padding", True)

    def equal_rows(self, tokens: Tensor, attention_mask: Tensor | None = None) -> bool:
        return all(equal_rows(one, tokens, attention_mask) for one in (self._denoiser, self._at_first))

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Those of the model and behind them those of the base, [B, L, 2 D]."""
        if self._trunk is None:
            return self._denoiser.hidden_states(tokens, attention_mask).repeat(1, 1, 2)
        with self._trunk.first_pass():
            hidden = self._denoiser.hidden_states(tokens, attention_mask)
        with self._trunk.second_pass():
            of_base = self._at_first.hidden_states(tokens, attention_mask)
        if self._trunk.layers and not self._base.shares:
            whole = self._at_first.hidden_states(tokens, attention_mask)
            if not torch.equal(whole, of_base):
                self._trunk.give_up()
                of_base = whole
            # Where model and base say the same, by rounding or of these tokens, nothing is shown.
            elif not torch.equal(whole, hidden):
                self._base.shares = True
        return torch.cat((hidden, of_base), dim=-1)


class _PassesAtFirst:
    """Passes over blocks of such a denoiser."""

    def __init__(self, passes: Any, base: InitialParameters):
        self._passes, self._base = passes, base

    def hidden_states(self, rows: Tensor, tokens: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        with self._base.in_place():
            return self._passes.hidden_states(rows, tokens, begin, end)


def _tensors(model: nn.Module, *, all_of_it: bool) -> dict[str, Tensor]:
    """Parameters and buffers by name, or what is trained of them."""
    if all_of_it:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _loaded_by_one() -> bool:
    """Whether only the first process has loaded weights, as accelerate tells transformers, and will divide them."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return all(os.environ.get(name, "false").lower() == "true" for name in names)


def with_base(network: Any, ref_model: nn.Module | None, peft_config: Any) -> tuple[Any, Base]:
    """The model to train, with an adapter if one is configured, and its base; the same in all processes.

    Args:
        network: the model.
        ref_model: the base, if it is another model.
        peft_config: of the adapter.

    Raises:
        ValueError: arguments that do not go together, or an adapter's targets are none, or the output layer by accident
            (`dam.train.adapters.check_targets`).
        ImportError: PEFT is missing.
    """
    if peft_config is not None:
        if ref_model is not None:
            raise ValueError("with peft_config the base is the model without its adapter: leave ref_model out")
        if hasattr(network, "disable_adapter"):
            raise ValueError(
                "the model has an adapter already: leave peft_config out to go on training it, or merge it first "
                "(merge_and_unload)"
            )
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise ImportError("peft_config needs peft: pip install 'discrete-adjoint-matching[peft]'") from error
        check_targets(network, peft_config)
        network = get_peft_model(network, peft_config)
    copies = ref_model is None and not hasattr(network, "disable_adapter")
    match(_tensors(network, all_of_it=copies or not _loaded_by_one()))
    if ref_model is None:
        if not copies:
            return network, InitialParameters(network)
        ref_model = copied(network)
    else:
        match(_tensors(ref_model, all_of_it=True))
    return network, ReferenceModel(ref_model, network)
