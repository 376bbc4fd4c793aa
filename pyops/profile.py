"""What gradmill's ops cost in the user's own run: ``with gradmill.profile() as p:`` and ``gradmill profile -- python train.py``."""
from __future__ import annotations

import collections
import io
import math
import os
import runpy
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import torch

import gradmill
from gradmill.ops import OPS, _registry

__all__ = ["Profile", "Row", "profile"]


@dataclass
class Row:
    """The calls of one op in one backend on one kind of device."""

    op: str
    device: str           #: "cpu" or "cuda"
    backend: str
    calls: int = 0
    seconds: float = 0.0  #: without the gradmill ops that it called itself
    bytes_read: int = 0
    bytes_written: int = 0
    share: float = 0.0    #: of the block's wall time; calls in several threads at once can add up to more than 1

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


def profile() -> "Profile":
    """``with gradmill.profile() as p:`` counts and times every gradmill op inside the block, in all threads (autograd's too).

    Afterwards ``p.rows`` holds a :class:`Row` per op, device and backend, the longest first, ``p.wall`` the block's seconds and
    ``p.hints`` what could be faster; ``print(p)`` shows a table.

    Time is of the whole call behind torch's dispatcher: argument checks and the kernel. On CUDA it is what lies between two
    events on the current stream, so nothing waits but the end of the block; calls captured into a CUDA graph are counted,
    not timed, and a graph's replays are not seen.

    Bytes come from the tensors' sizes, not from counters in the processor: every tensor argument is read once, what the
    op changes in place is written once more, and every result is written once. An expanded dimension counts once. Caches
    may save some of it, and a kernel that walks twice costs more.

    Raises:
        RuntimeError: on entering while another profile runs, in whatever thread.
    """
    return Profile()


