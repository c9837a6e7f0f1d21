"""Builds the native libraries with ninja: no torch needed, no compiler required.

OFFPRIN_CPU=auto|0|1    the C++ library (auto: when a C++17 compiler is found; 1: fail without it)
OFFPRIN_CUDA=auto|0|1   the CUDA library (auto: when nvcc is found)
OFFPRIN_CUDA_ARCHS      such as "90" or "80;90;100"; the newest also gets PTX
CXX, CUDA_HOME          the tools, where they are not on the path
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
CUDA_ARCHS = "80;90;100"

# without -fno-math-errno, GCC vectorises no square root
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra"
AVX2_FLAGS = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt"
# GCC 12 takes its own _mm512_undefined_* helpers for uninitialised variables
AVX512_SETS = ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "vpopcntdq", "bitalg")
AVX512_FLAGS = " ".join(f"-mavx512{name}" for name in AVX512_SETS) + (
    " -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized"
)


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name} must be auto, 0 or 1, not {value!r}")
    return value


def find_cxx() -> str | None:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        path = shutil.which(name.split()[0])
        if path:
            return " ".join([path, *name.split()[1:]])
    return None


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_home(nvcc: str) -> Path | None:
    """The toolkit folder as nvcc itself sees it (the nvcc on the path may be a wrapper script)."""
    listing = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", listing, re.MULTILINE)
    return Path(found[1]).resolve() if found else None


def cuda_archs(nvcc: str) -> list[str]:
    """Wanted architectures that this nvcc knows."""
    wanted = [arch for arch in re.split("[;, ]+", os.environ.get("OFFPRIN_CUDA_ARCHS", CUDA_ARCHS)) if arch]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in wanted if f"compute_{arch}" in known.split()]


class NinjaBuild(build_ext):
    """Compiles each library with ninja: in parallel, and only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.plans = {"offprin_kernels._cpu": self.plan_cpu(), "offprin_kernels._cuda": self.plan_cuda()}
        # setuptools expects a file for every extension that it is told of
        self.extensions = [e for e in self.extensions if self.plans[e.name]]

    def skip(self, variable: str, what: str, why: str) -> None:
        if setting(variable) == "1":
            sys.exit(f"{variable}=1, but {why}")
        self.warn(f"the {what} library is not built: {why}")

    def plan_cpu(self) -> dict | None:
        if setting("OFFPRIN_CPU") == "0":
            return None
        cxx = find_cxx()
        if os.name != "posix":
            return self.skip("OFFPRIN_CPU", "cpu", "it needs a POSIX system")
        if cxx is None:
            return self.skip("OFFPRIN_CPU", "cpu", "no C++ compiler was found (set CXX)")
        sources = {}
        for path in [ROOT / "csrc" / "bindings_cpu.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
            extra = "-DOFFPRIN_X86=1" if X86 else ""
            if path.stem.endswith(("_avx2", "_avx512")):
                if not X86:
                    continue
                extra += f" {AVX2_FLAGS}"
                if path.stem.endswith("_avx512"):
                    extra += f" {AVX512_FLAGS}"
            sources[path] = ("cxx", extra)
        return {"sources": sources, "cxx": cxx, "link": "-pthread"}

    def plan_cuda(self) -> dict | None:
        if setting("OFFPRIN_CUDA") == "0":
            return None
        nvcc, cxx = find_nvcc(), find_cxx()
        if nvcc is None or cxx is None:
            missing = "nvcc" if nvcc is None else "a C++ compiler"
            return self.skip("OFFPRIN_CUDA", "cuda", f"{missing} was not found (set CUDA_HOME or CXX)")
        home, archs = cuda_home(nvcc), cuda_archs(nvcc)
        if home is None or not archs:
            return self.skip(
                "OFFPRIN_CUDA", "cuda", f"{nvcc} does not answer, or knows none of the architectures wanted"
            )
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        newest = max(archs, key=lambda arch: int(re.sub(r"\D", "", arch)))
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        sources = {ROOT / "csrc" / "bindings_cuda.cpp": ("cxx", "")}
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            sources[path] = ("nvcc", " ".join(codes))
        link = " ".join(f"-L{home / d}" for d in ("lib64", "lib", "targets/x86_64-linux/lib"))
        return {"sources": sources, "cxx": cxx, "nvcc": nvcc, "link": f"{link} -lcudart_static -ldl -lrt -pthread"}

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        plan = self.plans[ext.name]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        link = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--exclude-libs,ALL"
        lines = [
            f"includes = {' '.join(f'-isystem {p}' if 'csrc' not in str(p) else f'-I{p}' for p in includes)}",
            f"cxx = {plan['cxx']}",
            f"nvcc = {plan.get('nvcc', '')}",
            "rule cxx",
            f"  command = $cxx -MMD -MF $out.d {CXX_FLAGS} $includes $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d -O3 -std=c++17 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
            " $includes $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {link} {plan['link']}",
        ]
        objects = []
        for path, (rule, flags) in plan["sources"].items():
            objects.append(f"{path.name}.o")
            lines += [f"build {objects[-1]}: {rule} {path}", f"  flags = {flags}"]
        lines.append(f"build {target}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError:
            # a toolkit that is found but does not work must not keep the rest from installing, unless it was asked for
            if ext.name.endswith("_cuda") and setting("OFFPRIN_CUDA") == "auto":
                ext.optional = True
            raise CompileError(f"{ext.name} did not compile; see the compiler's messages above") from None


setup(
    ext_modules=[Extension("offprin_kernels._cpu", []), Extension("offprin_kernels._cuda", [])],
    cmdclass={"build_ext": NinjaBuild},
)
