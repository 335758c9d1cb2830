"""Derivatives of numpy's, torch's and math's functions, of operators and methods, and of what derived source calls.

One line serves each library that has the function in that meaning. In the texts y is the result, g its adjoint, d_x the
tangent of x, m the module of the function called, rt this library's runtime.
"""

from __future__ import annotations

import ast
import math
from typing import Any

import numpy as np
import torch

from dam.derive import runtime as rt
from dam.derive import written
from dam.derive.primitives import (
    ATTRIBUTES,
    FUNCTIONS,
    METHODS,
    METHODS_WITHOUT_SLOPE,
    OPERATORS,
    WITHOUT_SLOPE,
    WRITTEN,
    WRITTEN_METHODS,
    Primitive,
    key,
    signature,
)

MODULES = {"np": np, "torch": torch, "math": math}


def _entry(
    name: str, parameters: str, module: str, shape: str | None = None, view: bool = False, **texts: Any
) -> Primitive:
    return Primitive(name, signature(parameters), module, shape=shape, view=view, **texts)


def _everywhere(
    names: str, parameters: str, *, modules: str = "np torch math", method: bool = False, **entry: Any
) -> None:
    """The same entry for functions of these names in every module that has them."""
    for name in names.split():
        for module in modules.split():
            found: Any = MODULES[module]
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is not None:
                FUNCTIONS.setdefault(key(found), _entry(f"{module}.{name}", parameters, module, **entry))
        if method:
            METHODS.setdefault(name, _entry("", parameters, "torch", **entry))


# ---- elementwise, of one argument

ONE = {
    "sin": "m.cos(x)",
    "cos": "-m.sin(x)",
    "tan": "1.0 + y ** 2",
    "arcsin asin": "1.0 / m.sqrt(1.0 - x ** 2)",
    "arccos acos": "-1.0 / m.sqrt(1.0 - x ** 2)",
    "arctan atan": "1.0 / (1.0 + x ** 2)",
    "sinh": "m.cosh(x)",
    "cosh": "m.sinh(x)",
    "tanh": "1.0 - y ** 2",
    "arcsinh asinh": "1.0 / m.sqrt(x ** 2 + 1.0)",
    "arccosh acosh": "1.0 / m.sqrt(x ** 2 - 1.0)",
    "arctanh atanh": "1.0 / (1.0 - x ** 2)",
    "exp": "y",
    "exp2": "y * 0.6931471805599453",
    "expm1": "y + 1.0",
    "log": "1.0 / x",
    "log2": "1.4426950408889634 / x",
    "log10": "0.4342944819032518 / x",
    "log1p": "1.0 / (1.0 + x)",
    "sqrt": "0.5 / y",
    "rsqrt": "-0.5 * y / x",
    "cbrt": "y / (3.0 * x)",
    "square": "2.0 * x",
    "reciprocal": "-y ** 2",
    "negative neg": "-1.0",
    "positive": "1.0",
    "abs absolute fabs": "rt.sign(x)",
    "sigmoid": "y * (1.0 - y)",
    "erf": "1.1283791670955126 * m.exp(-x ** 2)",
    "deg2rad radians": "0.017453292519943295",
    "rad2deg degrees": "57.29577951308232",
    "relu": "1.0 * (x > 0)",
}
for _names, _partial in ONE.items():
    # torch.positive gives its very argument.
    _everywhere(_names, "x", method=True, partials={"x": _partial}, shape="same", view=_names == "positive")

_everywhere(
    "nan_to_num",
    "x",
    modules="np torch",
    method=True,
    # What is put in the place of an infinity is so large that an adjoint may be infinite, of which 0 times is none.
    reverse={"x": "rt.where(m.isfinite(x), g, rt.zeros_like(x))"},
    forward={"x": "rt.where(m.isfinite(x), d_x, rt.zeros_like(x))"},
    shape="same",
)

# ---- elementwise, of two or three

TWO = {
    "add": ("1.0", "1.0"),
    "subtract sub": ("1.0", "-1.0"),
    "multiply mul": ("z", "x"),
    "divide true_divide div": ("1.0 / z", "-y / z"),
    "power pow float_power": ("rt.power_slope(x, z)", "rt.power_log(x, z)"),
    "maximum fmax": ("rt.larger(x, z)", "rt.larger(z, x)"),
    "minimum": ("rt.larger(z, x)", "rt.larger(x, z)"),
    "fmin": ("rt.larger(-x, -z)", "rt.larger(-z, -x)"),
    "arctan2 atan2": ("z / (x ** 2 + z ** 2)", "-x / (x ** 2 + z ** 2)"),
    "hypot": ("x / y", "z / y"),
    "logaddexp": ("m.exp(x - y)", "m.exp(z - y)"),
    "mod remainder": ("1.0", "-m.floor_divide(x, z)"),
    "fmod": ("1.0", "-m.trunc(x / z)"),
    "copysign": ("rt.sign(x) * rt.sign(y)", "0.0"),
}
for _names, (_left, _right) in TWO.items():
    _everywhere(_names, "x, z", method=True, partials={"x": _left, "z": _right})
