"""How a linear op goes through its logits, by name, and the environment variable that asks for a form.

fused: kernels contain the matmul with the head (kernels/head.py). chunked: the library's matmul, and row kernels. The
latter form the head's gradient in one of three ways (dam/ops/_head.py): rows, whole or columns.
"""

from __future__ import annotations

from dam.kernels import environment

# Those of each backend; asking for one of a gradient's three is asking for chunked.
OF_BACKEND = {
    "torch": ("chunked", "rows", "whole"),
    "cpu": ("chunked", "rows", "whole"),
    "triton": ("fused", "chunked", "rows", "whole"),
    "cuda": ("chunked", "rows", "whole", "columns"),
}
OF_GRADIENTS = environment.GRADIENT_FORMS


def asked(backend: str) -> str | None:
    """The form that DAM_LINEAR_FORM asks for; None where it is unset, empty or "auto", or no form of this backend.

    One process may have calls on several backends: the reference for float64 beside a fused form in Triton.

    Raises:
        ValueError: it is no form of any.
    """
    form = environment.value("DAM_LINEAR_FORM")
    return form if form in OF_BACKEND[backend] else None
