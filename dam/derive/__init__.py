"""Derivatives as source: of functions of numpy and torch, by transforming their code."""

from dam.derive.errors import DerivativeError
from dam.derive.runtime import insert_grad_of, stop_gradient
from dam.derive.transform import adjoint, autodiff, grad, source

__all__ = ["DerivativeError", "adjoint", "autodiff", "grad", "insert_grad_of", "source", "stop_gradient"]
