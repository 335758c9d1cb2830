"""What a model does to logits after its output layer, found by what comes out for numbers put in.

The fused operations go from hidden states to log-probabilities by one product. A model may do more to what its output
layer gives: add a bias of its own, multiply by a number, take the position before, and soft-cap what has come of it.
These have their place in hidden states and head; whatever else is found is an error, and so is a layer that computes
something else than the product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dam.models.sharding import as_given, brought_here, here, is_divided, own_rows, settle, shape_of, whole
from dam.models.softcap import candidates, capped, centred
from dam.ops._head import Head

_REAL = 4  # positions at which the output layer's own numbers are compared
# Rows of probes, each times numbers from -1 to 1 over the vocabulary. 0 shows a bias, large ones what is not linear: a
# soft cap so high that 1024 differs by no more than rounding is none for any logits a model has. The last goes unseen
# where positions are shifted.
_PROBES = (1.0, 0.0, 64.0, 1024.0, -8.0)
POSITIONS = _REAL + len(_PROBES)


class Tail(NamedTuple):
    """logits at position i = cap(scale * (what the output layer gives at position i - shift) + bias) + any number.

    cap(x) = softcap * tanh(x / softcap), or x without one.
    """

    scale: float = 1.0
    shift: int = 0  # 0 or 1; the first position is its own
    bias: str | None = None  # name of the model's parameter or buffer
    softcap: float | None = None

    def hidden_states(self, hidden: Tensor) -> Tensor:
        """Those [B, L, D] that the head maps to the model's logits, of what the output layer is given."""
        if self.shift:
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
        # Before the product, where it is exact for powers of 2 and costs nothing; after it would be [L, V].
        return hidden if self.scale == 1.0 else hidden * self.scale

    def head(self, head: Head, model: nn.Module) -> Head:
        """The head that maps such hidden states to the model's logits, of that of the output layer."""
        bias = head.bias
        if bias is not None and self.scale != 1.0:
            bias = bias * self.scale
        if self.bias is not None:
            module, _, name = self.bias.rpartition(".")
            holder = model.get_submodule(module)
            with brought_here(holder):
                outside = whole(getattr(holder, name)).reshape(-1)
            if is_divided(head.weight):
                raise ValueError(
                    f"{self.bias} is added behind the output layer, whose rows tensor parallelism divides: leave that "
                    "layer out of the plan (tp_plan)"
                )
            bias = outside if bias is None else bias + outside
        return head._replace(bias=bias, softcap=self.softcap)