_BINARY: dict[Any, tuple[str, str]] = {
    ast.Add: TWO["add"],
    ast.Sub: TWO["subtract sub"],
    ast.Mult: TWO["multiply mul"],
    ast.Div: TWO["divide true_divide div"],
    ast.Pow: TWO["power pow float_power"],
    ast.Mod: ("1.0", "-(x // z)"),
}
for _operator, (_left, _right) in _BINARY.items():
    OPERATORS[_operator] = _entry("", "x, z", "np", partials={"x": _left, "z": _right})
OPERATORS[ast.USub] = _entry("", "x", "np", partials={"x": "-1.0"}, shape="same")
OPERATORS[ast.UAdd] = _entry("", "x", "np", partials={"x": "1.0"}, shape="same", view=True)
_everywhere(
    "where",
    "c, x, z",
    modules="np",
    reverse={"x": "rt.unbroadcast(np.where(c, g, 0.0), x)", "z": "rt.unbroadcast(np.where(c, 0.0, g), z)"},
    forward={"x": "np.where(c, d_x, 0.0)", "z": "np.where(c, 0.0, d_z)"},
)
_everywhere(
    "where",
    "c, x, z",
    modules="torch",
    reverse={"x": "rt.unbroadcast(torch.where(c, g, 0.0), x)", "z": "rt.unbroadcast(torch.where(c, 0.0, g), z)"},
    forward={"x": "torch.where(c, d_x, 0.0)", "z": "torch.where(c, 0.0, d_z)"},
)
FUNCTIONS[key(rt.where)] = _entry(
    "rt.where",
    "c, x, z",
    "rt",
    reverse={"x": "rt.unbroadcast(rt.where(c, g, 0.0 * g), x)", "z": "rt.unbroadcast(rt.where(c, 0.0 * g, g), z)"},
    forward={"x": "rt.where(c, d_x, 0.0 * y)", "z": "rt.where(c, 0.0 * y, d_z)"},
)
_everywhere("heaviside", "x, z", modules="np torch", partials={"x": "0.0", "z": "1.0 * (x == 0)"})
_everywhere(
    "clip clamp", "x, a_min=None, a_max=None", modules="np", method=True, partials={"x": "rt.within(x, a_min, a_max)"}
)
_everywhere("clamp clip", "x, min=None, max=None", modules="torch", partials={"x": "rt.within(x, min, max)"})
METHODS["clip"] = _entry("", "x, min=None, max=None", "np", partials={"x": "rt.within(x, min, max)"})
METHODS["clamp"] = METHODS["clip"]
for _function in (float, np.float64, np.float32):
    FUNCTIONS[key(_function)] = _entry(
        "float" if _function is float else f"np.{_function.__name__}",
        "x",
        "np",
        reverse={"x": "rt.reshape_like(g, x)"},
        forward={"x": "rt.reshape_like(d_x, y)"},
        view=True,
    )
FUNCTIONS[key(abs)] = _entry("abs", "x", "np", partials={"x": "rt.sign(x)"}, shape="same")
FUNCTIONS[key(pow)] = _entry(
    "pow", "x, z", "np", partials={"x": TWO["power pow float_power"][0], "z": TWO["power pow float_power"][1]}
)
_LARGER, _SMALLER = {"x": "rt.larger(x, z)", "z": "rt.larger(z, x)"}, {"x": "rt.larger(z, x)", "z": "rt.larger(x, z)"}
FUNCTIONS[key(max)] = _entry("max", "x, z", "np", partials=_LARGER, view=True)
FUNCTIONS[key(min)] = _entry("min", "x, z", "np", partials=_SMALLER, view=True)

# ---- reductions

_SUM: dict[str, Any] = {
    "reverse": {"x": "rt.expand(g, x, axis, keepdims)"},
    "forward": {"x": "rt.total(d_x, axis, keepdims)"},
}
_MEAN: dict[str, Any] = {
    "reverse": {"x": "rt.expand(g / rt.count(x, axis), x, axis, keepdims)"},
    "forward": {"x": "rt.total(d_x, axis, keepdims) / rt.count(x, axis)"},
}
_EXTREME: dict[str, Any] = {
    "reverse": {"x": "rt.expand(g, x, axis, keepdims) * rt.among(x, y, axis, keepdims)"},
    "forward": {"x": "rt.total(d_x * rt.among(x, y, axis, keepdims), axis, keepdims)"},
}
_PRODUCT: dict[str, Any] = {
    "reverse": {"x": "rt.expand(g, x, axis, keepdims) * rt.others(x, axis)"},
    "forward": {"x": "rt.total(d_x * rt.others(x, axis), axis, keepdims)"},
}
_REDUCED = "x, axis=None, keepdims=False"
for _names, _texts in {"sum": _SUM, "mean": _MEAN, "amax amin max min": _EXTREME, "prod": _PRODUCT}.items():
    # The third argument of numpy's is a dtype.
    _everywhere(_names, "x, axis=None, *, keepdims=False", modules="np", **_texts)
    _everywhere(_names.removesuffix(" max min"), _REDUCED, modules="torch", **_texts)
