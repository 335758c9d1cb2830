"""Compiles recorded launches ahead of time, as a GPU's driver would get them, and reads what the compiler reports.

Needs no GPU, and a process in which Triton does not interpret kernels: python -m tests.kernels.gate TARGET prints
a line of JSON for every kernel that the launches of `launches()` need on a GPU, and with `few` for those of `few_of`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dam.kernels import configs
from dam.kernels import launch as launching
from tests import covering

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "NVIDIA A100"),
    "sm_90": (GPUTarget("cuda", 90, 32), "NVIDIA H100"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "AMD Instinct MI300X"),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def source(launch: launching.Launch) -> ASTSource:
    """What Triton's launcher would compile: types of the arguments, and which of them 16 divides or are 1."""
    names = launch.kernel.arg_names
    # Parameters that are not specialised by value.
    plain = set(launch.kernel.do_not_specialize or ())
    plain |= {names[i] for i in plain if isinstance(i, int)}
    constant = {
        p.name for p in inspect.signature(launch.kernel.fn).parameters.values() if "constexpr" in str(p.annotation)
    }
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.arguments[name]
        divisible = [["tt.divisibility", 16]]
        if name in constant or value is None or (isinstance(value, int) and value == 1 and name not in plain):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = divisible
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                attributes[(i,)] = divisible
        else:
            signature[name] = launch.kernel.params[i].annotation_type or "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def few_of(found: list[launching.Launch]) -> list[launching.Launch]:
    """Of each kernel as few as have every type and constant of each argument, and every option."""
    kept = []
    for name in sorted({launch.kernel.fn.__name__ for launch in found}):
        same = [launch for launch in found if launch.kernel.fn.__name__ == name]
        described = []
        for launch in same:
            of = source(launch)
            parts = (("type", of.signature), ("constant", of.constants), ("divides", of.attrs), ("", launch.options))
            described.append({(part, key): repr(value) for part, values in parts for key, value in values.items()})
        names = sorted(set().union(*described), key=repr)
        columns = [[values.get(name) for values in described] for name in names]
        cases = [[column.index(column[n]) for column in columns] for n in range(len(same))]
        kept += [same[place] for place in sorted(covering.covering(cases, strength=1))]
    return kept


def key(launch: launching.Launch) -> str:
    described = source(launch)
    text = repr((launch.kernel.fn.__name__, described.signature, described.constants, described.attrs, launch.options))
    return hashlib.sha256(text.encode()).hexdigest()


def compiled(launch: launching.Launch, target: GPUTarget) -> dict[str, object]:
    """Name of the kernel and what it takes: registers, bytes of spills and of shared memory, by the compiler's word."""
    options = dict(launch.options)
    if target.backend == "hip":
        options.pop("sanitize_overflow")
    kernel = triton.compile(source(launch), target=target, options=options)
    usage = cubin_usage(kernel.asm["cubin"]) if target.backend == "cuda" else amdgcn_usage(kernel.asm["amdgcn"])
    constants = {k: v for k, v in launch.arguments.items() if isinstance(v, (bool, int)) and k.isupper()}
    if "PIECES" in constants and constants.get("SUM", True):
        usage["warps_of_blocks"] = warps_of_blocks(kernel.asm["ttgir"], constants)
    dtypes = sorted({_TYPES[v.dtype] for v in launch.arguments.values() if isinstance(v, torch.Tensor)})
    return {
        "kernel": launch.kernel.fn.__name__, "constants": constants, "dtypes": dtypes,
        "warps": launch.options["num_warps"], "shared": kernel.metadata.shared, **usage,
    }  # fmt: skip


def warps_of_blocks(ttgir: str, constants: dict[str, int]) -> list[list[int]]:
    """Warps along each dimension of blocks [PIECES, lanes, WIDTH], for every layout that the compiler gives them."""
    shape = f"{constants['PIECES']}x{constants['ROWS'] * constants['TILES']}x{constants['WIDTH']}"
    layouts = dict(re.findall(r"^#(\w+) = (.*)$", ttgir, re.MULTILINE))
    names = set(re.findall(rf"tensor<{shape}x[^,>]+(?:<[^>]*>)?, #(\w+)>", ttgir))
    warps = [re.search(r"warpsPerCTA = \[([\d, ]+)\]", layouts[name]) for name in sorted(names)]
    return [[int(count) for count in found[1].split(",")] for found in warps if found]


def cubin_usage(cubin: bytes) -> dict[str, Any]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def amdgcn_usage(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return {"registers": number("vgpr_count"), "spills": number("private_segment_fixed_size")}


def launches(gpu: str) -> list[launching.Launch]:
    """One launch for each kernel that differs, of all that a user's calls on that GPU need."""
    from tests.kernels import calls

    found: dict[str, launching.Launch] = {}
    with configs.as_if_on(gpu), launching.recording(lambda launch: found.setdefault(key(launch), launch)):
        for call in calls.CALLS:
            call()
    return list(found.values())


def _one(job: tuple[str, str, int]) -> str:
    name, few, number = job
    target, gpu = TARGETS[name]
    return json.dumps(compiled(_launches(gpu, few)[number], target))


@functools.cache
def _launches(gpu: str, few: str) -> list[launching.Launch]:
    return few_of(launches(gpu)) if few else launches(gpu)


def main(target: str, few: str = "") -> None:
    assert few in ("", "few")
    count = len(_launches(TARGETS[target][1], few))
    # Processes that inherit the launches: what they hold cannot be sent.
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(_one, [(target, few, i) for i in range(count)]):
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