class Probe:
    """One forward pass in which the output layer's numbers are seen at some positions and replaced at others.

    Its hooks on the output layer hand on `POSITIONS` positions of one row.
    """

    def __init__(self) -> None:
        self.given: list[Tensor] = []  # [1, L, D]: what the layer would be given, once per call of it
        self.outputs: Tensor = torch.empty(0)  # [POSITIONS, V]: the numbers that the layer gave, and probes
        self.dtype = torch.float32  # of the numbers that it gave

    def before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.given.append(here(args[0]))
        return (as_given(self.hidden()[None], args[0]), *args[1:])

    def hidden(self) -> Tensor:
        """What the layer is given instead, [POSITIONS, D], from the end: padding is on the left."""
        row = self.given[0][0]
        return row[-1 - torch.arange(POSITIONS, device=row.device) % len(row)]

    def after(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self.dtype = output.dtype
        # Wide enough for what a model computes in 16 bits to be told apart.
        output = output[0].to(torch.promote_types(output.dtype, torch.float32))
        size = torch.tensor(_PROBES, dtype=output.dtype, device=output.device)
        ramp = torch.linspace(-1.0, 1.0, output.shape[1], dtype=output.dtype, device=output.device)
        self.outputs = torch.cat((output[:_REAL], size[:, None] * ramp))
        torch.set_grad_enabled(True)  # from here on; parameters in use show by their gradients
        return self.outputs[None].clone()  # which a model may change in place, as LLaDA scales its logits


def found_tail(model: nn.Module, layer: nn.Module, head: Head, tokens: Tensor, arguments: Mapping[str, Any]) -> Tail:
    """What `model` does after its output layer, of which `head` is the head, by one forward pass of one row.

    Args:
        model: as it is now, its adapters on or off.
        layer: its output layer.
        tokens: int64 [1, L]; any that the model takes.
        arguments: what the model is called with for them.

    Raises:
        TypeError, ValueError: what the fused operations compute would be other logits than the model's; the message
            says by how much and what to do.
    """
    probe = Probe()
    handles = [layer.register_forward_pre_hook(probe.before), layer.register_forward_hook(probe.after)]
    biases = _candidates(model, head.weight.shape[0])
    trainable = [bias.requires_grad for bias in biases.values()]
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    try:
        # Out of inference mode, in which nothing has a gradient.
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            for bias in biases.values():
                bias.requires_grad_(True)
            with torch.no_grad():  # ends what the probe began
                logits = _logits(model(**arguments))
            settle(model)
            check_calls(model, probe.given, tokens)
            # A model that returns no logits has none to differ from.
            tail = Tail() if logits is None else _fitted(type(model).__name__, logits, probe.outputs, biases)
            others = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in biases}
            _check_constants(type(model).__name__, logits, others)
            rounding = max(_rounding(probe.hidden(), head.weight), torch.finfo(probe.dtype).eps)
            _check_product(layer, head, probe.hidden()[:_REAL], probe.outputs[:_REAL], rounding)
    finally:
        for handle in handles:
            handle.remove()
        here = dict(model.named_parameters())  # other objects where FSDP2 has gathered them for the pass
        for (name, bias), before in zip(biases.items(), trainable, strict=True):
            bias.requires_grad_(before)
            here.get(name, bias).requires_grad_(before)
    return tail


def check_calls(model: nn.Module, given: list[Tensor], tokens: Tensor) -> None:
    """That the output layer ran once, on hidden states of all tokens.

    Raises:
        RuntimeError: it did not.
    """
    if not given and is_compiled(model):
        raise RuntimeError(
            f"{type(model).__name__} was compiled by torch.compile and called before: what is compiled runs no hooks "
            "added later, by which hidden states are had. Hand it in before its first call (DAMConfig(torch_compile="
            "True) compiles it), or call torch._dynamo.reset() first"
        )
    if len(given) != 1 or given[0].shape[:2] != tokens.shape:
        raise RuntimeError(
            f"the output layer of {type(model).__name__} ran {len(given)} times in one forward pass, "
            f"on shapes {[list(hidden.shape) for hidden in given]}; it must run once, on {[*tokens.shape, 'D']}. "
            "Hand in a dam.models.Denoiser of your own"
        )


def is_compiled(model: nn.Module) -> bool:
    """By torch.compile(model), or in place by model.compile()."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _candidates(model: nn.Module, columns: int) -> dict[str, Tensor]:
    """What a model may add to its logits, by name: parameters and buffers of as many numbers."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    fit = ((name, x) for name, x in tensors if shape_of(x).numel() == columns and x.is_floating_point())
    return {name: x for name, x in fit if x.is_leaf and not x.is_inference()}


def _logits(output: Any) -> Tensor | None:
    """The logits [POSITIONS, V] in what a model returned, if it returned any."""
    values: list[Any] = [getattr(output, "logits", None), output]
    if isinstance(output, (tuple, list)):
        values += output
    elif isinstance(output, Mapping):
        values += output.values()
    for value in values:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, POSITIONS):
            return value[0]
    return None


