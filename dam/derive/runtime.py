"""What derived source calls: adjoints of broadcasting, reductions, subscripts, structures; numpy and torch.

Adjoints have the structure of what they belong to: an array for an array, a list for a list. The number 0.0 stands
for an adjoint to which nothing has been added yet, whatever its structure. Only `restore`, `put_back` and
`store_tangent` change their arguments.
Most functions have derivatives of their own in dam.derive.tables, so that derived source can be derived again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dam.derive.errors import DerivativeError

_NUMBERS = (float, np.floating)
_MISSING = object()


def _lib(*values: Any) -> Any:
    return torch if any(isinstance(v, torch.Tensor) for v in values) else np


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, torch.Tensor))


def _is_complex(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.is_complex()
    return isinstance(x, complex) or (isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "c")


def _array(x: Any) -> Any:
    """x, or the array that numpy makes of a list."""
    return listed(x, x) if isinstance(x, (tuple, list)) else x


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if hasattr(x, "shape") else ()


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    return tuple(sorted(int(a) % ndim if ndim else 0 for a in axes))


# ---- what is checked when a derivative runs


def differentiable(x: Any, name: str) -> None:
    """That an argument is made of real floating-point numbers.

    Raises:
        DerivativeError: it has integers, booleans, complex numbers or none at all.
    """
    if type(x) is np.ndarray:
        if x.dtype.kind == "f":
            return
    elif isinstance(x, float):
        return
    if isinstance(x, (tuple, list, dict)):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        for at, value in items:
            differentiable(value, f"{name}[{at!r}]")
    elif isinstance(x, (np.ndarray, np.generic)):
        if x.dtype.kind != "f":
            raise DerivativeError(f"no derivative in {name}, whose dtype is {x.dtype}; give floating-point numbers")
    elif isinstance(x, torch.Tensor):
        if not x.is_floating_point():
            raise DerivativeError(f"no derivative in {name}, whose dtype is {x.dtype}; give floating-point numbers")
    else:
        raise DerivativeError(f"no derivative in {name}, a {type(x).__name__}; give floating-point numbers")


def distinct(**arguments: Any) -> None:
    """That arrays among the arguments share no memory, since the function changes one in place.

    Raises:
        DerivativeError: two of them do.
    """
    leaves = [(name, leaf) for name, value in arguments.items() for leaf in _leaves(value)]
    for i, (name, leaf) in enumerate(leaves):
        for other, second in leaves[i + 1 :]:
            if leaf is second or _share(leaf, second):
                raise DerivativeError(f"{name} and {other} share memory and the function writes in place; give a copy")


def _share(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.may_share_memory(a, b)


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list, dict)):
        if not isinstance(x, tuple):
            yield x
        for value in x.values() if isinstance(x, dict) else x:
            yield from _leaves(value)
    elif _is_array(x):
        yield x


def rebound(x: Any, names: str, whole: Any = None) -> None:
    """That `x += v` made a new object, where another name for the old one is read afterwards.

    Args:
        whole: what x is an item of. Items of an array are written into it, which is in place too.

    Raises:
        DerivativeError: x is an array or a list, which += changes under its other name too.
    """
    if _is_array(whole):
        return
    if isinstance(x, (np.ndarray, torch.Tensor, list, dict)):
        how = "copy it first" if whole is None else "write x[i] = x[i] + v where a new value is meant"
        raise DerivativeError(f"an augmented assignment changes {names} in place too, which is read later; {how}")


def number(x: Any, message: str) -> None:
    """That a value is a number, where an array would share memory with what is written to next, or be written into.

    Raises:
        DerivativeError: with the message, if it is an array or a structure.
    """
    if isinstance(x, (np.ndarray, torch.Tensor, list, tuple, dict)):
        raise DerivativeError(message)


def no_list(x: Any, message: str) -> None:
    """That a sum or a product is one of numbers, where one of lists would hold what is written to next.

    Raises:
        DerivativeError: with the message, if it is a list or a tuple.
    """
    if isinstance(x, (list, tuple)):
        raise DerivativeError(message)


def part(x: Any, i: Any) -> Any:
    """x[i], which is about to be written to: the very memory of x.

    Raises:
        DerivativeError: i picks by indices or a mask, which makes a copy.
    """
    if _is_array(x) and _advanced(i):
        raise DerivativeError("x[i][j] = v with an array of indices i changes a copy; write x[i, j] = v")
    alone(x, i)
    return x[i]


def alone(x: Any, i: Any) -> None:
    """That x[i], which is about to be changed in place, is no other item of a structure x, nor within one.

    Raises:
        DerivativeError: it is, and has two adjoints there.
    """
    if _is_array(x) or isinstance(i, slice):
        return
    changed = list(_leaves(x[i]))
    if not changed:
        return
    at = range(len(x))[i] if isinstance(x, (tuple, list)) else i
    for key, other in x.items() if isinstance(x, dict) else enumerate(x):
        if key == at or isinstance(other, float):
            continue
        for leaf in _leaves(other):
            if any(leaf is one or _share(leaf, one) for one in changed):
                raise DerivativeError(
                    f"item {i!r}, which is changed in place, shares memory with item {key!r} of its structure; copy one"
                )


def as_long(x: Any, i: slice, v: Any, message: str) -> None:
    """That `x[i] = v` leaves a list as long as it is.

    Raises:
        DerivativeError: with the message, if it does not.
    """
    if isinstance(x, list) and len(x[i]) != len(v):
        raise DerivativeError(message)


def at_least(x: Any, n: int) -> None:
    """That x has n items or more, as `a, *b = x` needs.

    Raises:
        ValueError: it has fewer, as Python says.
    """
    if len(x) < n:
        raise ValueError(f"not enough values to unpack (expected at least {n}, got {len(x)})")


def _advanced(i: Any) -> bool:
    return any(isinstance(j, (list, np.ndarray, torch.Tensor)) for j in (i if isinstance(i, tuple) else (i,)))


def seed(y: Any) -> Any:
    """The adjoint of a scalar result with respect to itself, 1.

    Raises:
        DerivativeError: the result is no scalar.
    """
    if isinstance(y, _NUMBERS):
        return 1.0
    if _is_array(y) and _size(y) == 1:
        differentiable(y, "the result")
        return _lib(y).ones_like(y)
    raise DerivativeError(
        f"grad needs a scalar result, and this one is {_said(y)}; autodiff takes an adjoint of any shape"
    )


def seed_of_sum(x: Any) -> Any:
    """seed(np.sum(x)), of an array of floats without summing: that it is a scalar is known."""
    if type(x) is np.ndarray and x.dtype.kind == "f":
        return 1.0
    return seed(np.sum(x))


def seeded(b: Any, y: Any) -> Any:
    """The adjoint that was given for the result y, or that of a scalar.

    Raises:
        DerivativeError: it does not have the structure of the result.
    """
    if b is None:
        return seed(y)
    return _matched(b, y, "the adjoint given")


def tangent(d: Any, x: Any) -> Any:
    """The tangent that was given for an argument x.

    Raises:
        DerivativeError: none was, or it does not have the structure of the argument.
    """
    if d is None:
        raise DerivativeError("a tangent has no default; give one for each parameter x that is differentiated, as d_x=")
    return _matched(d, x, "the tangent given")


def gradient(b: Any, x: Any) -> Any:
    """The adjoint of an argument in the argument's own structure and shape."""
    if type(b) is np.ndarray and type(x) is np.ndarray and b.dtype is x.dtype and b.shape == x.shape:
        return b
    return _matched(b, x, "the gradient")