# With an axis torch's give a tuple.
_EXTREME_OF_ALL: dict[str, Any] = {
    mode: {"x": texts["x"].replace("axis, keepdims", "None, False")} for mode, texts in _EXTREME.items()
}
_everywhere("max min", "x", modules="torch", **_EXTREME_OF_ALL)
for _name, _texts in {
    "sum": _SUM,
    "mean": _MEAN,
    "max": _EXTREME,
    "min": _EXTREME,
    "amax": _EXTREME,
    "amin": _EXTREME,
    "prod": _PRODUCT,
}.items():
    METHODS[_name] = _entry("", _REDUCED, "np", **_texts)
_everywhere(
    "cumsum",
    "x, axis=None",
    modules="np torch",
    method=True,
    reverse={"x": "rt.cumulated(g, axis, x)"},
    forward={"x": "rt.cumsum(d_x, axis)"},
)
_everywhere(
    "trace",
    "x",
    modules="np torch",
    method=True,
    reverse={"x": "rt.traced(g, x)"},
    forward={"x": "rt.trace(d_x)"},
    shape=None,
)
FUNCTIONS[key(sum)] = _entry("sum", "l", "np", reverse={"l": "rt.spread(g, l)"}, forward={"l": "sum(d_l)"})

# ---- shapes: the same memory in another form

_LIKE: dict[str, Any] = {"reverse": {"x": "rt.reshape_like(g, x)"}, "view": True}
_ORDERED: dict[str, Any] = {
    "reverse": {"x": "rt.reordered(g, x, order)"},
    "forward": {"x": "rt.reordered(d_x, y, order)"},
    "view": True,
}
_everywhere("reshape", "x, shape, order='C'", modules="np", **_ORDERED)
_everywhere("ravel", "x, order='C'", modules="np", **_ORDERED)
_everywhere("ravel", "x", modules="torch", forward={"x": "torch.ravel(d_x)"}, **_LIKE)
for _name, _parameters, _text in (
    ("reshape", "x, shape", "m.reshape(d_x, shape)"),
    ("squeeze", "x, axis=None", "rt.reshape_like(d_x, y)"),
    ("expand_dims", "x, axis", "rt.reshape_like(d_x, y)"),
    ("unsqueeze", "x, axis", "rt.reshape_like(d_x, y)"),
    ("flatten", "x", "rt.reshape_like(d_x, y)"),
    ("atleast_1d", "x", "rt.reshape_like(d_x, y)"),
    ("atleast_2d", "x", "rt.reshape_like(d_x, y)"),
    ("atleast_3d", "x", "rt.reshape_like(d_x, y)"),
):
    _everywhere(_name, _parameters, modules="np torch", forward={"x": _text}, **_LIKE)
for _name in ("ravel", "flatten"):
    METHODS[_name] = _entry("", "x, order='C', end_dim=-1", "np", **_ORDERED)
for _name in ("reshape", "view", "squeeze", "unsqueeze"):
    METHODS[_name] = _entry("", "x, *shape", "np", forward={"x": "rt.reshape_like(d_x, y)"}, **_LIKE)
METHODS["item"] = _entry(
    "", "x", "np", reverse={"x": "rt.reshape_like(g, x)"}, forward={"x": "rt.reshape_like(d_x, y)"}
)
_SAME: dict[str, Any] = {"reverse": {"x": "g"}, "forward": {"x": "d_x"}}
_everywhere("copy clone", "x", modules="np torch", **_SAME, shape="same")
_everywhere("ascontiguousarray", "x", modules="np", **_SAME, view=True)
METHODS["astype"] = _entry("", "x, to", "np", reverse={"x": "rt.floating(g, y)"}, forward={"x": "rt.floating(d_x, y)"})
_REAL: dict[str, Any] = {
    "reverse": {"x": "rt.without_imaginary(g, x)"},
    "forward": {"x": "rt.without_imaginary(d_x, x)"},
}
_everywhere("real", "x", modules="np torch", **_REAL, shape="same", view=True)
for _name in ("copy", "clone", "contiguous", "double"):
    shallow = _name in ("copy", "clone")
    METHODS[_name] = _entry("", "x", "np", view=not shallow, shallow=shallow, shape="same", **_SAME)