def _fitted(model: str, logits: Tensor, outputs: Tensor, biases: dict[str, Tensor]) -> Tail:
    """The tail that makes `logits` of `outputs`."""
    if logits.shape != outputs.shape:
        raise TypeError(
            f"{model} returns logits of {logits.shape[1]} tokens, but what get_output_embeddings() names gives "
            f"{outputs.shape[1]} numbers: it is not applied last. Hand in a dam.models.Denoiser of your own, whose "
            "head() is the last product"
        )
    given = logits.detach()
    seen, put = centred(given), centred(outputs)
    # Roundings of the numbers themselves and of their mean.
    size = 8.0 * torch.finfo(logits.dtype).eps * given.abs().amax(dim=1, keepdim=True)
    for shift in (0, 1):
        row = _REAL + _PROBES.index(0.0) + shift
        of = put[(torch.arange(POSITIONS, device=logits.device) - shift).clamp(min=0)]
        scale = _scale(seen, of, row)
        if scale != 0.0 and bool(((seen - scale * of - seen[row]).abs() <= size + size[row]).all()):
            return Tail(scale, shift, _bias(model, logits, row, biases))
    tail = _with_cap(logits, outputs, biases, size)
    if tail is not None:
        return tail
    never = torch.isneginf(given).all(dim=0).nonzero()[:, 0].tolist()
    if never:
        raise ValueError(
            f"{model} gives {len(never)} tokens ({never[0]}, ...) logits of -inf, but the fused operations would draw "
            "them: hand in a dam.models.Denoiser of your own, whose head() has a bias of -inf there"
        )
    difference = (given.log_softmax(dim=1) - outputs.log_softmax(dim=1))[:_REAL].abs().nan_to_num(nan=math.inf).max()
    top = float(given[_REAL + _PROBES.index(64.0)].max())
    raise ValueError(
        f"{model} changes its logits after the output layer, by more than a scale, a bias, a shift by one position and "
        f"then a soft cap: where the layer gives 64 the model gives {top:.4g}, and its log-probabilities differ by up "
        f"to {float(difference):.3g} from those of the layer. The fused operations would train other log-probabilities "
        "than the model's. Hand in a dam.models.Denoiser of your own, whose head() and hidden_states() make them"
    )


def _with_cap(logits: Tensor, outputs: Tensor, biases: dict[str, Tensor], size: Tensor) -> Tail | None:
    """The tail with a soft cap that makes `logits` of `outputs`, up to rounding, `size` [POSITIONS, 1], if one does."""
    seen = centred(logits.detach().double())
    if not bool(seen.isfinite().all()):
        return None
    for shift in (0, 1):
        row = _REAL + _PROBES.index(0.0) + shift
        used = _used(logits, row, biases)
        if len(used) > 1:
            continue
        of = outputs[(torch.arange(POSITIONS, device=logits.device) - shift).clamp(min=0)].double()
        bias = whole(biases[used[0]]).detach().reshape(-1).double() if used else of.new_zeros(of.shape[1])
        for cap, scale in candidates(seen, of, bias, size, torch.finfo(logits.dtype).eps):
            ours = capped(of, bias, cap, scale)
            if bool(((centred(ours) - seen).abs() <= size).all()):
                at = _REAL + _PROBES.index(1024.0) + shift
                if used and not _counts(logits, at, 1.0 - (ours[at] / cap).square(), biases[used[0]]):
                    return None
                return Tail(scale, shift, used[0] if used else None, cap)
    return None