def _matched(b: Any, x: Any, what: str) -> Any:
    if isinstance(x, (tuple, list)):
        if _is_zero(b):
            return zeros_like(x)
        if type(b) is not type(x) or len(b) != len(x):
            raise DerivativeError(f"{what} is {_said(b)}, its value {_said(x)}")
        return _sequence(x, [_matched(one, other, what) for one, other in zip(b, x, strict=True)])
    if isinstance(x, dict):
        if _is_zero(b):
            return zeros_like(x)
        return {k: _matched(b.get(k, 0.0), v, what) for k, v in x.items()}
    if _is_complex(b):
        raise DerivativeError(f"{what} is complex; derivatives are of real numbers alone")
    if _is_array(x):
        if _shape(b) == _shape(x) and _is_array(b):
            if isinstance(x, torch.Tensor):
                return b.to(x.dtype) if isinstance(b, torch.Tensor) and x.is_floating_point() else b
            return b.astype(x.dtype, copy=False) if isinstance(b, np.ndarray) and x.dtype.kind == "f" else b
        if _shape(b) == ():
            return full(b, x)
        raise DerivativeError(f"{what} is {_said(b)}, its value {_said(x)}")
    if isinstance(b, (tuple, list, dict)) or _size(b) != 1:
        raise DerivativeError(f"{what} is {_said(b)}, its value {_said(x)}")
    b = b.reshape(())[()] if _is_array(b) else b
    return x.dtype.type(b) if isinstance(x, np.floating) else b


def _size(x: Any) -> int:
    return int(np.prod(_shape(x)))


def _said(x: Any) -> str:
    if _is_array(x):
        return f"an array of shape {list(x.shape)}"
    return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, (tuple, list, dict)) else "")


# ---- structures


def _is_zero(b: Any) -> bool:
    return isinstance(b, float) and b == 0.0


def _sequence(like: Any, items: list[Any]) -> Any:
    if isinstance(like, tuple):
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    return items