_LISTED: dict[str, Any] = {
    "reverse": {"x": "rt.unlisted(rt.floating(g, y), x)"},
    "forward": {"x": "rt.listed(rt.floating(d_x, y), x)"},
}
_everywhere("array", "x, dtype=None", modules="np", **_LISTED)
_everywhere("asarray asanyarray", "x, dtype=None", modules="np", view=True, **_LISTED)
_everywhere("asarray as_tensor tensor", "x, dtype=None", modules="torch", view=True, **_LISTED)
_everywhere(
    "transpose",
    "x, axes=None",
    modules="np",
    view=True,
    reverse={"x": "rt.untransposed(g, axes)"},
    forward={"x": "rt.transposed(d_x, axes)"},
)
_everywhere(
    "permute",
    "x, axes",
    modules="torch",
    view=True,
    reverse={"x": "rt.untransposed(g, axes)"},
    forward={"x": "rt.transposed(d_x, axes)"},
)
METHODS["transpose"] = _entry(
    "",
    "x, *axes",
    "np",
    view=True,
    reverse={"x": "rt.transposed_by_method(g, axes)"},
    forward={"x": "d_x.transpose(*axes)"},
)
METHODS["permute"] = _entry(
    "",
    "x, *axes",
    "np",
    view=True,
    reverse={"x": "rt.untransposed(g, axes)"},
    forward={"x": "rt.transposed(d_x, axes)"},
)
_T: dict[str, Any] = {"reverse": {"x": "rt.transposed(g)"}, "forward": {"x": "rt.transposed(d_x)"}}
ATTRIBUTES["T"] = _entry("", "x", "np", view=True, **_T)
ATTRIBUTES["real"] = _entry("", "x", "np", view=True, **_REAL)
ATTRIBUTES["mT"] = _entry("", "x", "np", view=True, reverse={"x": "rt.swapped(g)"}, forward={"x": "rt.swapped(d_x)"})
_everywhere("t", "x", modules="torch", method=True, view=True, **_T)
_everywhere(
    "swapaxes",
    "x, a, b",
    modules="np torch",
    method=True,
    view=True,
    reverse={"x": "rt.swapped(g, a, b)"},
    forward={"x": "rt.swapped(d_x, a, b)"},
)
FUNCTIONS[key(torch.transpose)] = _entry(
    "torch.transpose",
    "x, dim0, dim1",
    "torch",
    view=True,
    reverse={"x": "rt.swapped(g, dim0, dim1)"},
    forward={"x": "rt.swapped(d_x, dim0, dim1)"},
)
_everywhere(
    "moveaxis movedim",
    "x, source, destination",
    modules="np torch",
    view=True,
    reverse={"x": "rt.moved(g, destination, source)"},
    forward={"x": "rt.moved(d_x, source, destination)"},
)
_everywhere(
    "broadcast_to",
    "x, shape",
    modules="np torch",
    view=True,
    reverse={"x": "rt.unbroadcast(g, x)"},
    forward={"x": "m.broadcast_to(d_x, shape)"},
)
_everywhere(
    "flip",
    "x, axis=None",
    modules="np torch",
    view=True,
    reverse={"x": "rt.flipped(g, axis)"},
    forward={"x": "rt.flipped(d_x, axis)"},
)
for _name, _axis in (("flipud", 0), ("fliplr", 1)):
    _everywhere(
        _name,
        "x",
        modules="np torch",
        view=True,
        reverse={"x": f"rt.flipped(g, {_axis})"},
        forward={"x": f"rt.flipped(d_x, {_axis})"},
    )
_everywhere(
    "roll",
    "x, shift, axis=None",
    modules="np torch",
    reverse={"x": "rt.unrolled(g, shift, axis)"},
    forward={"x": "rt.rolled(d_x, shift, axis)"},
)
for _name in ("tril", "triu"):
    _everywhere(_name, "x, k=0", modules="np", reverse={"x": f"np.{_name}(g, k)"}, forward={"x": f"np.{_name}(d_x, k)"})
    _everywhere(
        _name,
        "x, diagonal=0",
        modules="torch",
        reverse={"x": f"torch.{_name}(g, diagonal)"},
        forward={"x": f"torch.{_name}(d_x, diagonal)"},
    )
_everywhere(
    "diag",
    "x, k=0",
    modules="np torch",
    view=True,
    reverse={"x": "rt.diagonal_back(g, x, k)"},
    forward={"x": "m.diag(d_x, k)"},
)
_everywhere(
    "tile", "x, reps", modules="np torch", reverse={"x": "rt.untile(g, x, reps)"}, forward={"x": "m.tile(d_x, reps)"}
)
_everywhere(
    "repeat",
    "x, repeats, axis=None",
    modules="np",
    reverse={"x": "rt.unrepeat(g, x, repeats, axis)"},
    forward={"x": "np.repeat(d_x, repeats, axis)"},
)
_everywhere(
    "sort",
    "x, axis=-1",
    modules="np",
    reverse={"x": "rt.sorted_back(g, x, axis)"},
    forward={"x": "rt.sorted_along(d_x, x, axis)"},
)
_everywhere(
    "take",
    "x, indices",
    modules="np",
    reverse={"x": "rt.reshape_like(rt.placed(g, indices, np.ravel(x)), x)"},
    forward={"x": "np.take(d_x, indices)"},
)

