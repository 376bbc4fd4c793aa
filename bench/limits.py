"""What this machine can do at best, measured before anything is compared with it, and what machine it is."""
from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

HERE = pathlib.Path(__file__).parent
LEVELS = ("portable", "avx2", "avx512", "avx512_vnni")
#: Environment that holds gradmill and torch's three CPU libraries to an instruction set: `run.py --isa`.
ISA_ENVIRONMENT = {
    level: {"GRADMILL_ISA": level, "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn}
    for level, aten, mkl, onednn in (("portable", "default", "SSE4_2", "SSE41"), ("avx2", "avx2", "AVX2", "AVX2"),
                                     ("avx512", "avx512", "AVX512", "AVX512_CORE"), ("avx512_vnni", "avx512", "AVX512", "AVX512_CORE_VNNI"))}

#: name -> (unit, what it is)
MEANING = {
    "copy": ("B/s", "y.copy_(x), 2 x 4 bytes per element"),
    "triad": ("B/s", "torch.add(b, c, alpha=s, out=a), 3 x 4 bytes per element"),
    "update": ("B/s", "x.mul_(s) in place, 2 x 4 bytes per element"),
    "read": ("B/s", "x.sum(), 4 bytes per element"),
    "fp32": ("FLOP/s", "fp32 multiply-adds in registers (peaks.c)"),
    "int8": ("OP/s", "exact int8 multiply-adds in registers (peaks.c)"),
    "int7": ("OP/s", "the same with codes in [-64, 63] (peaks.c)"),
    "popcount": ("OP/s", "products of signs in registers: xor + popcount, or table lookups (peaks.c)"),
    "fp32 matmul": ("FLOP/s", "torch fp32 matmul"),
    "bf16 matmul": ("FLOP/s", "torch bf16 matmul"),
    "int8 matmul": ("OP/s", "torch._int_mm"),
}


# --- the machine ------------------------------------------------------------------------------------------
def describe(device: str) -> dict:
    """Everything a reader needs to judge a number, as plain data."""
    import gradmill
    native = gradmill._C
    facts = {
        "cpu": cpu_model(), "cores": os.cpu_count(), "cache_bytes": cache_bytes(), "threads": torch.get_num_threads(),
        "isa": native.isa() if native else "none: the native module is missing",
        "detected_isa": native.detected_isa() if native else None, "compiler": native.compiler if native else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(), "platform": platform.platform(),
        "gradmill": gradmill.__version__, "commit": commit(), "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {k: os.environ[k] for k in sorted({k for e in ISA_ENVIRONMENT.values() for k in e} | {"TORCH_BLAS_PREFER_CUBLASLT"})
                        if k in os.environ},
        "command": " ".join(["python bench/run.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
                        "cuda": torch.version.cuda}
    return facts


def cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """Of the last-level cache; 32 MiB where the system does not say."""
    sizes = [0]
    for file in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG") or 0) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes) or 32 << 20


def commit() -> str | None:
    """The checkout's commit, + if a tracked file differs from it; None where this folder was installed."""
    if not (HERE.parent / "pyproject.toml").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"], capture_output=True,
                              text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


CHILDREN: set[int] = set()   # processes that work for a case: not others


class OtherWork:
    """Share of the processors this process (and CHILDREN) may use that went to others (a hypervisor's too) since construction,
    from /proc/stat; None where there is none. Timings taken beside other work can be steady and still wrong by a factor: an
    OpenMP barrier waits whole time slices for a thread that is not running."""

    def __init__(self):
        self._start = self._read()

    @staticmethod
    def _read():
        try:
            cpus = {f"cpu{k}" for k in os.sched_getaffinity(0)}
            busy = 0
            for line in pathlib.Path("/proc/stat").read_text().splitlines():
                name, *ticks = line.split()
                if name in cpus:
                    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, ticks[:8])
                    busy += user + nice + system + irq + softirq + steal
            tick, own = os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])   # ended children's too
            for pid in CHILDREN:
                own += sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / tick
            return time.perf_counter(), busy / tick, own, len(cpus)
        except (OSError, AttributeError, ValueError):
            return None

    def share(self) -> float | None:
        now = self._read()
        if now is None or self._start is None or now[0] - self._start[0] < 0.1:
            return None
        elapsed, busy, own = (now[k] - self._start[k] for k in range(3))
        return max(0.0, busy - own) / (elapsed * now[3])


