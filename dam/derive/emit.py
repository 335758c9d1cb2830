"""Expressions of sympy as code: of torch, of C++ over vectors or doubles, and of Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import sympy
from sympy.codegen.cfunctions import log1p
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from dam.derive.scalar import where

_PRODUCTS = 4  # powers up to this one are products


class Language(NamedTuple):
    """How a language writes what expressions are made of; in the texts {} stands for arguments.

    Attributes:
        functions: by sympy's name; an expression with another has no text in the language.
        number: a constant.
        broadcast: a constant in the place of a value of a branch.
        line: a statement that gives a name its value.
    """

    name: str
    functions: Mapping[str, str]
    number: Callable[[float], str]
    power: str
    root: str
    chosen: str
    broadcast: str
    line: str
    both: str = "({}) & ({})"
    either: str = "({}) | ({})"


class Unwritable(ValueError):
    """A language has no function of that name."""


_SAME = ("exp", "log", "sin", "cos", "tanh", "atan", "erf", "log1p", "expm1")
TORCH = Language(
    "torch", {name: f"torch.{name}({{}})" for name in _SAME}, repr, "{} ** {}", "torch.sqrt({})",
    "torch.where({}, {}, {})", "torch.full_like(x, {})", "{} = {}",
)  # fmt: skip
# F is a vector of floats or a double, T what it is made of; fn the elementary functions of csrc/cpu/defined.h.
CPP = Language(
    "C++", {name: f"fn::{name}({{}})" for name in _SAME}, lambda value: f"T({value!r})", "fn::pow({}, {})",
    "fn::sqrt({})", "fn::chosen<F>({}, {}, {})", "F{{}} + {}", "const auto {} = {};",
)  # fmt: skip
# Only what tl has in the interpreter and on every GPU.
_OF_TRITON = {name: f"tl.{name}({{}})" for name in ("exp", "log", "sin", "cos", "erf")}
_OF_TRITON |= {"tanh": "defined.tanh({})", "log1p": "defined.log1p({})", "expm1": "defined.expm1({})"}
TRITON = Language(
    "Triton", _OF_TRITON, repr, "defined.power({}, {})", "tl.sqrt({})", "tl.where({}, {}, {})", "{}", "{} = {}"
)


class Program(NamedTuple):
    """What some expressions of a log rate x are computed by, in order.

    Attributes:
        powers: (name, k) of each power of the rate, exp(k x), whose computation may use those before it.
        shared: (name, expression) of what is used more than once.
        outputs: (name, expression) in these names and x.
    """

    powers: tuple[tuple[str, sympy.Rational], ...]
    shared: tuple[tuple[str, sympy.Expr], ...]
    outputs: tuple[tuple[str, sympy.Expr], ...]

    def lines(self, language: Language) -> list[str]:
        """Statements that give shared values and outputs their names; the powers of the rate have theirs.

        Raises:
            Unwritable: the language lacks a function.
        """
        writer = _Writer(language)
        for name, value in (*self.shared, *self.outputs):
            text = writer.said(value)
            if value.is_number:
                text = language.broadcast.format(text)
            writer.lines.append(language.line.format(name, text))
        return writer.lines

    def power_of(self, k: sympy.Rational) -> tuple[str, int] | None:
        """(name, n) if exp(k x) is the n-th power of one that comes before it, n of 2, 3, 4 or -1; of several the
        highest."""
        for name, other in reversed(self.powers[: [p for _, p in self.powers].index(k)]):
            times = k / other
            if times == -1 or (times.is_Integer and 2 <= times <= _PRODUCTS):
                return name, int(times)
        return None


def program(outputs: Mapping[str, sympy.Expr], x: sympy.Symbol) -> Program:
    """The computation of expressions of x, with powers of exp(x) and what is common to them computed once."""
    powers: dict[sympy.Rational, sympy.Symbol] = {}

    def power(k: sympy.Rational) -> sympy.Symbol:
        return powers.setdefault(k, sympy.Symbol(_power_name(k), positive=True))

    def without(argument: sympy.Expr) -> sympy.Expr:
        """exp of it, with what is a power of the rate taken out."""
        argument = sympy.expand(argument)
        k = argument.coeff(x, 1) if argument.is_Add or argument.is_Mul else sympy.Integer(int(argument == x))
        if not k.is_Rational or k == 0:
            return sympy.exp(argument)
        rest = argument - k * x
        return power(k) * (sympy.Integer(1) if rest == 0 else sympy.exp(rest))

    def rewritten(e: sympy.Expr) -> sympy.Expr:
        if isinstance(e, sympy.exp):
            return without(rewritten(e.args[0]))
        if not e.args:
            return e
        if isinstance(e, sympy.log) and e.args[0].is_Add and e.args[0].as_coeff_Add()[0] == 1:
            return log1p(rewritten(e.args[0] - 1))
        return e.func(*(rewritten(a) for a in e.args))

    found = {name: rewritten(sympy.sympify(value)) for name, value in outputs.items()}
    shared, reduced = sympy.cse(list(found.values()), symbols=(sympy.Symbol(f"t_{n}") for n in range(1, 10_000)))
    ordered = sorted(powers, key=lambda k: (bool(k < 0), abs(k)))
    return Program(
        tuple((powers[k].name, k) for k in ordered),
        tuple((str(symbol), value) for symbol, value in shared),
        tuple(zip(found, reduced, strict=True)),
    )


def _power_name(k: sympy.Rational) -> str:
    if k == 1:
        return "u"
    if k == sympy.Rational(1, 2):
        return "root"
    sign = "minus_" if k < 0 else ""
    whole = str(abs(k.p)) if k.q == 1 else f"{abs(k.p)}_{k.q}"
    return f"u_{sign}{whole}"


class _Writer:
    """Expressions as texts of a language; powers of what has no name are given one, in lines before them."""

    def __init__(self, language: Language) -> None:
        self.language, self.lines, self.count = language, list[str](), 0

    def named(self, e: sympy.Expr) -> str:
        if isinstance(e, sympy.Symbol):
            return e.name
        self.count += 1
        self.lines.append(self.language.line.format(f"base_{self.count}", self.said(e)))
        return f"base_{self.count}"

    def said(self, e: sympy.Expr) -> str:
        """The text of an expression, which binds as weakly as a sum does."""
        language = self.language
        if e.is_number:
            value = float(e)
            return language.number(int(value) if value.is_integer() and abs(value) < 2**53 else value)
        if isinstance(e, sympy.Symbol):
            return e.name
        if isinstance(e, sympy.Add):
            return self._sum(e)
        if isinstance(e, sympy.Mul):
            return self._product(e)
        if isinstance(e, sympy.Pow):
            return self._power(e)
        if isinstance(e, Boolean):
            return self.test(sympy.to_nnf(e))
        if isinstance(e, where):
            test, *sides = e.args
            texts = [language.broadcast.format(self.said(s)) if s.is_number else self.said(s) for s in sides]
            return language.chosen.format(self.said(test), *texts)
        name = type(e).__name__
        if name not in language.functions:
            raise Unwritable(f"{name} has no {language.name} here")
        return language.functions[name].format(*(self.said(a) for a in e.args))

    def factor(self, e: sympy.Expr) -> str:
        """The text of an expression, as a factor of a product."""
        text = self.said(e)
        loose = isinstance(e, (sympy.Add, sympy.Mul)) or (isinstance(e, sympy.Pow) and not self._is_call(e))
        return f"({text})" if loose else text

    def _is_call(self, e: sympy.Pow) -> bool:
        return e.exp == sympy.Rational(1, 2)

    def _sum(self, e: sympy.Add) -> str:
        text = ""
        for term in sorted(e.args, key=lambda t: (t.is_number, t.could_extract_minus_sign())):
            negative = term.could_extract_minus_sign()
            said = self.said(-term if negative else term)
            if isinstance(term, sympy.Add):
                said = f"({said})"
            if not text:
                text = f"-{said}" if negative else said
            else:
                text += f" - {said}" if negative else f" + {said}"
        return text

    def _product(self, e: sympy.Mul) -> str:
        coefficient, rest = e.as_coeff_Mul()
        over, under = [], []
        for factor in sympy.Mul.make_args(rest):
            base, exponent = factor.as_base_exp()
            if exponent.is_Rational and exponent < 0:
                under.append(self.factor(base**-exponent))
            else:
                over.append(self.factor(factor))
        negative, size = coefficient < 0, abs(coefficient)
        if size != 1 or not over:
            over.insert(0, self.said(size))
        text = " * ".join(over)
        if under:
            text += f" / {under[0]}" if len(under) == 1 else f" / ({' * '.join(under)})"
        return f"-{text}" if negative else text

    def _power(self, e: sympy.Pow) -> str:
        base, exponent = e.as_base_exp()
        if exponent.is_Rational and exponent < 0:
            return f"{self.said(sympy.Integer(1))} / {self.factor(base**-exponent)}"
        if exponent.is_Integer and 2 <= exponent <= _PRODUCTS:
            return " * ".join([self.named(base)] * int(exponent))
        if exponent.is_Integer and exponent > 0:
            return self._squared(self.named(base), int(exponent))
        if exponent == sympy.Rational(1, 2):
            return self.language.root.format(self.said(base))
        texts = [self.named(base), self.said(exponent) if exponent.is_number else self.named(exponent)]
        return self.language.power.format(*texts)

    def _squared(self, base: str, exponent: int) -> str:
        """A power by squares of squares: right for negative bases too, of which a logarithm is none."""
        factors = []
        while exponent:
            if exponent % 2:
                factors.append(base)
            exponent //= 2
            if exponent:
                self.count += 1
                self.lines.append(self.language.line.format(f"base_{self.count}", f"{base} * {base}"))
                base = f"base_{self.count}"
        return " * ".join(factors)

    def test(self, e: sympy.Basic) -> str:
        if isinstance(e, sympy.Symbol):
            return e.name
        if isinstance(e, Relational):
            sign = {"Eq": "==", "Ne": "!="}.get(e.rel_op, e.rel_op)
            left, right = e.lhs, e.rhs
            if left.is_number:
                left, right, sign = right, left, {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign)
            return f"{self.factor(left)} {sign} {self.factor(right)}"
        if isinstance(e, (sympy.And, sympy.Or)):
            form = self.language.both if isinstance(e, sympy.And) else self.language.either
            text = self.test(e.args[0])
            for part in e.args[1:]:
                text = form.format(text, self.test(part))
            return text
        raise Unwritable(f"the condition {e} has no {self.language.name} here")


def indented(lines: Sequence[str], depth: int) -> str:
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)