_everywhere(
    "full",
    "shape, x, dtype=None",
    modules="np",
    reverse={"x": "rt.unbroadcast(rt.floating(g, y), x)"},
    forward={"x": "np.full(shape, rt.floating(d_x, y))"},
)
_everywhere(
    "bincount",
    "x, weights=None, minlength=0",
    modules="np torch",
    reverse={"weights": "g[x]"},
    forward={"weights": "m.bincount(x, d_weights, minlength)"},
)

# ---- several arrays in one

_JOINED: dict[str, Any] = {"reverse": {"l": "rt.split_back(g, l, axis)"}, "forward": {"l": "rt.joined(d_l, axis)"}}
_everywhere("concatenate cat concat", "l, axis=0", modules="np torch", **_JOINED)
_everywhere(
    "stack",
    "l, axis=0",
    modules="np torch",
    reverse={"l": "rt.unstack(g, l, axis)"},
    forward={"l": "rt.stacked(d_l, axis)"},
)

# ---- products: of each bilinear function, the adjoints of its two arguments are bilinear again


def _bilinear(f: str, left: str, right: str) -> dict[str, Any]:
    return {
        "reverse": {"x": f"rt.{left}(g, x, z)", "z": f"rt.{right}(g, x, z)"},
        "forward": {"x": f"rt.{f}(d_x, z)", "z": f"rt.{f}(x, d_z)"},
    }


for _f, _names in {"matmul": "matmul mm mv bmm", "dot": "dot", "inner": "inner", "outer": "outer"}.items():
    _texts = _bilinear(_f, f"{_f}_left", f"{_f}_right")
    _everywhere(_names, "x, z", modules="np torch", method=True, **_texts)
    FUNCTIONS[key(getattr(rt, _f))] = _entry(f"rt.{_f}", "x, z", "rt", **_texts)
    FUNCTIONS[key(getattr(rt, f"{_f}_left"))] = _entry(
        f"rt.{_f}_left",
        "b, x, z",
        "rt",
        reverse={"b": f"rt.{_f}(g, z)", "z": f"rt.{_f}_right(b, g, z)"},
        forward={"b": f"rt.{_f}_left(d_b, x, z)", "z": f"rt.{_f}_left(b, x, d_z)"},
    )
    FUNCTIONS[key(getattr(rt, f"{_f}_right"))] = _entry(
        f"rt.{_f}_right",
        "b, x, z",
        "rt",
        reverse={"b": f"rt.{_f}(x, g)", "x": f"rt.{_f}_left(b, x, g)"},
        forward={"b": f"rt.{_f}_right(d_b, x, z)", "x": f"rt.{_f}_right(b, d_x, z)"},
    )
OPERATORS[ast.MatMult] = _entry("", "x, z", "np", **_bilinear("matmul", "matmul_left", "matmul_right"))
_everywhere(
    "vdot",
    "x, z",
    modules="np torch",
    reverse={"x": "g * z", "z": "g * x"},
    forward={"x": "m.vdot(d_x, z)", "z": "m.vdot(x, d_z)"},
)
_TENSORDOT: dict[str, Any] = {
    "reverse": {"x": "rt.tensordot_left(g, x, z, axes)", "z": "rt.tensordot_right(g, x, z, axes)"},
    "forward": {"x": "rt.tensordot(d_x, z, axes)", "z": "rt.tensordot(x, d_z, axes)"},
}
_everywhere("tensordot", "x, z, axes=2", modules="np", **_TENSORDOT)
_IN_TORCH: dict[str, Any] = {
    mode: {k: v.replace("axes", "dims") for k, v in texts.items()} for mode, texts in _TENSORDOT.items()
}
_everywhere(
    "tensordot",
    "x, z, dims=2",
    modules="torch",
    **_IN_TORCH,
)
FUNCTIONS[key(rt.tensordot)] = _entry("rt.tensordot", "x, z, axes=2", "rt", **_TENSORDOT)
FUNCTIONS[key(rt.tensordot_left)] = _entry(
    "rt.tensordot_left",
    "b, x, z, axes=2",
    "rt",
    reverse={"b": "rt.tensordot(g, z, axes)", "z": "rt.tensordot_right(b, g, z, axes)"},
    forward={"b": "rt.tensordot_left(d_b, x, z, axes)", "z": "rt.tensordot_left(b, x, d_z, axes)"},
)
FUNCTIONS[key(rt.tensordot_right)] = _entry(
    "rt.tensordot_right",
    "b, x, z, axes=2",
    "rt",
    reverse={"b": "rt.tensordot(x, g, axes)", "x": "rt.tensordot_left(b, x, g, axes)"},
    forward={"b": "rt.tensordot_right(d_b, x, z, axes)", "x": "rt.tensordot_right(b, d_x, z, axes)"},
)

# ---- linear algebra