# --- limits -----------------------------------------------------------------------------------------------
def measure(ctx, timer, seconds: float) -> dict[str, float]:
    """{name: bytes or operations per second}, about ``seconds`` in all. A limit is the best seen, not the median."""
    n = 1 << 12 if ctx.tiny else max(16 << 20, ctx.cache_bytes)  # elements: each buffer four times the cache
    a, b, c = (torch.ones(n, device=ctx.device) for _ in range(3))
    side = 64 if ctx.tiny else 8192 if ctx.device == "cuda" else 1024
    x = torch.randn(side, side, device=ctx.device)
    i8 = torch.ones(side, side, dtype=torch.int8, device=ctx.device)
    ops = 2.0 * side ** 3
    runs = {"copy": (8.0 * n, lambda i: b.copy_(a)), "triad": (12.0 * n, lambda i: torch.add(b, c, alpha=3.0, out=a)),
            "update": (8.0 * n, lambda i: c.mul_(1.0)), "read": (4.0 * n, lambda i: a.sum()), "fp32 matmul": (ops, lambda i: x @ x),
            "int8 matmul": (ops, lambda i: torch._int_mm(i8, i8.t()))}
    if ctx.device == "cuda":
        half = x.to(torch.bfloat16)
        runs["bf16 matmul"] = (ops, lambda i: half @ half)
    found = {}
    for name, (amount, run) in runs.items():
        try:
            timer.sample(run, 0, 1)  # warm-up
            found[name] = amount / best(lambda: timer.sample(run, 0, 1), seconds / (len(runs) + 2))
        except Exception:   # not here: what is bound by it shows no fraction
            continue
    if ctx.device == "cpu":
        found |= registers(ctx.isa, torch.get_num_threads(), seconds / (len(runs) + 2))
    found.setdefault("fp32", found.get("fp32 matmul", 0.0))
    found.setdefault("int8", found.get("int8 matmul", 0.0))
    found.setdefault("int7", found["int8"])
    return found


def best(sample, seconds: float) -> float:
    times, end = [sample()], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(sample())
    return min(times)


def registers(level: str, threads: int, seconds: float) -> dict[str, float]:
    """{"fp32": ..., "int8": ..., "int7": ..., "popcount": ...} of peaks.c on all threads; {} without a C compiler or on another processor family."""
    library = _peaks()
    found = {}
    if library is None or level not in LEVELS:
        return found
    for kind in ("fp32", "int8", "int7", "popcount"):
        names = [f"{kind}_{name}" for name in LEVELS[:LEVELS.index(level) + 1]]
        functions = [getattr(library, name) for name in names if hasattr(library, name)]
        if not functions:
            continue
        function = functions[-1]  # the widest that the level allows
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long]
        rounds = 300_000  # some milliseconds
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter lock
            def run():
                start = time.perf_counter()
                total = sum(pool.map(function, [rounds] * threads))
                return (time.perf_counter() - start) / total
            found[kind] = 1 / best(run, seconds)
    return found


def _peaks():
    global _library
    if _library == "unset":
        _library = None
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler and platform.machine().lower() in ("x86_64", "amd64"):
            with tempfile.TemporaryDirectory() as folder:
                out = os.path.join(folder, "peaks.so")
                done = subprocess.run([*compiler.split(), "-O2", "-shared", "-fPIC", "-o", out, str(HERE / "peaks.c")], capture_output=True)
                if done.returncode == 0:
                    _library = ctypes.CDLL(out)
    return _library


_library = "unset"


# --- does a cap on the instruction set hold torch too? ----------------------------------------------------
_PROBE = """
import time, torch
torch.set_num_threads({threads})
def rate(f, n=2 * 768 ** 3, times=12):
    f(); best = 1e9
    for _ in range(times):
        t = time.perf_counter(); f(); best = min(best, time.perf_counter() - t)
    return n / best
x, i, big = torch.randn(768, 768), torch.ones(768, 768, dtype=torch.int8), torch.randn(1 << 18)
print(rate(lambda: x @ x), rate(lambda: torch._int_mm(i, i.t()), times=4), rate(lambda: big.erf(), 1 << 18))
"""


def check_cap(level: str, threads: int, rounds: int = 3) -> dict:
    """Speeds of torch with and without ISA_ENVIRONMENT[level], in turns, each in a process of its own.

    {what: {"capped": rate, "free": rate}}; "fp32 in registers" says whether a drop was to be expected at all: a
    processor that splits 512-bit operations in two has the same fp32 peak at both widths.
    """
    free = {k: v for k, v in os.environ.items() if k not in ISA_ENVIRONMENT[level]}
    capped = free | ISA_ENVIRONMENT[level]
    names = ("torch fp32 matmul", "torch._int_mm", "torch.erf")
    seen = {kind: [] for kind in ("capped", "free")}
    for _ in range(rounds):
        for kind, environment in (("capped", capped), ("free", free)):
            done = subprocess.run([sys.executable, "-c", _PROBE.format(threads=threads)], env=environment, capture_output=True, text=True)
            if done.returncode == 0:
                seen[kind].append([float(x) for x in done.stdout.split()])
    if not (seen["capped"] and seen["free"]):
        return {}
    rates = {name: {kind: statistics.median(r[k] for r in runs) for kind, runs in seen.items()} for k, name in enumerate(names)}
    import gradmill
    both = {kind: registers(isa, threads, 0.2) for kind, isa in (("capped", level), ("free", gradmill._C.detected_isa()))}
    for unit in ("fp32", "int8", "popcount"):
        if all(unit in peaks for peaks in both.values()):
            rates[f"{unit} in registers"] = {kind: peaks[unit] for kind, peaks in both.items()}
    return rates