class Profile:
    """See :func:`profile`."""

    def __init__(self):
        self.rows: list[Row] = []
        self.hints: list[str] = []
        self.wall = 0.0
        self._rows: dict[tuple, Row] = {}
        self._pending: collections.deque[_Call] = collections.deque()  # CUDA calls whose events may not have passed yet
        self._layers: dict[tuple, int] = {}  # (recipe, *shape): calls
        self._lock = threading.Lock()
        self._here = threading.local()

    def __enter__(self) -> "Profile":
        with _entering:
            if _registry.profiler is not None:
                raise RuntimeError("gradmill.profile: another profile runs already; only one can, because it watches all threads")
            _registry.profiler = self
        _synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_):
        _synchronize()
        self.wall += time.perf_counter() - self._started
        _registry.profiler = None
        with self._lock:
            self._settle()
            self.rows = sorted(self._rows.values(), key=lambda row: -row.seconds)
            for row in self.rows:
                row.share = row.seconds / self.wall
        self.hints = [*_backend_hints(self.rows), *_machine_hints(self.rows), *_recipe_hints(self._layers)]

    # --- called by ops and layers -------------------------------------------------------------------------------
    def start(self, op, device, args, kwargs) -> "_Call":
        calls = self._here.__dict__.setdefault("calls", [])
        call = _Call(self, op, device, args, kwargs, calls)
        calls.append(call)
        call.start()
        return call

    def see(self, layer: "gradmill.nn.Linear | gradmill.nn.Conv2d"):
        """Called by a layer's forward: an op does not know its recipe."""
        if layer.weight.device.type == "cpu" and layer.measured_as:
            key = layer.recipe.name, *layer.measured_as
            with self._lock:
                self._layers[key] = self._layers.get(key, 0) + 1

    def _add(self, call: "_Call"):
        with self._lock:
            if call.events is None:
                self._count(call)
                return
            self._pending.append(call)
            if len(self._pending) % 1024 == 0:  # a long run must not keep all its events
                while self._pending and self._pending[0].events[1].query():
                    self._count(self._pending.popleft())

    def _settle(self):
        while self._pending:
            self._count(self._pending.popleft())

    def _count(self, call: "_Call"):
        key = call.op.name, call.device, call.backend
        row = self._rows.setdefault(key, Row(*key))
        row.calls += 1
        row.seconds += call.seconds() - sum(inner.seconds() for inner in call.inner)
        row.bytes_read += call.read
        row.bytes_written += call.written

    # --- what it says -----------------------------------------------------------------------------------------
    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        self.show(Console(file=text, width=100))
        return text.getvalue().rstrip()

    def show(self, console):
        """Prints the table and the hints to a rich console."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"gradmill.profile: {_seconds(self.wall)} of wall time", title_justify="left", box=None, padding=(0, 1, 0, 0),
                      header_style="bold")
        table.add_column("op", overflow="fold")
        for name in ("calls", "time", "per call", "of wall", "bytes", "B/s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("runs in", no_wrap=True)
        for row in self.rows:
            rate = _amount(row.bytes / row.seconds) + "/s" if row.seconds > 0 else ""
            table.add_row(row.op, f"{row.calls:,}", _seconds(row.seconds), _seconds(row.seconds / row.calls), f"{100 * row.share:.1f}%",
                          _amount(row.bytes), rate, f"{row.backend}, {row.device}")
        total = sum(row.seconds for row in self.rows)
        table.add_row("all", f"{sum(row.calls for row in self.rows):,}", _seconds(total), "", f"{100 * total / self.wall if self.wall else 0:.1f}%",
                      _amount(sum(row.bytes for row in self.rows)), style="bold")
        console.print(table)
        for hint in self.hints:
            console.print(Text(f"! {hint}", style="yellow"))
        console.print(Text("bytes: each tensor argument read once, what changes in place and each result written once", style="dim"))


_entering = threading.Lock()


class _Call:
    """One call of an op, on a stack of its thread's calls."""

    def __init__(self, profile, op, device, args, kwargs, stack):
        self.profile, self.op, self.device, self.stack, self.inner = profile, op, device, stack, []
        self.backend = op.backend(device)
        self.read, self.written, index = _argument_bytes(op, args, kwargs)
        self.events = self.stream = None
        self.timed = True
        if device == "cuda":
            self.stream = torch.cuda.current_stream(index)
            self.timed = not torch.cuda.is_current_stream_capturing()
            if self.timed:
                self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def start(self):
        if self.events is not None:
            self.events[0].record(self.stream)
        self.began = time.perf_counter()

    def stop(self, result):
        self.took = time.perf_counter() - self.began
        if self.events is not None:
            self.events[1].record(self.stream)
        self.stack.pop()
        if self.stack:
            self.stack[-1].inner.append(self)
        self.written += _nbytes(result)
        self.profile._add(self)

    def seconds(self) -> float:
        if not self.timed:
            return 0.0
        return self.took if self.events is None else self.events[0].elapsed_time(self.events[1]) * 1e-3


def _synchronize():
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _nbytes(x) -> int:
    """Bytes of a tensor or of many; an expanded dimension counts once."""
    if isinstance(x, torch.Tensor):
        return x.element_size() * math.prod(size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride()))
    return sum(map(_nbytes, x)) if isinstance(x, (list, tuple)) else 0


def _argument_bytes(op, args, kwargs) -> tuple[int, int, int | None]:
    """(bytes read, bytes written in place, the CUDA device's index or None)."""
    read = written = 0
    index = None
    schema = op._overload._schema.arguments
    for argument, value in [*zip(schema, args), *((a, kwargs[a.name]) for a in schema[len(args):] if a.name in kwargs)]:
        size = _nbytes(value)
        read += size
        written += size if argument.alias_info is not None and argument.alias_info.is_write else 0
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if index is None and isinstance(x, torch.Tensor) and x.is_cuda:
                index = x.device.index
    return read, written, index