_everywhere(
    "linalg.inv",
    "x",
    modules="np torch",
    reverse={"x": "-(rt.swapped(y) @ g @ rt.swapped(y))"},
    forward={"x": "-(y @ d_x @ y)"},
)
_everywhere(
    "linalg.det",
    "x",
    modules="np torch",
    reverse={"x": "rt.expand_matrix(g) * rt.cofactors(x)"},
    forward={"x": "rt.total(rt.cofactors(x) * d_x, (-2, -1))"},
)
# Second derivatives of the determinant, which are symmetric: the adjoint is the tangent.
_COFACTORS = (
    "rt.expand_matrix(rt.total(rt.inverse_transposed(x) * d_x, (-2, -1))) * y"
    " - rt.inverse_transposed(x) @ rt.swapped(d_x) @ y"
)
FUNCTIONS[key(rt.cofactors)] = _entry(
    "rt.cofactors", "x", "rt", reverse={"x": _COFACTORS.replace("d_x", "g")}, forward={"x": _COFACTORS}
)
WRITTEN[key(np.linalg.solve)] = written.solve
WRITTEN[key(torch.linalg.solve)] = written.solve
FUNCTIONS[key(rt.inverse_transposed)] = _entry(
    "rt.inverse_transposed",
    "x",
    "rt",
    reverse={"x": "-(y @ rt.swapped(g) @ y)"},
    forward={"x": "-(y @ rt.swapped(d_x) @ y)"},
)

# ---- written in the language itself

WRITTEN.update(
    {
        key(np.var): written.var,
        key(np.std): written.std,
        key(np.linalg.norm): written.norm,
        key(torch.linalg.norm): written.norm,
        key(np.vstack): written.vstack,
        key(np.hstack): written.hstack,
        key(np.dstack): written.dstack,
        key(np.column_stack): written.column_stack,
        key(np.diff): written.diff,
        key(np.average): written.average,
        key(np.kron): written.kron,
        key(np.cross): written.cross,
        key(np.ptp): written.ptp,
        key(np.cumprod): written.cumprod,
        key(np.sinc): written.sinc,
        key(np.nansum): written.nansum,
        key(np.polyval): written.polyval,
        key(np.append): written.append,
        key(np.pad): written.pad,
        key(np.select): written.select,
        key(np.split): written.split,
        key(np.trapezoid): written.trapezoid,
        key(np.full_like): written.full_like,
        key(np.interp): written.interp,
        key(np.linspace): written.linspace,
        key(torch.nn.functional.softplus): written.softplus,
        key(torch.logsumexp): written.logsumexp,
        key(torch.softmax): written.softmax,
        key(torch.log_softmax): written.log_softmax,
        key(torch.var): written.torch_var,
        key(torch.std): written.torch_std,
        key(rt.power_slope): written.power_slope,
        key(rt.power_log): written.power_log,
    }
)
WRITTEN_METHODS.update(
    {
        "var": written.var_by_method,
        "std": written.std_by_method,
        "norm": written.norm,
        "logsumexp": written.logsumexp,
        "softmax": written.softmax,
        "log_softmax": written.log_softmax,
    }
)

# ---- what derived source calls


def _runtime(name: str, parameters: str, reverse: dict[str, str], forward: dict[str, str], **more: Any) -> None:
    FUNCTIONS[key(getattr(rt, name))] = _entry(f"rt.{name}", parameters, "rt", reverse=reverse, forward=forward, **more)


