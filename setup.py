"""Builds dam._cpu: every kernel of csrc/cpu once per instruction set, all in one extension that chooses at run time.

Environment variables: DAM_SANITIZE=1 builds with AddressSanitizer (run with its library preloaded);
DAM_NO_OPENMP=1 builds without threads.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

CPU = Path("csrc/cpu")
KERNELS = sorted(str(path) for path in CPU.glob("*.cpp") if path.name != "bind.cpp")
HEADERS = sorted(str(path) for path in (*CPU.glob("*.h"), *Path("csrc/core").glob("*.h")))

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"plain": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]

FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# The numerics use fused products where the set has them; nothing else may be reassociated.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno"]


class BuildCpu(build_ext):
    """Compiles each kernel file once per instruction set, side by side, and links the objects into one extension."""

    def build_extension(self, ext):
        if self.compiler.compiler_type != "unix":
            raise SystemExit("dam._cpu is built with GCC or Clang (it uses their vector extensions)")
        flags, link = list(FLAGS), []
        if os.environ.get("DAM_SANITIZE") == "1":
            flags += ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"]
            link += ["-fsanitize=address"]
        if os.environ.get("DAM_NO_OPENMP") != "1":
            if self._compiles("-fopenmp", "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"):
                flags += ["-fopenmp"]
                # By soname only: the process shares the libgomp.so.1, hence the thread pool, that torch has loaded.
                link += ["-fopenmp"]
            else:
                print("dam: this compiler has no OpenMP; dam._cpu is built without threads", file=sys.stderr)

        includes = [str(path) for path in ext.include_dirs]
        jobs = [("bind", str(CPU / "bind.cpp"), [*flags, *(["-DDAM_HAVE_X86"] if X86 else [])])]
        for isa, isa_flags in ISA_FLAGS.items():
            jobs += [(isa, source, [*flags, *isa_flags, f"-DDAM_ISA={isa}"]) for source in KERNELS]

        def compile_one(job):
            name, source, arguments = job
            directory = str(Path(self.build_temp) / name)
            return self.compiler.compile([source], directory, include_dirs=includes, extra_postargs=arguments)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=link, target_lang="c++", build_temp=self.build_temp
        )

    def _compiles(self, flag, program):
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "probe.cpp"
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=directory, extra_postargs=[flag])
                self.compiler.link_executable(objects, str(Path(directory) / "probe"), extra_postargs=[flag])
            except Exception:
                return False
        return True


setup(
    # The kernels live beside the package; a distribution called `kernels` exists, so that name is never installed.
    packages=[*find_packages(include=["dam", "dam.*"]), "dam.kernels"],
    package_dir={"dam.kernels": "kernels"},
    ext_modules=[Pybind11Extension("dam._cpu", [str(CPU / "bind.cpp"), *KERNELS], depends=HEADERS)],
    cmdclass={"build_ext": BuildCpu},
)