# --- what could be faster ---------------------------------------------------------------------------------
def _backend_hints(rows: list[Row]) -> list[str]:
    found: dict[tuple, list[str]] = {}
    for row in rows:
        first = OPS[row.op].order[row.device][0]
        if row.backend != first:
            reason = _registry.problem(first, row.device) or "use_backend asked for it"
            found.setdefault((row.backend, row.device, first, reason), []).append(row.op)
    return [f"{', '.join(names)} ran in {'the slow reference' if backend == 'reference' else backend} on {device}, not in {first}: {reason}"
            for (backend, device, first, reason), names in found.items()]


def _machine_hints(rows: list[Row]) -> list[str]:
    if not any(row.device == "cpu" and row.backend == "native" for row in rows):
        return []
    hints, native, threads = [], gradmill._C, torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if native.isa() != native.detected_isa():
        hints.append(f"gradmill ran {native.isa()} code, and this processor has {native.detected_isa()}: unset GRADMILL_ISA")
    elif native.isa() == "portable":
        hints.append("gradmill ran its portable code: this processor has no instruction set that it has kernels for")
    if threads == 1 < cores:
        hints.append(f"one thread, and this process may use {cores} processors: torch.set_num_threads({cores}), or OMP_NUM_THREADS")
    return hints


def _recipe_hints(layers: dict[tuple, int]) -> list[str]:
    from gradmill import speeds
    from gradmill.convert import SLOWER

    slow = [(speed, *layer) for layer in layers if (speed := speeds.measured(*layer)) is not None and speed < SLOWER]
    return [f"recipe {recipe} was measured at {speed:.2g}x the speed of torch's fp32 at layers like {inputs} -> {outputs}"
            f"{', window ' * bool(window)}{'x'.join(map(str, window))} on this kind of CPU ({layers[recipe, inputs, *window, outputs]:,} forwards): "
            "it saves memory there, not time" for speed, recipe, inputs, *window, outputs in sorted(slow)]


# --- numbers as people read them --------------------------------------------------------------------------
def _seconds(t: float) -> str:
    return f"{t:.3g} s" if t >= 1 else f"{t * 1e3:.3g} ms" if t >= 1e-3 else f"{t * 1e6:.3g} us"


def _amount(x: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g} {prefix}B"
    return f"{x:.0f} B"


# --- the command ------------------------------------------------------------------------------------------
def run(command: list[str], console) -> int:
    """Runs ``[python] script.py ...`` or ``[python] -m module ...`` as ``__main__`` in this interpreter under :func:`profile`, prints the
    table, also after an exception, and returns the program's exit code.

    Raises:
        ValueError: where ``command`` names no script or module that is there, or options of python that this cannot follow.
    """
    words = command[1:] if command and os.path.basename(command[0]).lower().startswith("python") else command
    module = words[:1] == ["-m"]
    words = words[1:] if module else words
    if not words or words[0].startswith("-"):
        raise ValueError(f"{repr(' '.join(command)) if command else 'the command line'} names no program to watch; give [python] script.py ..., or [python] -m module ...")
    if not module and not os.path.exists(words[0]):
        raise ValueError(f"there is no script {words[0]!r}")
    before, path = sys.argv, list(sys.path)
    sys.argv = list(words)
    if not getattr(sys.flags, "safe_path", False):  # as python itself does
        sys.path.insert(0, os.getcwd() if module else os.path.dirname(os.path.realpath(words[0])))
    p = Profile()
    try:
        with p:
            code = _run_main(words[0], module)
    finally:
        sys.argv, sys.path[:] = before, path
    sys.stdout.flush()
    console.print()
    p.show(console)
    return code


def _run_main(name: str, module: bool) -> int:
    """The exit code that python would have."""
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("KeyboardInterrupt", file=sys.stderr)
        return 130
    except BaseException as error:
        at = error.__traceback__
        ours = __file__, runpy.__file__, "<frozen runpy>"
        while at is not None and at.tb_frame.f_code.co_filename in ours:
            at = at.tb_next
        if at is None and isinstance(error, ImportError):  # what it is to run is not there
            raise ValueError(str(error)) from None
        traceback.print_exception(type(error), error, at)
        return 1
    return 0