_runtime("log", "x", {"x": "g / x"}, {"x": "d_x / x"}, shape="same")
_runtime("add", "b, c", {"b": "g", "c": "g"}, {"b": "rt.full(d_b, y)", "c": "rt.full(d_c, y)"}, view=True)
_runtime("full", "b, x", {"b": "rt.unbroadcast_any(g, b)"}, {"b": "rt.full(d_b, x)"}, view=True)
_runtime("gradient", "b, x", {"b": "rt.unbroadcast_any(g, b)"}, {"b": "rt.gradient(d_b, x)"}, view=True)
_runtime("tangent", "b, x", {"b": "g"}, {"b": "rt.tangent(d_b, x)"}, view=True)
_runtime("seeded", "b, y", {"b": "g"}, {"b": "d_b"}, view=True)
_runtime("copied", "x", {"x": "g"}, {"x": "d_x"}, shape="same")
_runtime("packed", "items, x", {"items": "rt.unpacked(g, items)"}, {"items": "rt.packed(d_items, x)"}, view=True)
_runtime("unpacked", "b, items", {"b": "rt.packed(g, b)"}, {"b": "rt.unpacked(d_b, items)"}, view=True)
_runtime("placed", "b, i, x", {"b": "rt.unbroadcast_any(g[i], b)"}, {"b": "rt.placed(d_b, i, x)"}, view=True)
_runtime(
    "add_at",
    "b, i, c, x",
    {"b": "rt.unbroadcast_any(g, b)", "c": "rt.unbroadcast_any(g[i], c)"},
    {"b": "rt.full(d_b, x)", "c": "rt.placed(d_c, i, x)"},
    view=True,
)
_runtime(
    "zeroed", "b, i, x", {"b": "rt.unbroadcast_any(rt.zeroed(g, i, b), b)"}, {"b": "rt.zeroed(d_b, i, x)"}, view=True
)
_runtime("stored", "b, i, x, v", {"b": "rt.stored_back(g, i, x, b)"}, {"b": "rt.stored(d_b, i, x, v)"}, view=True)
_runtime("stored_back", "b, i, x, like", {"b": "rt.unbroadcast_any(g[i], b)"}, {"b": "rt.stored_back(d_b, i, x, like)"})
_runtime("saved", "x, i", {"x": "rt.placed(g, i, x)"}, {"x": "rt.saved(d_x, i)"})
_runtime("without_last", "b, at=-1", {"b": "rt.with_last(g, 0.0, b, at)"}, {"b": "rt.without_last(d_b, at)"}, view=True)
_runtime("last", "b, at=-1", {"b": "rt.placed(g, at, b)"}, {"b": "rt.last(d_b, at)"}, view=True)
_runtime(
    "with_last",
    "b, c, x, at=-1",
    {"b": "rt.without_last(g, at)", "c": "rt.last(g, at)"},
    {"b": "rt.with_last(d_b, 0.0, x, at)", "c": "rt.with_last(0.0, d_c, x, at)"},
    view=True,
)
_runtime("spread", "b, l", {"b": "rt.unbroadcast_any(rt.gathered(g, l), b)"}, {"b": "rt.spread(d_b, l)"})
_runtime("gathered", "b, l", {"b": "rt.spread(g, b)"}, {"b": "rt.gathered(d_b, l)"})
_runtime("unlisted", "b, l", {"b": "rt.listed(g, l)"}, {"b": "rt.unlisted(d_b, l)"}, view=True)
_runtime("listed", "b, l", {"b": "rt.unlisted(g, b)"}, {"b": "rt.listed(d_b, l)"}, view=True)
_runtime("floating", "b, y", {"b": "g"}, {"b": "d_b"}, view=True)
_runtime("unbroadcast", "b, x", {"b": "rt.broadcast(g, b)"}, {"b": "rt.unbroadcast(d_b, x)"}, view=True)
_runtime("unbroadcast_any", "b, x", {"b": "rt.full(g, b)"}, {"b": "rt.unbroadcast_any(d_b, x)"}, view=True)
_runtime("broadcast", "b, x", {"b": "rt.unbroadcast(g, b)"}, {"b": "rt.broadcast(d_b, x)"}, view=True)
_runtime(
    "expand",
    "b, x, axis=None, keepdims=False",
    {"b": "rt.reshape_like(rt.total(g, axis, keepdims), b)"},
    {"b": "rt.expand(d_b, x, axis, keepdims)"},
    view=True,
)
_runtime(
    "total",
    "b, axis=None, keepdims=False",
    {"b": "rt.expand(g, b, axis, keepdims)"},
    {"b": "rt.total(d_b, axis, keepdims)"},
    view=True,
)
_runtime("others", "x, axis=None", {"x": "rt.others_back(g, x, axis)"}, {"x": "rt.others_back(d_x, x, axis)"})
_runtime("cumulated", "b, axis, x", {"b": "rt.cumsum(g, axis)"}, {"b": "rt.cumulated(d_b, axis, x)"})
_runtime("cumsum", "x, axis=None", {"x": "rt.cumulated(g, axis, x)"}, {"x": "rt.cumsum(d_x, axis)"})
_runtime("reshape_like", "b, x", {"b": "rt.reshape_like(g, b)"}, {"b": "rt.reshape_like(d_b, x)"}, view=True)
_runtime(
    "reordered", "b, x, order", {"b": "rt.reordered(g, b, order)"}, {"b": "rt.reordered(d_b, x, order)"}, view=True
)
_runtime("without_imaginary", "b, x", {"b": "g"}, {"b": "d_b"}, view=True)
_runtime("transposed", "x, axes=None", {"x": "rt.untransposed(g, axes)"}, {"x": "rt.transposed(d_x, axes)"}, view=True)
_runtime(
    "untransposed", "x, axes=None", {"x": "rt.transposed(g, axes)"}, {"x": "rt.untransposed(d_x, axes)"}, view=True
)
_runtime(
    "transposed_by_method",
    "b, axes",
    {"b": "g.transpose(*axes)"},
    {"b": "rt.transposed_by_method(d_b, axes)"},
    view=True,
)
_runtime("swapped", "x, a=-1, b=-2", {"x": "rt.swapped(g, a, b)"}, {"x": "rt.swapped(d_x, a, b)"}, view=True)
_runtime(
    "moved",
    "x, source, destination",
    {"x": "rt.moved(g, destination, source)"},
    {"x": "rt.moved(d_x, source, destination)"},
    view=True,
)
_runtime("flipped", "x, axis=None", {"x": "rt.flipped(g, axis)"}, {"x": "rt.flipped(d_x, axis)"}, view=True)
_runtime("rolled", "x, shift, axis=None", {"x": "rt.unrolled(g, shift, axis)"}, {"x": "rt.rolled(d_x, shift, axis)"})
_runtime("unrolled", "x, shift, axis=None", {"x": "rt.rolled(g, shift, axis)"}, {"x": "rt.unrolled(d_x, shift, axis)"})
_runtime("split_back", "b, l, axis=0", {"b": "rt.joined(g, axis)"}, {"b": "rt.split_back(d_b, l, axis)"}, view=True)
_runtime("joined", "l, axis=0", {"l": "rt.split_back(g, l, axis)"}, {"l": "rt.joined(d_l, axis)"})
_runtime("unstack", "b, l, axis=0", {"b": "rt.stacked(g, axis)"}, {"b": "rt.unstack(d_b, l, axis)"}, view=True)
_runtime("stacked", "l, axis=0", {"l": "rt.unstack(g, l, axis)"}, {"l": "rt.stacked(d_l, axis)"})
_runtime("untile", "b, x, reps", {"b": "rt.tiled(g, reps)"}, {"b": "rt.untile(d_b, x, reps)"})
_runtime("tiled", "x, reps", {"x": "rt.untile(g, x, reps)"}, {"x": "rt.tiled(d_x, reps)"})
_runtime(
    "unrepeat",
    "b, x, repeats, axis=None",
    {"b": "np.repeat(g, repeats, axis)"},
    {"b": "rt.unrepeat(d_b, x, repeats, axis)"},
)
_runtime("sorted_back", "b, x, axis=-1", {"b": "rt.sorted_along(g, x, axis)"}, {"b": "rt.sorted_back(d_b, x, axis)"})
_runtime("sorted_along", "b, x, axis=-1", {"b": "rt.sorted_back(g, x, axis)"}, {"b": "rt.sorted_along(d_b, x, axis)"})
_runtime("traced", "b, x", {"b": "rt.trace(g)"}, {"b": "rt.traced(d_b, x)"})
_runtime("trace", "x", {"x": "rt.traced(g, x)"}, {"x": "rt.trace(d_x)"})
_runtime("diagonal_back", "b, x, k=0", {"b": "rt.diagonal(g, k)"}, {"b": "rt.diagonal_back(d_b, x, k)"})
_runtime("diagonal", "x, k=0", {"x": "rt.diagonal_back(g, x, k)"}, {"x": "rt.diagonal(d_x, k)"}, view=True)
_runtime("expand_matrix", "x", {"x": "rt.total(g, (-2, -1))"}, {"x": "rt.expand_matrix(d_x)"}, view=True)

