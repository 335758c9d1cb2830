"""Builds dam._cpu, every kernel of csrc/cpu once per instruction set, in one extension that chooses at run time; and
dam._cuda, the kernels of csrc/cuda, where nvcc is found.

Environment variables:
    DAM_BUILD_CUDA    1: an error where nvcc is missing; 0: no dam._cuda
    DAM_CUDA_ARCHS    compute capabilities, by default "80 90"; the last one's PTX serves later chips
    DAM_CUDA_STRICT   1: an error where ptxas reports a spill or a stack frame
    DAM_EMULATE_CUDA  1: also dam._cuda_emulated, the same kernels on the CPU, for tests without a GPU
    DAM_SANITIZE      1: with AddressSanitizer (run with its library preloaded)
    DAM_NO_OPENMP     1: dam._cpu without threads
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

CPU, CUDA, EMULATOR = Path("csrc/cpu"), Path("csrc/cuda"), Path("csrc/emulator")
BFLOAT16 = CPU / "product_bfloat16.cpp"
KERNELS = sorted(str(path) for path in CPU.glob("*.cpp") if path.name != "bind.cpp" and path != BFLOAT16)
CUDA_KERNELS = sorted(str(path) for path in CUDA.glob("*.cu"))
HEADERS = sorted(str(path) for kind in ("h", "def") for path in Path("csrc").glob(f"*/*.{kind}"))

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"plain": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]

# Of BFLOAT16 alone, which is compiled once, beside the sets, and called where the machine has these instructions.
BFLOAT16_FLAGS = ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

# Where the README's links lead on a package index, which has no other file of the repository.
REPOSITORY = "https://github.com/discrete-adjoint-matching/dam"

FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# The numerics use fused products where the set has them; nothing else may be reassociated.
CPU_FLAGS = [*FLAGS, "-ffp-contract=fast", "-fno-math-errno"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]


def asked(name):
    return os.environ.get(name) == "1"


class BuildExtensions(build_ext):
    """Compiles the files of each extension side by side and links them."""

    def build_extension(self, ext):
        if self.compiler.compiler_type != "unix":
            raise SystemExit("dam is built with GCC or Clang (it uses their vector extensions)")
        self._includes = [str(path) for path in ext.include_dirs]
        {"dam._cpu": self._build_cpu, "dam._cuda": self._build_cuda, "dam._cuda_emulated": self._build_emulated}[
            ext.name
        ](self.get_ext_fullpath(ext.name))

    def _build_cpu(self, output):
        flags, link = [*CPU_FLAGS, *sanitizer()], sanitizer()
        if not asked("DAM_NO_OPENMP"):
            if self._compiles(["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"):
                flags += ["-fopenmp"]
                # By soname only: the process shares the libgomp.so.1, hence the thread pool, that torch has loaded.
                link += ["-fopenmp"]
            else:
                print("dam: this compiler has no OpenMP; dam._cpu is built without threads", file=sys.stderr)
        if X86:
            flags += ["-DDAM_HAVE_X86"]
            asks = 'int main() { return __builtin_cpu_supports("amx-bf16") + __builtin_cpu_supports("avx512bf16"); }\n'
            if sys.platform == "linux" and self._compiles(BFLOAT16_FLAGS, asks):
                flags += ["-DDAM_HAVE_BFLOAT16"]
        jobs = [("bind", str(CPU / "bind.cpp"), [*flags, f"-DDAM_BUILD={self._build_of(flags)}"])]
        if "-DDAM_HAVE_BFLOAT16" in flags:
            isa_flags = [*ISA_FLAGS["avx512"], *BFLOAT16_FLAGS]
            jobs += [("avx512_bf16", str(BFLOAT16), [*flags, *isa_flags, "-DDAM_ISA=avx512_bf16"])]
        for isa, isa_flags in ISA_FLAGS.items():
            jobs += [(isa, source, [*flags, *isa_flags, f"-DDAM_ISA={isa}"]) for source in KERNELS]
        self._link(self._objects(jobs), output, link)

    def _build_of(self, flags):
        """How kernels of the CPU are compiled, JSON as a string of C: dam.backends.generated compiles more so."""
        compiler = getattr(self.compiler, "compiler_cxx", None) or self.compiler.compiler_so
        build = {"compiler": list(compiler), "flags": flags, "isa_flags": ISA_FLAGS}
        return json.dumps(json.dumps(build))

    def _build_cuda(self, output):
        nvcc, archs = find_nvcc(), cuda_archs()
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]

        def compile_one(source):
            target = str(folder / (Path(source).stem + ".o"))
            command = [nvcc, *NVCC_FLAGS, *targets, "-c", source, "-o", target]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            return target, done.stderr

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, CUDA_KERNELS))
        report = "".join(text for _, text in compiled)
        (folder / "ptxas.txt").write_text(report)
        wasteful = [line for line in ptxas_report(report) if line.stack > 0 or line.spills > 0]
        for line in wasteful:
            print(f"dam: ptxas: {line}", file=sys.stderr)
        if wasteful and asked("DAM_CUDA_STRICT"):
            raise SystemExit("dam: a kernel spills registers or has a stack frame")
        objects = [target for target, _ in compiled] + self._objects([("cuda", str(CUDA / "bind.cpp"), FLAGS)])
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        # nvcc knows where its runtime lies. Static and hidden: another CUDA runtime in the process, which may be of
        # another release, must not be called instead.
        link = [nvcc, "-shared", "--cudart=static", "-Xlinker=--exclude-libs=ALL", *objects, "-o", output]
        subprocess.run(link, check=True)

    def _build_emulated(self, output):
        folder = Path(self.build_temp) / "emulated"
        folder.mkdir(parents=True, exist_ok=True)
        sources = []
        for kernel in CUDA_KERNELS:  # under a name by which the compiler takes it for C++
            source = folder / (Path(kernel).stem + ".cpp")
            source.write_text(f'#include "{Path(kernel).resolve()}"\n')
            sources.append(source)
        flags = [*FLAGS, *sanitizer(), "-DDAM_EMULATE", "-Wno-unknown-pragmas"]
        sources += [CUDA / "bind.cpp", EMULATOR / "emulator.cpp"]
        self._link(self._objects([("emulated", str(source), flags) for source in sources]), output, sanitizer())

    def _objects(self, jobs):
        """Object files of jobs (folder, source, flags), compiled side by side."""

        def compile_one(job):
            name, source, arguments = job
            directory = str(Path(self.build_temp) / name)
            return self.compiler.compile([source], directory, include_dirs=self._includes, extra_postargs=arguments)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [path for paths in pool.map(compile_one, jobs) for path in paths]

    def _link(self, objects, output, arguments):
        self.compiler.link_shared_object(
            objects, output, extra_postargs=arguments, target_lang="c++", build_temp=self.build_temp
        )

    def _compiles(self, arguments, program):
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "probe.cpp"
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=directory, extra_postargs=arguments)
                self.compiler.link_executable(objects, str(Path(directory) / "probe"), extra_postargs=arguments)
            except Exception:
                return False
        return True


class SourceDistribution(sdist):
    """With the links of dam as what they are, where setuptools packs the folders behind them a second time."""

    def make_release_tree(self, base_dir, files):
        links = [path for path in Path("dam").iterdir() if path.is_symlink()]
        kept = [name for name in files if not any(link in Path(name).parents for link in links)]
        super().make_release_tree(base_dir, kept)
        for link in links:
            (Path(base_dir) / link).symlink_to(os.readlink(link))


def absolute_links(text, version):
    """Markdown whose links to files of the repository lead to those of this version's tag."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)  # code is not touched
    target = rf"]({REPOSITORY}/blob/v{version}/\1)"
    parts[::2] = [re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", target, part) for part in parts[::2]]
    return "".join(parts)


def long_description():
    (version,) = re.findall(
        r'^__version__ = "(.+)"$', Path("dam/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    return absolute_links(Path("README.md").read_text(encoding="utf-8"), version)


def sanitizer():
    return ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"] if asked("DAM_SANITIZE") else []


def find_nvcc():
    """Path of nvcc: of CUDA_HOME, or on the PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    if home and (found := shutil.which(str(Path(home) / "bin" / "nvcc"))):
        return found
    return shutil.which("nvcc")


def cuda_archs():
    """Compute capabilities to compile for, lowest first, like ["80", "90"]."""
    text = os.environ.get("DAM_CUDA_ARCHS", "80 90")
    archs = re.split(r"[\s,;]+", text.strip().replace(".", ""))
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"DAM_CUDA_ARCHS must list compute capabilities like 80 90; got {text!r}")
    if min(map(arch_number, archs)) < 80:
        raise SystemExit(f"DAM_CUDA_ARCHS: dam needs compute capability 8.0 or later; got {text!r}")
    return sorted(archs, key=arch_number)


def arch_number(arch):
    return int(arch.rstrip("af"))


class Usage(NamedTuple):
    """What ptxas reports of a kernel: bytes of its stack frame and of spilled registers per thread, and registers."""

    kernel: str
    arch: str
    stack: int
    spills: int
    registers: int


def ptxas_report(text):
    """The kernels of what `nvcc -Xptxas=-v` writes."""
    found = []
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    for kernel, arch, stack, stores, loads, registers in re.findall(pattern, text, re.DOTALL):
        found.append(Usage(kernel, arch, int(stack), int(stores) + int(loads), int(registers)))
    return found


def extensions():
    found = [Pybind11Extension("dam._cpu", [str(CPU / "bind.cpp"), *KERNELS], depends=[*HEADERS, str(BFLOAT16)])]
    sources = [str(CUDA / "bind.cpp"), *CUDA_KERNELS]
    if os.environ.get("DAM_BUILD_CUDA") != "0":
        if find_nvcc() is not None:
            found.append(Pybind11Extension("dam._cuda", sources, depends=HEADERS))
        elif asked("DAM_BUILD_CUDA"):
            raise SystemExit("DAM_BUILD_CUDA=1, but there is no nvcc on the PATH or in CUDA_HOME/bin")
        else:
            print("dam: no nvcc found; dam._cuda is not built", file=sys.stderr)
    if asked("DAM_EMULATE_CUDA"):
        found.append(Pybind11Extension("dam._cuda_emulated", sources, depends=HEADERS))
    return found


if __name__ == "__main__":
    # The one list of variables; dam itself needs torch, which is not here.
    if faults := runpy.run_path("kernels/environment.py")["faults"]():
        raise SystemExit("; ".join(faults))
    setup(
        # dam.kernels and dam.benchmarks among them, by links: a distribution called `kernels` exists, and many folders
        # called `benchmarks`, so these names are never installed.
        packages=find_packages(include=["dam", "dam.*"]),
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions, "sdist": SourceDistribution},
        long_description=long_description(),
        long_description_content_type="text/markdown",
    )