def zeros_like(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.zeros(x.shape, x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64)
    if isinstance(x, torch.Tensor):
        return torch.zeros_like(x) if x.is_floating_point() else torch.zeros(x.shape, dtype=torch.get_default_dtype())
    if isinstance(x, (tuple, list)):
        return _sequence(x, [zeros_like(one) for one in x])
    if isinstance(x, dict):
        return {k: zeros_like(v) for k, v in x.items()}
    return 0.0


def _blank(x: Any) -> Any:
    """An adjoint of a structure without contributions; of lists and dicts within it, whose length may change, 0.0."""
    if isinstance(x, dict):
        return {k: 0.0 if isinstance(v, (list, dict)) else _blank(v) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return _sequence(x, [0.0 if isinstance(v, (list, dict)) else _blank(v) for v in x])
    return zeros_like(x)


def full(b: Any, x: Any) -> Any:
    """b with the shape of x: an adjoint that may be a number still."""
    if isinstance(x, (tuple, list, dict)):
        if isinstance(b, (tuple, list)) and len(b) != len(x):
            changed = "what repeats a list or changes its length has no derivative here"
            raise DerivativeError(f"an adjoint is {_said(b)}, its value {_said(x)}; {changed}")
        return zeros_like(x) if _is_zero(b) else b
    if not _is_array(x) or _shape(b) == _shape(x):
        return b
    if isinstance(x, torch.Tensor):
        return torch.as_tensor(b, dtype=_floating(x), device=x.device).expand(x.shape).clone()
    return np.full(x.shape, b, dtype=_floating(x))


def _floating(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64


def add(a: Any, b: Any) -> Any:
    """The sum of two adjoints of one value."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        if len(a) != len(b):
            raise DerivativeError(f"adjoints of one value are of {len(a)} and {len(b)} items")
        return _sequence(a, [add(one, other) for one, other in zip(a, b, strict=True)])
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: add(a.get(k, 0.0), b.get(k, 0.0)) for k in {**a, **b}}
    if isinstance(a, (tuple, list, dict)):
        return a
    if isinstance(b, (tuple, list, dict)):
        return b
    return a + b


def packed(items: Sequence[Any], x: Any) -> Any:
    """Adjoints of the items of x as an adjoint of x."""
    if len(items) != len(x):
        raise DerivativeError(f"{len(items)} adjoints for {len(x)} items")
    if isinstance(x, (tuple, list)):
        return _sequence(x, [full(b, one) for b, one in zip(items, x, strict=True)])
    return _lib(x).stack(
        [full(b, one) if _is_array(one) else _lib(x).asarray(b) for b, one in zip(items, x, strict=True)]
    )


def placed(g: Any, i: Any, x: Any) -> Any:
    """The adjoint of x when g is that of x[i]."""
    return add_at(0.0, i, g, x)


def add_at(b: Any, i: Any, g: Any, x: Any) -> Any:
    """b, an adjoint of x, with g added at i."""
    if _is_zero(x):  # an adjoint without contributions, of which every item is 0.0
        return 0.0
    if isinstance(x, dict):
        b = dict(_blank(x) if _is_zero(b) else b)
        if i in x:  # saved(x, i) finds nothing where a key is new
            b[i] = add(b.get(i, 0.0), full(g, x[i]))
        return b
    if isinstance(x, (tuple, list)):
        items = list(_blank(x) if _is_zero(b) else b)
        if isinstance(i, slice):
            items[i] = [add(one, other) for one, other in zip(items[i], full(g, x[i]), strict=True)]
        else:
            items[i] = add(items[i], full(g, x[i]))
        return _sequence(x, items)
    if not _is_array(x):  # numpy's numbers have items, x[()] and x[...]
        return b + reshape_like(g, x)
    b = _whole(b, x)
    if isinstance(x, torch.Tensor):
        b = b.clone()
        if _advanced(i):
            index = tuple(torch.as_tensor(j) if isinstance(j, (list, np.ndarray)) else j for j in _tuple(i))
            if all(isinstance(j, torch.Tensor) for j in index):
                return b.index_put(index, torch.as_tensor(g, dtype=b.dtype), accumulate=True)
            flat = torch.arange(b.numel()).reshape(b.shape)[i].reshape(-1)
            added = torch.zeros(b.numel(), dtype=b.dtype).index_add(0, flat, full(g, x[i]).reshape(-1))
            return b + added.reshape(b.shape)
        b[i] += g
        return b
    b = b.copy()
    if _advanced(i):
        np.add.at(b, i, g)
    else:
        b[i] += g
    return b


def _whole(b: Any, x: Any) -> Any:
    """full(b, x) of an array x, an array also where x has no axes."""
    b = full(b, x)
    return b if _is_array(b) else _lib(x).asarray(b)


def _tuple(i: Any) -> tuple[Any, ...]:
    return i if isinstance(i, tuple) else (i,)


def zeroed(b: Any, i: Any, x: Any) -> Any:
    """b, an adjoint of x after `x[i] = v`, as the adjoint of x before."""
    if isinstance(x, dict):
        # The key may be gone again.
        return {**_blank(x), **b, i: zeros_like(b.get(i))} if isinstance(b, dict) else b
    if isinstance(x, (tuple, list)):
        if _is_zero(b):
            return b
        items = list(b)
        items[i] = zeros_like(x[i])
        return items
    if _is_zero(x):  # in the place of a structure
        return 0.0
    b = _whole(b, x)
    b = b.clone() if isinstance(b, torch.Tensor) else b.copy()
    b[i] = 0.0
    return b


def _written_once(i: Any, x: Any) -> None:
    places = np.arange(_size(x)).reshape(_shape(x))
    index = tuple(np.asarray(j) if isinstance(j, (list, torch.Tensor)) else j for j in _tuple(i))
    taken = places[index].reshape(-1)
    if len(np.unique(taken)) != taken.size:
        raise DerivativeError("x[i] = v with an i that names a place twice: only one of the values is stored")


def stored(b: Any, i: Any, x: Any, v: Any) -> Any:
    """The adjoint of v in `x[i] = v`, from b, that of x afterwards.

    Raises:
        DerivativeError: x holds integers, or i names a place twice, of which one value is lost.
    """
    if _is_array(x):
        differentiable(x, "an array written to")
        if _advanced(i):
            _written_once(i, x)
    if _is_zero(b):
        return zeros_like(v)
    if isinstance(x, dict):
        return full(b.get(i, 0.0), v)
    return unbroadcast(_whole(b, x)[i], v) if _is_array(x) else b[i]


def saved(x: Any, i: Any) -> Any:
    """What `x[i] = v` is about to overwrite."""
    if isinstance(x, dict):
        return x.get(i, _MISSING)
    value = x[i]
    return (
        value.copy() if isinstance(value, np.ndarray) else value.clone() if isinstance(value, torch.Tensor) else value
    )


def restore(x: Any, i: Any, old: Any) -> None:
    if old is _MISSING:
        del x[i]
    else:
        x[i] = old


def put_back(x: list[Any], v: Any, at: int | None = None) -> None:
    """Puts what was popped where it was: an effect on whoever has the list, not as an append to one nobody reads.

    Raises:
        DerivativeError: x is a dict.
    """
    if isinstance(x, dict):
        raise DerivativeError("pop of a key of a dict has no derivative here; leave the key where it is")
    x.insert(len(x) if at is None else at, v)


def store_tangent(d: Any, i: Any, v: Any, x: Any) -> None:
    """d[i] = v, of the tangents of an array or a structure x and of what is stored.

    Raises:
        DerivativeError: x holds integers.
    """
    if _is_array(x):
        differentiable(x, "an array written to")
    d[i] = v


def copied(x: Any) -> Any:
    """A value that later writes do not reach."""
    if isinstance(x, (tuple, list)):
        return _sequence(x, [copied(one) for one in x])
    if isinstance(x, dict):
        return {k: copied(v) for k, v in x.items()}
    return x.copy() if isinstance(x, np.ndarray) else x.clone() if isinstance(x, torch.Tensor) else x


def without_last(b: Any, at: int = -1) -> Any:
    """An adjoint of a list as that of the list before its last item, or one that is at a place, was put there."""
    if _is_zero(b):
        return b
    at = at % len(b)
    return [*b[:at], *b[at + 1 :]]


def last(b: Any, at: int = -1) -> Any:
    return b if _is_zero(b) else b[at]


def with_last(b: Any, g: Any, x: Any, at: int = -1) -> Any:
    """An adjoint of a list as that of the list x before its last item, or one at a place, of adjoint g, was popped."""
    if _is_zero(x):  # an adjoint without contributions, which stays one
        return 0.0
    at = at % len(x)
    rest = _blank([*x[:at], *x[at + 1 :]]) if _is_zero(b) else b
    return [*rest[:at], full(g, x[at]), *rest[at:]]


def spread(g: Any, items: Any) -> Any:
    """The adjoint of the items of sum(items)."""
    if isinstance(items, (tuple, list)):
        return _sequence(items, [unbroadcast(g, one) for one in items])
    return full(g, items) if _shape(g) == () else _lib(items).stack([g] * len(items))


def gathered(b: Any, items: Any) -> Any:
    """The adjoint of g in spread(g, items)."""
    total: Any = 0.0
    for one in b:
        total = total + one
    return total


def unlisted(g: Any, items: Any) -> Any:
    """The adjoint of nested lists of numbers and arrays when g is that of an array made of them."""
    if isinstance(items, (tuple, list)):
        return _sequence(items, [unlisted(g[k], one) for k, one in enumerate(items)])
    return g


def floating(b: Any, y: Any) -> Any:
    """b, an adjoint or a tangent of y or of what y was converted from.

    Raises:
        DerivativeError: y was converted to integers, booleans or complex numbers.
    """
    differentiable(y, "what an array was converted to")
    return b


def listed(b: Any, items: Any) -> Any:
    """An array of nested lists."""
    if not isinstance(items, (tuple, list)):
        return b
    parts = [listed(full(one, item), item) for one, item in zip(b, items, strict=True)]
    lib = _lib(*parts)
    return lib.stack([lib.as_tensor(p) if lib is torch else np.asarray(p) for p in parts])


# ---- broadcasting and reductions


def unbroadcast(g: Any, x: Any) -> Any:
    """g summed over the axes along which x was broadcast: an adjoint of x."""
    if isinstance(g, float):
        if isinstance(x, (tuple, list, dict)):
            raise DerivativeError(f"arithmetic on {_said(x)} has no derivative here; write it by its items")
        return g
    if isinstance(x, (float, int)):
        return g if g.ndim == 0 else g.sum()[()]
    if isinstance(x, (tuple, list, dict)) or isinstance(g, (tuple, list, dict)):
        raise DerivativeError(f"arithmetic on {_said(x)} has no derivative here; write it by its items")
    shape = x.shape
    if g.shape == shape:
        return g
    if g.ndim == 0:
        return g
    extra = g.ndim - len(shape)
    if extra < 0:
        return g  # still without the shape of its result
    if extra > 0:
        g = g.sum(tuple(range(extra)))
    axes = tuple(k for k, size in enumerate(shape) if size == 1 and g.shape[k] != 1)
    if axes:
        g = g.sum(axes, keepdims=True)
    return g


def unbroadcast_any(g: Any, x: Any) -> Any:
    """g as an adjoint of x, an array or a structure: summed where x was a number for a whole."""
    if _is_zero(g):
        return 0.0
    if isinstance(g, (tuple, list)):
        if isinstance(x, (tuple, list)):
            return _sequence(x, [unbroadcast_any(one, other) for one, other in zip(g, x, strict=True)])
        return 0.0  # x was the number 0.0 in the place of a structure, a constant
    if isinstance(g, dict):
        return {k: unbroadcast_any(g.get(k, 0.0), v) for k, v in x.items()} if isinstance(x, dict) else 0.0
    return unbroadcast(g, x)


def unpacked(b: Any, items: Any) -> Any:
    """The adjoints of items when b is that of packed(items, x)."""
    return tuple(unbroadcast_any(b[k], one) for k, one in enumerate(items))


def stored_back(g: Any, i: Any, x: Any, b: Any) -> Any:
    """The adjoint of b when g is that of stored(b, i, x, v)."""
    if _is_array(x):
        placed_ = zeros_like(x)
        placed_[i] = g
        return placed_
    return add_at(zeros_like(b), i, g, b)


def broadcast(b: Any, x: Any) -> Any:
    """b with the shape of x, of which it is a part."""
    if _shape(b) == _shape(x):
        return b
    lib = _lib(b, x)
    return (torch.as_tensor(b) if lib is torch else np.asarray(b)) + zeros_like(x)


def expand(g: Any, x: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """The adjoint of x when g is that of x.sum(axis, keepdims)."""
    if axis is None and type(x) is np.ndarray and isinstance(g, float) and x.dtype.kind == "f":
        found = np.empty_like(x)
        found.fill(g)
        return found
    if isinstance(x, (tuple, list)):
        return unlisted(expand(g, _array(x), axis, keepdims), x)
    if isinstance(g, tuple):
        raise DerivativeError("max and min with dim give a tuple in torch; use amax and amin")
    if not _is_array(x):
        return g if _is_array(x) or _shape(g) == () else g.reshape(())[()]
    if axis is not None and not keepdims and _shape(g) != ():
        for a in _axes(axis, x.ndim):
            g = g[(slice(None),) * a + (None,)]
    elif _shape(g) != () and g.ndim != x.ndim:
        g = g.reshape((1,) * x.ndim)
    return full(g, x) if _shape(g) == () else broadcast(g, x)


def total(b: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """Sum, of numpy or torch."""
    b = _array(b)
    if not _is_array(b):
        return b
    if isinstance(b, torch.Tensor):
        return b.sum(_axes(axis, b.ndim), keepdim=bool(keepdims)) if b.ndim else b
    return b.sum(axis=tuple(axis) if isinstance(axis, list) else axis, keepdims=bool(keepdims))


def count(x: Any, axis: Any = None) -> float:
    """How many numbers one of x's reduction over axis is made of.

    Raises:
        DerivativeError: the axis is a bool, which torch takes for another argument.
    """
    if isinstance(axis, bool):
        raise DerivativeError(f"{axis} is in the place of an axis; name the argument that it is")
    shape = _shape(_array(x))
    return float(np.prod([shape[a] for a in _axes(axis, len(shape))]))


def among(x: Any, y: Any, axis: Any = None, keepdims: Any = False) -> Any:
    """1 where x is the extreme y of its reduction, shared equally where several are."""
    if isinstance(y, tuple):
        raise DerivativeError("max and min with dim give a tuple in torch; use amax and amin")
    _no_list(x)
    where_ = x == expand(y, x, axis, keepdims)
    ones = where_.astype(x.dtype) if isinstance(x, np.ndarray) else where_.to(x.dtype) if _is_array(x) else 1.0
    return ones / expand(total(ones, axis, keepdims), x, axis, keepdims) if _is_array(x) else 1.0


def others(x: Any, axis: Any = None) -> Any:
    """Of each number of x the product of the others along axis, without dividing: some may be 0."""
    _no_list(x)
    if not _is_array(x) or x.ndim == 0:
        return 1.0
    lib = _lib(x)
    flat, unflat = _reduced_last(x, axis)
    ones = lib.ones_like(flat[..., :1])
    before = lib.cumprod(_joined(lib, [ones, flat[..., :-1]]), -1)
    back = lib.cumprod(_joined(lib, [ones, lib.flip(flat, (-1,))[..., :-1]]), -1)
    return unflat(before * lib.flip(back, (-1,)))


def _reduced_last(x: Any, axis: Any) -> tuple[Any, Callable[[Any], Any]]:
    """x with the axes of a reduction as its last one, and how an array of that form gets x's."""
    axes = _axes(axis, x.ndim)
    last = tuple(range(x.ndim - len(axes), x.ndim))
    turned = moved(x, axes, last)
    flat = turned.reshape((*turned.shape[: x.ndim - len(axes)], -1))
    return flat, lambda found: moved(found.reshape(turned.shape), last, axes)


def _no_list(x: Any) -> None:
    if isinstance(x, (tuple, list)):
        raise DerivativeError("a list is taken for an array, which has no derivative here; write np.array(...) of it")


def _joined(lib: Any, parts: list[Any]) -> Any:
    return lib.cat(parts, -1) if lib is torch else np.concatenate(parts, -1)


def cumulated(g: Any, axis: Any, x: Any) -> Any:
    """The adjoint of x when g is that of cumsum(x, axis)."""
    lib = _lib(g)
    if axis is None:
        return lib.flip(lib.cumsum(lib.flip(g, (0,)), 0), (0,)).reshape(_shape(x))
    return lib.flip(lib.cumsum(lib.flip(g, (axis,)), axis), (axis,))


def cumsum(x: Any, axis: Any = None) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.cumsum(x, axis)
    return np.cumsum(x, axis)


# ---- shapes


def reshape_like(g: Any, x: Any) -> Any:
    if _is_array(x):
        if isinstance(g, float):
            return full(g, x)
        return g if g.shape == x.shape else g.reshape(x.shape)
    return g.reshape(())[()] if _is_array(g) else g


def reordered(g: Any, x: Any, order: Any) -> Any:
    """g in the shape of x, in numpy's order of items; an integer is the first axis that torch flattens.

    Raises:
        DerivativeError: the order depends on how x lies in memory.
    """
    if order == "F":
        return g.reshape(_shape(x), order="F") if _is_array(x) else reshape_like(g, x)
    if isinstance(order, str) and order != "C":
        raise DerivativeError(f"order={order!r} has no derivative here; write 'C' or 'F'")
    return reshape_like(g, x)


def without_imaginary(b: Any, x: Any) -> Any:
    """b, an adjoint or a tangent of the real part of x, or of its absolute value.

    Raises:
        DerivativeError: x is complex: derivatives are of real numbers alone.
    """
    if _is_complex(x):
        raise DerivativeError("complex numbers have no derivative here; write their real and imaginary parts")
    return b


def transposed(x: Any, axes: Any = None) -> Any:
    """numpy's transpose, for torch too."""
    axes = tuple(reversed(range(x.ndim))) if axes is None else tuple(axes)
    return x.permute(axes) if isinstance(x, torch.Tensor) else x.transpose(axes)


def untransposed(g: Any, axes: Any = None) -> Any:
    """The adjoint of x when g is that of transposed(x, axes)."""
    if axes is None:
        return transposed(g)
    order = tuple(int(k) for k in np.argsort([a % g.ndim for a in axes]))
    return transposed(g, order)


def transposed_by_method(g: Any, axes: tuple[Any, ...]) -> Any:
    """The adjoint of x when g is that of x.transpose(*axes): two axes that are swapped in torch, an order in numpy."""
    if isinstance(g, torch.Tensor):
        return g.transpose(*axes)
    if axes and isinstance(axes[0], (tuple, list)):
        axes = tuple(axes[0])
    return untransposed(g, axes if axes and axes[0] is not None else None)


def swapped(x: Any, a: int = -1, b: int = -2) -> Any:
    if type(x) is np.ndarray:
        return x.swapaxes(a, b)
    return _lib(x).swapaxes(x, a, b)


def moved(x: Any, source: Any, destination: Any) -> Any:
    return _lib(x).moveaxis(x, source, destination)


def flipped(x: Any, axis: Any = None) -> Any:
    return _lib(x).flip(x, _axes(axis, x.ndim))


def rolled(x: Any, shift: Any, axis: Any = None) -> Any:
    return torch.roll(x, shift, axis) if isinstance(x, torch.Tensor) else np.roll(x, shift, axis)


def unrolled(g: Any, shift: Any, axis: Any = None) -> Any:
    back = tuple(-s for s in shift) if isinstance(shift, (tuple, list)) else -shift
    return rolled(g, back, axis)


def split_back(g: Any, parts: Any, axis: Any = 0) -> Any:
    """The adjoint of a sequence of arrays when g is that of their concatenation."""
    if axis is None:
        raise DerivativeError("concatenate with axis=None has no derivative here; ravel the arrays first")
    if not isinstance(parts, (tuple, list)):
        return g.reshape(parts.shape)
    found, start = [], 0
    for one in parts:
        stop = start + _array(one).shape[axis]
        found.append(unlisted(g[(slice(None),) * (int(axis) % g.ndim) + (slice(start, stop),)], one))
        start = stop
    return _sequence(parts, found)


def joined(parts: Any, axis: Any = 0) -> Any:
    lib = _lib(*parts)
    return torch.cat(tuple(parts), axis) if lib is torch else np.concatenate(parts, axis)


def unstack(g: Any, parts: Any, axis: Any = 0) -> Any:
    """The adjoint of a sequence of arrays when g is that of their stack."""
    taken = [g[(slice(None),) * (int(axis) % g.ndim) + (k,)] for k in range(len(parts))]
    taken = [unlisted(b, one) for b, one in zip(taken, parts, strict=True)]
    return _sequence(parts, taken) if isinstance(parts, (tuple, list)) else _lib(g).stack(taken)


def stacked(parts: Any, axis: Any = 0) -> Any:
    lib = _lib(*parts)
    return lib.stack(list(parts), axis) if lib is np else torch.stack([torch.as_tensor(p) for p in parts], axis)


def untile(g: Any, x: Any, reps: Any) -> Any:
    """The adjoint of x when g is that of tile(x, reps)."""
    reps = tuple(reps) if isinstance(reps, (tuple, list)) else (reps,)
    shape = _shape(x)
    width = max(len(reps), len(shape))
    reps, shape = (1,) * (width - len(reps)) + reps, (1,) * (width - len(shape)) + shape
    blocks = g.reshape([n for pair in zip(reps, shape, strict=True) for n in pair])
    return reshape_like(blocks.sum(tuple(range(0, 2 * width, 2))), x)


def unrepeat(g: Any, x: Any, repeats: Any, axis: Any = None) -> Any:
    """The adjoint of x when g is that of numpy's repeat(x, repeats, axis)."""
    size = _size(x) if axis is None else x.shape[axis]
    index = np.repeat(np.arange(size), repeats)
    if axis is None:
        return reshape_like(placed(g, index, _row(zeros_like(x))), x)
    place = (slice(None),) * (int(axis) % x.ndim) + (index,)
    return add_at(0.0, place, g, x)


def sorted_back(g: Any, x: Any, axis: Any = -1) -> Any:
    """The adjoint of x when g is that of sort(x, axis)."""
    found = along(g, np.argsort(np.argsort(x, axis, kind="stable"), axis, kind="stable"), axis)
    return reshape_like(found, x) if axis is None else found


def sorted_along(d: Any, x: Any, axis: Any = -1) -> Any:
    """d in the order of x."""
    return along(d, np.argsort(x, axis, kind="stable"), axis)


def along(x: Any, index: Any, axis: Any) -> Any:
    if axis is None:
        return x.reshape(-1)[index]
    return np.take_along_axis(x, index, axis)


def tiled(x: Any, reps: Any) -> Any:
    return _lib(x).tile(x, reps)


def diagonal(x: Any, k: Any = 0) -> Any:
    return _lib(x).diag(x, k)


def expand_matrix(x: Any) -> Any:
    return x[..., None, None] if _is_array(x) else x


def others_back(g: Any, x: Any, axis: Any = None) -> Any:
    """The adjoint of x when g is that of others(x, axis): also the tangent, since the second derivatives are symmetric.

    sum_j g_j prod_{l not in (j, k)} x_l, as the derivative of a product in which one factor is varied after the other.
    """
    if not _is_array(x):
        return 0.0
    lib = _lib(x)
    flat, unflat = _reduced_last(x, axis)
    slopes, _ = _reduced_last(g, axis)
    rows = []
    for k in range(flat.shape[-1]):
        rest = _joined(lib, [flat[..., :k], flat[..., k + 1 :]])
        of_rest = _joined(lib, [slopes[..., :k], slopes[..., k + 1 :]])
        rows.append((of_rest * others(rest, -1)).sum(-1))
    return unflat(lib.stack(rows, -1))


def traced(g: Any, x: Any) -> Any:
    """The adjoint of a matrix when g is that of its trace."""
    lib = _lib(x)
    eye = np.eye(*x.shape[:2], dtype=x.dtype) if lib is np else torch.eye(*x.shape, dtype=x.dtype, device=x.device)
    return eye.reshape(eye.shape + (1,) * (x.ndim - 2)) * g


def trace(x: Any) -> Any:
    return x.trace() if x.ndim == 2 or isinstance(x, np.ndarray) else x


def diagonal_back(g: Any, x: Any, k: Any = 0) -> Any:
    """The adjoint of x when g is that of diag(x, k)."""
    if x.ndim == 1:
        return _lib(g).diag(g, k)
    found = zeros_like(x)
    rows = np.arange(_shape(g)[0])
    found[rows + max(0, -k), rows + max(0, k)] = g
    return found


# ---- products


def _of_arrays(f: Callable[..., Any]) -> Callable[..., Any]:
    """A product that takes lists of numbers and numbers for arrays."""

    @functools.wraps(f)
    def product(x: Any, z: Any) -> Any:
        return f(_array(x), _array(z))

    return product


def _adjoint_of_arrays(of_vector: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The adjoint of an argument of such a product, with the structure of the argument.

    Args:
        of_vector: the same for a matrix x and a vector z of numpy, of which most products are.
    """

    def decorated(f: Callable[..., Any]) -> Callable[..., Any]:
        left = f.__name__.endswith("_left")

        @functools.wraps(f)
        def product(g: Any, x: Any, z: Any) -> Any:
            if type(x) is np.ndarray and type(z) is np.ndarray:
                if of_vector is not None and x.ndim == 2 and z.ndim == 1:
                    return of_vector(g, x, z)
                return f(g, x, z)
            return unlisted(f(_array(g), _array(x), _array(z)), x if left else z)

        return product

    return decorated


@_of_arrays
def matmul(x: Any, z: Any) -> Any:
    return x @ z


@_adjoint_of_arrays(lambda g, x, z: np.dot(g[:, None], z[None]))
def matmul_left(g: Any, x: Any, z: Any) -> Any:
    """The adjoint of x when g is that of x @ z."""
    if z.ndim == 1:
        return unbroadcast(g * z if _shape(g) == () else g[..., None] * z, x)
    if x.ndim == 1:
        return unbroadcast((g[..., None, :] @ swapped(z))[..., 0, :], x)
    return unbroadcast(g @ swapped(z), x)


@_adjoint_of_arrays(lambda g, x, z: np.dot(g, x))
def matmul_right(g: Any, x: Any, z: Any) -> Any:
    """The adjoint of z when g is that of x @ z."""
    if x.ndim == 1:
        return unbroadcast(g * x if z.ndim == 1 else x[:, None] * g[..., None, :], z)
    if z.ndim == 1:
        return unbroadcast((swapped(x) @ g[..., None])[..., 0], z)
    return unbroadcast(swapped(x) @ g, z)


def _contracted(x: Any, z: Any) -> Any:
    return ([x.ndim - 1], [max(z.ndim - 2, 0)])


@_of_arrays
def dot(x: Any, z: Any) -> Any:
    """numpy's dot."""
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return x * z
    return x @ z if x.ndim <= 2 and z.ndim <= 2 else tensordot(x, z, _contracted(x, z))


@_adjoint_of_arrays(lambda g, x, z: np.dot(g[:, None], z[None]))
def dot_left(g: Any, x: Any, z: Any) -> Any:
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return unbroadcast(g * z, x)
    if x.ndim <= 2 and z.ndim <= 2:
        return matmul_left(g, x, z)
    return tensordot_left(g, x, z, _contracted(x, z))


@_adjoint_of_arrays(lambda g, x, z: np.dot(g, x))
def dot_right(g: Any, x: Any, z: Any) -> Any:
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return unbroadcast(g * x, z)
    if x.ndim <= 2 and z.ndim <= 2:
        return matmul_right(g, x, z)
    return tensordot_right(g, x, z, _contracted(x, z))


@_of_arrays
def inner(x: Any, z: Any) -> Any:
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return x * z
    return tensordot(x, z, ([x.ndim - 1], [z.ndim - 1]))


@_adjoint_of_arrays()
def inner_left(g: Any, x: Any, z: Any) -> Any:
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return unbroadcast(g * z, x)
    return tensordot_left(g, x, z, ([x.ndim - 1], [z.ndim - 1]))


@_adjoint_of_arrays()
def inner_right(g: Any, x: Any, z: Any) -> Any:
    if not getattr(x, "ndim", 0) or not getattr(z, "ndim", 0):
        return unbroadcast(g * x, z)
    return tensordot_right(g, x, z, ([x.ndim - 1], [z.ndim - 1]))


def tensordot(x: Any, z: Any, axes: Any = 2) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.tensordot(x, z, axes)
    return np.tensordot(x, z, axes)


def _split_axes(x: Any, z: Any, axes: Any) -> tuple[list[int], list[int], list[int], list[int]]:
    if isinstance(axes, int):
        axes = (list(range(x.ndim - axes, x.ndim)), list(range(axes)))
    mine, its = ([a] if isinstance(a, int) else list(a) for a in axes)
    mine, its = [a % x.ndim for a in mine], [a % z.ndim for a in its]
    return mine, its, [a for a in range(x.ndim) if a not in mine], [a for a in range(z.ndim) if a not in its]


def tensordot_left(g: Any, x: Any, z: Any, axes: Any = 2) -> Any:
    """The adjoint of x when g is that of tensordot(x, z, axes)."""
    mine, its, free, rest = _split_axes(x, z, axes)
    found = tensordot(g, z, (list(range(len(free), len(free) + len(rest))), rest)) if rest else _outer(g, z)
    order = free + [mine[its.index(a)] for a in sorted(its)]
    return untransposed(found, order) if order else found


def tensordot_right(g: Any, x: Any, z: Any, axes: Any = 2) -> Any:
    """The adjoint of z when g is that of tensordot(x, z, axes)."""
    mine, its, free, rest = _split_axes(x, z, axes)
    found = tensordot(x, g, (free, list(range(len(free))))) if free else _outer(x, g)
    order = [its[mine.index(a)] for a in sorted(mine)] + rest
    return untransposed(found, order) if order else found


def _outer(x: Any, z: Any) -> Any:
    return tensordot(_lib(x, z).asarray(x), _lib(x, z).asarray(z), 0)


@_of_arrays
def outer(x: Any, z: Any) -> Any:
    return _row(x)[:, None] * _row(z)


@_adjoint_of_arrays()
def outer_left(g: Any, x: Any, z: Any) -> Any:
    return reshape_like(g @ _row(z), x)


@_adjoint_of_arrays()
def outer_right(g: Any, x: Any, z: Any) -> Any:
    return reshape_like(_row(x) @ g, z)


def _row(x: Any) -> Any:
    return (x if _is_array(x) else np.asarray(x)).reshape(-1)


def cofactors(x: Any) -> Any:
    """The slope of the determinant, det(x) x^-T, of singular matrices too: by products of other singular values."""
    linalg = _lib(x).linalg
    left, values, right = linalg.svd(x)
    return (linalg.det(left) * linalg.det(right))[..., None, None] * (left @ (others(values, -1)[..., None] * right))


def inverse_transposed(x: Any) -> Any:
    return swapped(_lib(x).linalg.inv(x))


# ---- functions that numpy, torch and Python's numbers have apart


def log(x: Any) -> Any:
    return torch.log(x) if isinstance(x, torch.Tensor) else np.log(x)


def where(condition: Any, x: Any, z: Any) -> Any:
    return torch.where(condition, x, z) if isinstance(condition, torch.Tensor) else np.where(condition, x, z)[()]


def power_slope(x: Any, n: Any) -> Any:
    """d x**n / dx, with n x^(n - 1) = 0 where n is 0."""
    if isinstance(n, (int, float)):
        return 0.0 if n == 0 else n * x ** (n - 1)
    safe = where(n == 0, n + 1.0, n)
    return where(n == 0, 0.0 * safe, n * x ** (safe - 1.0))


def integral(n: Any) -> bool:
    """Whether a number or an array is of integers, in which nothing has a slope."""
    if isinstance(n, torch.Tensor):
        return not n.is_floating_point()
    return isinstance(n, int) or (hasattr(n, "dtype") and n.dtype.kind in "iub")


def power_log(x: Any, n: Any) -> Any:
    """d x**n / dn, which is 0 at x = 0 where n > 0, and of integers n, as x may be negative."""
    if integral(n):
        return 0.0
    if isinstance(x, (int, float)) and not _is_array(n):
        return 0.0 if x == 0 and n > 0 else x**n * log(x)
    at_zero = (x == 0) & (n > 0)
    safe = where(at_zero, x * 0.0 + 1.0, x)
    return where(at_zero, 0.0 * safe * n, safe**n * log(safe))


def larger(x: Any, z: Any) -> Any:
    """The partial derivative of max(x, z) in x: 1, 0, or 1/2 where both are equal; 1 where z is no number, of fmax."""
    if _is_array(x) or _is_array(z):
        lib = _lib(x, z)
        one = lib.as_tensor(x > z) if lib is torch else np.asarray(x > z)
        equal = x == z
        return one + 0.5 * equal + 1.0 * (z != z)
    return float(x > z) + 0.5 * float(x == z) + float(z != z)


def within(x: Any, low: Any, high: Any) -> Any:
    """1 where low <= x <= high, 0 elsewhere; either bound may be None."""
    inside: Any = x == x
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return 1.0 * inside


def sign(x: Any) -> Any:
    """The slope of the absolute value.

    Raises:
        DerivativeError: x is complex.
    """
    without_imaginary(0.0, x)
    return torch.sign(x) if isinstance(x, torch.Tensor) else np.sign(x)


def matched(condition: Any, g: Any, x: Any) -> Any:
    """g where the condition holds, summed to x's shape."""
    return unbroadcast(g * condition, x)


# ---- gradient surgery


def stop_gradient(x: Any) -> Any:
    """x, as a constant: no derivative goes through."""
    return x


@contextlib.contextmanager
def insert_grad_of(x: Any) -> Iterator[Any]:
    """A block that runs in the backward pass, where the name it is bound to is the adjoint of x.

        with insert_grad_of(x) as dx:
            dx = np.clip(dx, -1.0, 1.0)

    What dx is at the end of the block goes on as the adjoint of x: an assignment replaces it, and a block without one
    looks on. Where the function is called and not its derivative, the block runs with a zero.

    Args:
        x: a variable of the function, through which a derivative flows.
    """
    yield zeros_like(x)


Function = Callable[..., Any]


def keys(x: Any) -> list[Any]:
    return list(x)


def sequence(x: Any) -> Any:
    """x, over whose items a loop goes by number.

    Raises:
        DerivativeError: it is a dict, whose keys a loop gives.
    """
    if isinstance(x, dict):
        raise DerivativeError("a loop over a dict gives its keys; write for key in list(d.keys()), or d.items()")
    return x
