"""Triton kernels of every op, one file per op: kernels first, then the functions that launch them.

Imported on first use only, by `dam.backends.triton`; `import dam` does not need Triton. The numerics that csrc/core
holds for C++ and CUDA are in `core`, the sizes that kernels are launched with in `configs`.
"""
