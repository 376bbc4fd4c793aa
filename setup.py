"""Builds gradmill._C: every CPU kernel once per instruction set, CUDA C++ where nvcc is found, one pybind11 file.

ninja does the compiling, in parallel, in a folder that outlives the build (build/native-...), so that a reinstall
recompiles only what changed. Neither torch nor any of its headers is needed.

Environment:
  GRADMILL_CUDA=auto|0|1        compile csrc/cuda (auto: when nvcc is found; 1: fail without it)
  GRADMILL_CUDA_ARCHS="80 90a"  CUDA architectures (default "80 90a 100a 120"); PTX of compute_80 is always added
  GRADMILL_CXXFLAGS             more flags for the C++ files (continuous integration: -Werror)
  GRADMILL_CXX, GRADMILL_NVCC   compilers (defaults: $CXX or g++ or c++; nvcc on PATH or in /usr/local/cuda)
"""
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2"
AVX512 = AVX2 + " -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# level name -> (number in csrc/cpu/kernels.h, compiler flags)
LEVELS = {"portable": (0, ""), "avx2": (1, AVX2), "avx512": (2, AVX512), "avx512_vnni": (3, AVX512 + " -mavx512vnni")}
# family -> levels it is compiled for; a family without a level uses the next lower one (csrc/bindings.cpp)
FAMILIES = {"quant": 3, "matmul": 4, "conv": 3, "optim": 3, "projection": 3, "binary": 3, "codebook": 2}

# No -ffast-math: it links start-up code that changes denormal handling for the whole process, and results
# must be bit-equal between instruction sets (hence no contraction into fused multiply-adds either).
CXXFLAGS = ("-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math "
            "-fvisibility=hidden -DNDEBUG -Wall -Wextra " + os.environ.get("GRADMILL_CXXFLAGS", "")).strip()
NVCCFLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden --threads 2 -Wno-deprecated-gpu-targets"


def find_nvcc():
    want = os.environ.get("GRADMILL_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"GRADMILL_CUDA is {want!r}; it must be auto, 0 or 1")
    if want == "0":
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("GRADMILL_NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
    if nvcc is None and want == "1":
        raise SystemExit("GRADMILL_CUDA=1 but no nvcc was found: put it on PATH or set GRADMILL_NVCC or CUDA_HOME")
    return nvcc


def cuda_lib_dir(nvcc):
    # nvcc may be a wrapper anywhere on PATH: ask it where its toolkit is.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True).stderr
    homes = [line.split("TOP=", 1)[1] for line in dry.splitlines() if "TOP=" in line]
    homes += [os.environ.get("CUDA_HOME", ""), str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    for home in filter(None, homes):
        for d in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            if (Path(home) / d / "libcudart_static.a").exists():
                return Path(home).resolve() / d
    raise SystemExit(f"libcudart_static.a was not found in {', '.join(filter(None, homes))}; set CUDA_HOME, or GRADMILL_CUDA=0")


def first_line(command):
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
        return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")
    except OSError:
        return "unknown"


def ninja_command():
    try:
        import ninja
        path = shutil.which("ninja", path=ninja.BIN_DIR)
        if path:
            return path
    except ImportError:
        pass
    path = shutil.which("ninja")
    if path is None:
        raise SystemExit("ninja was not found: pip install ninja")
    return path


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        cxx = os.environ.get("GRADMILL_CXX") or os.environ.get("CXX") or shutil.which("g++") or "c++"
        nvcc = find_nvcc()
        archs = os.environ.get("GRADMILL_CUDA_ARCHS", "80 90a 100a 120").replace(",", " ").split()
        tag = f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / (tag + ("-cuda" if nvcc else ""))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_build_info(folder, cxx, nvcc, archs)

        import pybind11
        rules = [
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = C++ $out",
            "rule nvcc\n  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = CUDA $out",
            "rule link\n  command = $cxx -shared -o $out $in $flags\n  description = link $out",
        ]
        # pybind11 and Python headers only for bindings.cpp: in an isolated build their path changes every time.
        includes = f"-I. -isystem '{pybind11.get_include()}' -isystem '{sysconfig.get_path('include')}'"
        edges, objects = [], []

        def compile(rule, source, name, flags):
            path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            edges.append(f"build {name}.o: {rule} {path}\n  flags = {flags}")
            objects.append(f"{name}.o")

        cuda_flag = "-DGRADMILL_WITH_CUDA" if nvcc else ""
        compile("cxx", ROOT / "csrc/bindings.cpp", "bindings", f"{CXXFLAGS} {includes} {cuda_flag}")
        for family, count in FAMILIES.items():
            for level, (number, flags) in list(LEVELS.items())[:count if X86 else 1]:
                compile("cxx", ROOT / f"csrc/cpu/{family}.cpp", f"{family}-{level}",
                        f"{CXXFLAGS} {flags} -DGM_LEVEL={number} -DGM_LEVEL_NAME={level}")
        link = "-static-libstdc++ -static-libgcc" if sys.platform == "linux" else ""
        if nvcc:
            gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
            gencode += " -gencode arch=compute_80,code=compute_80"
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                compile("nvcc", source, f"cuda-{source.stem}", f"{NVCCFLAGS} {gencode} -ccbin {cxx}")
            link += f" -L'{cuda_lib_dir(nvcc)}' -lcudart_static -ldl -lrt -lpthread"
        # Not linked with libgomp: torch, imported first, brings the one OpenMP runtime of the process.
        edges.append(f"build _C.so: link {' '.join(objects)}\n  flags = {link}")
        text = "\n\n".join([f"cxx = {cxx}", f"nvcc = {nvcc or ''}", *rules, *edges, "default _C.so"]) + "\n"
        ninja_file = folder / "build.ninja"
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        command = [ninja_command(), "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename, so that a process that has the old module loaded keeps it.
        temporary = target.with_suffix(".tmp")
        shutil.copy2(folder / "_C.so", temporary)
        os.replace(temporary, target)

    def _write_build_info(self, folder, cxx, nvcc, archs):
        text = "".join(f'#define GM_BUILD_{key} "{value}"\n' for key, value in {
            "CXX": first_line([cxx, "--version"]),
            "NVCC": first_line([nvcc, "--version"]) if nvcc else "",
            "CUDA_ARCHS": " ".join(f"sm_{a}" for a in archs) + " compute_80 (PTX)" if nvcc else "",
        }.items())
        path = folder / "build_info.h"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


setup(ext_modules=[Extension("gradmill._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