def _counts(logits: Tensor, row: int, slope: Tensor, bias: Tensor) -> bool:
    """Whether a bias counts in the logits of a row by this slope [V] or [], which its numbers do not show if zeros."""
    # Of sum 0, and every partial sum is exact: see `centred`.
    weight = 1 - 2 * (torch.arange(logits.shape[1], device=logits.device) % 2).to(logits.dtype)
    weight[logits.shape[1] // 2 * 2 :] = 0.0
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(logits[row] @ weight, bias, retain_graph=True)
    difference = gradient.reshape(-1).double() - weight.double() * slope
    return bool((difference.abs() <= 16.0 * torch.finfo(logits.dtype).eps).all())


def _scale(logits: Tensor, outputs: Tensor, zero: int) -> float:
    """By how much the largest probe is multiplied; exactly 1 where rounding could explain the rest."""
    row = zero + _PROBES.index(64.0) - _PROBES.index(0.0)
    slope = (logits[row] - logits[zero]).double() @ outputs[row].double() / outputs[row].double().square().sum()
    scale = float(slope) if bool(torch.isfinite(slope)) else 0.0
    return 1.0 if abs(scale - 1.0) <= 8.0 * torch.finfo(logits.dtype).eps else scale


def _check_constants(model: str, logits: Tensor | None, parameters: Mapping[str, Tensor]) -> None:
    """That nothing that is trained, but a bias, comes after the output layer: its gradient would be lost.

    Raises:
        ValueError: it does; names it.
    """
    used = [] if logits is None else _used(logits, slice(None), parameters)
    if used:
        raise ValueError(
            f"{model} applies {', '.join(used)} after its output layer: what the fused operations train gives it no "
            "gradient. Freeze it (requires_grad_(False)), or hand in a dam.models.Denoiser of your own"
        )


def _bias(model: str, logits: Tensor, row: int, biases: dict[str, Tensor]) -> str | None:
    """Name of the parameter or buffer that a row of the logits is, of zeros put in: it has a gradient of them."""
    offset, used = centred(logits.detach()[row : row + 1])[0], _used(logits, row, biases)
    rounding = 8.0 * torch.finfo(logits.dtype).eps * float(logits.detach()[row].abs().max())
    known = [centred(whole(biases[name]).detach().reshape(1, -1).to(offset.dtype))[0] for name in used]
    if len(used) == 1 and bool(((known[0] - offset).abs() <= rounding).all()):
        if _counts(logits, row, offset.new_ones(()), biases[used[0]]):
            return used[0]
    if used or bool((offset.abs() > rounding).any()):
        raise ValueError(
            f"{model} adds up to {float(offset.abs().max()):.4g} to the logits of its output layer, which is no "
            f"parameter or buffer as it stands{' (but made of ' + ', '.join(used) + ')' if used else ''}. Hand in a "
            "dam.models.Denoiser of your own, whose head() has that bias"
        )
    return None


def _used(logits: Tensor, rows: int | slice, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which rows of the logits were made."""
    if not logits.requires_grad or not tensors:
        return []
    with torch.enable_grad():
        value = logits[rows].sum()
        gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None]


def _check_product(layer: nn.Module, head: Head, hidden: Tensor, outputs: Tensor, rounding: float) -> None:
    """That the head's product is what the layer gave for the same hidden states, up to relative rounding.

    Raises:
        ValueError: it is not.
    """
    (weight, own), bias = own_rows(head.weight), None if head.bias is None else own_rows(head.bias)[0]
    if len(weight) == 0:  # all of them are other processes'
        return
    if len(outputs.T) == len(head.weight):  # else the layer gives this process's own only
        outputs = outputs[:, own]
    head = head._replace(weight=weight, bias=bias)
    ours = head.logits(hidden).to(outputs.dtype)
    if len(ours.T) != len(outputs.T):
        raise TypeError(
            f"the output layer, {type(layer).__name__}, has a weight of {len(ours.T)} rows but gives {len(outputs.T)} "
            "numbers: it is no linear layer over the vocabulary"
        )
    # Of the largest logit, and of a sum of D products of either sign: what is added or multiplied on the way may be as
    # large, with a rounding each time; in float32 the order of the sum weighs more.
    rows = head.weight.norm(dim=1, dtype=ours.dtype).max() / math.sqrt(head.weight.shape[1])
    size = outputs.abs().amax(dim=1, keepdim=True) + 4.0 * hidden.to(ours.dtype).norm(dim=1, keepdim=True) * rows
    explained = max(2.0 * rounding, 16.0 * torch.finfo(ours.dtype).eps) * size
    if bool(((ours - outputs).abs() > explained).any()):
        difference = (ours.log_softmax(dim=1) - outputs.log_softmax(dim=1)).abs()
        raise ValueError(
            f"the output layer, {type(layer).__name__}, computes something else than hidden @ weight^T + bias with its "
            f"adapter's product: log-probabilities differ by up to {float(difference.max()):.3g}, where rounding "
            f"explains {float(explained.max()):.1g}. Leave the output layer out of the adapter's "
            "target_modules, merge the adapter (merge_and_unload), or hand in a dam.models.Denoiser of your own"
        )


def _rounding(*values: Tensor) -> float:
    """Relative rounding of a product of these, which float32 may be multiplied with less precision than it has."""
    less = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return max(less, *(torch.finfo(value.dtype).eps for value in values))
