"""gradmill info: what was compiled, what this machine has, and where each op would run. Never raises for a missing part."""
from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

import gradmill
from gradmill.ops import OPS

DEVICES = ("cpu", "cuda")


def collect() -> dict:
    """Everything ``gradmill info`` shows, as plain data (``gradmill info --json`` prints it)."""
    cuda_missing = _cuda_missing()
    return {
        "version": gradmill.__version__,
        "native": _native(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _triton_version(),
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "devices": _devices(),
        "cuda_problem": cuda_missing,
        "ops": {name: {device: _where(op, device, cuda_missing) for device in DEVICES} for name, op in sorted(OPS.items())},
    }


def _native() -> dict:
    cap = os.environ.get("GRADMILL_ISA") or None
    try:
        native = importlib.import_module("gradmill._C")
    except ImportError as error:
        problem = f"gradmill's native module could not be imported ({error}); reinstall gradmill"
        return {"available": False, "problem": problem, "compiler": None, "nvcc": None, "cuda_archs": None, "cuda_problem": problem,
                "isa": None, "detected_isa": None, "isa_cap": cap}
    return {"available": True, "problem": "", "compiler": native.compiler, "nvcc": native.nvcc or None, "cuda_archs": native.cuda_archs or None,
            "cuda_problem": native.cuda_problem(), "isa": native.isa(), "detected_isa": native.detected_isa(), "isa_cap": cap}


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _cuda_missing() -> str:
    """Why there are no CUDA tensors on this machine, or ""."""
    if torch.version.cuda is None:
        return "this torch is a CPU build" if torch.version.hip is None else "this torch is a ROCm build"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device or driver"


def _devices() -> list[dict]:
    devices = [{"device": "cpu", "name": _processor()}]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices.append({"device": f"cuda:{i}", "name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory})
    return devices


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _where(op, device: str, cuda_missing: str) -> dict:
    """{"backend": the one a tensor on device gets, or None; "live": [...]; "not_live": {backend: why}}."""
    status = op.status(device)
    live = [backend for backend, reason in status.items() if not reason]
    runs = (live[0] if live else None) if device == "cpu" or not cuda_missing else None
    return {"backend": runs, "live": live, "not_live": {backend: reason for backend, reason in status.items() if reason}}


# --- the terminal -----------------------------------------------------------------------------------------
def show(console) -> None:
    """Prints :func:`collect` as tables that fit 80 columns."""
    from rich.table import Table
    from rich.text import Text

    info = collect()
    native = info["native"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")

    def fact(name, value):
        facts.add_row(name, Text(value))

    fact("gradmill", info["version"])
    if native["available"]:
        fact("compiled by", native["compiler"])
        fact("CUDA part", f"{native['nvcc']}: {native['cuda_archs']}" if native["nvcc"] else "not compiled")
        isa = f"{native['isa']} (the processor has {native['detected_isa']})"
        fact("instructions", isa + (f", GRADMILL_ISA={native['isa_cap']}" if native["isa_cap"] else ""))
    else:
        fact("native part", native["problem"])
    fact("threads", f"{info['threads']} (torch.set_num_threads), {info['cores']} logical cores")
    fact("Python", f"{info['python']} on {info['platform']}")
    fact("torch", info["torch"] + (f", CUDA {info['torch_cuda']}" if info["torch_cuda"] else ", CPU build"))
    interpreter = ", TRITON_INTERPRET=1" if info["triton_interpreter"] else ""
    fact("triton", (info["triton"] or "not installed") + interpreter)
    for device in info["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB, capability {device['capability']}" if "capability" in device else ""
        fact(device["device"], device["name"] + memory)
    if info["cuda_problem"]:
        fact("cuda", f"none: {info['cuda_problem']}")
    console.print(facts)
    console.print()

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("op", no_wrap=True)
    for device in DEVICES:
        there = device == "cpu" or not info["cuda_problem"]
        table.add_column(f"{device.upper()} tensor{'' if there else '*'}", no_wrap=True)
        table.add_column("also live", style="dim")
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for name, places in info["ops"].items():
        row = [name]
        for device in DEVICES:
            place = places[device]
            row += [place["live"][0] if place["live"] else "nothing", ", ".join(place["live"][1:]) or "-"]
            for backend, reason in place["not_live"].items():
                reasons.setdefault((device, backend, reason), []).append(name)
        table.add_row(*row)
    console.print(table)
    if info["cuda_problem"]:
        console.print(f"* would run there; {info['cuda_problem']}", highlight=False)
    if reasons:
        console.print()
        why = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        why.add_column("not live", no_wrap=True)
        why.add_column("why", overflow="fold")
        why.add_column("ops", overflow="fold")
        for (device, backend, reason), names in reasons.items():
            having = [name for name, op in OPS.items() if backend in op.order[device]]
            why.add_row(f"{backend} on {device}", Text(reason), "all that have it" if len(names) == len(having) else ", ".join(names))
        console.print(why)