# ---- without a slope

for _name in (
    "shape ndim size argmax argmin argsort sign floor ceil round rint trunc isnan isinf isfinite zeros_like ones_like "
    "empty_like zeros ones empty array_equal allclose any all equal greater less greater_equal less_equal "
    "not_equal "
    "searchsorted count_nonzero nonzero floor_divide logical_and logical_or logical_not isclose signbit eye "
    "triu_indices tril_indices diag_indices indices logical_xor result_type iscomplexobj isscalar numel "
    "is_tensor argwhere digitize shares_memory may_share_memory"
).split():
    for _module in (np, torch):
        if hasattr(_module, _name):
            WITHOUT_SLOPE.add(key(getattr(_module, _name)))
for _name in ("floor", "ceil", "trunc", "isnan", "isinf", "isfinite", "isclose"):
    WITHOUT_SLOPE.add(getattr(math, _name))
WITHOUT_SLOPE |= {
    len,
    isinstance,
    type,
    int,
    bool,
    range,
    slice,
    print,
    hasattr,
    callable,
    id,
    any,
    all,
    round,
    rt.integral,
    rt.stop_gradient,
    rt.zeros_like,
    rt.seed,
    rt.seed_of_sum,
    rt.count,
    rt.among,
    rt.larger,
    rt.within,
    rt.sign,
    rt.rebound,
    rt.differentiable,
    rt.distinct,
    rt.alone,
    rt.as_long,
    rt.at_least,
    rt.number,
    rt.no_list,
    rt.part,
    rt.sequence,
    rt.keys,
}
METHODS_WITHOUT_SLOPE |= {
    "argmax",
    "argmin",
    "argsort",
    "any",
    "all",
    "nonzero",
    "dim",
    "size",
    "numel",
    "keys",
    "round",
    "floor",
    "ceil",
    "sign",
    "detach",
    "index",
    "count",
    "new_zeros",
    "new_ones",
    "is_floating_point",
    "startswith",
    "endswith",
    "isnan",
    "searchsorted",
    "bool",
    "long",
}
