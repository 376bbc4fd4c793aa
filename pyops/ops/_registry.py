"""The one place where ops are defined and dispatched.

An op is a schema, a check, a fake kernel and a table of backends. The check runs once per call, before any pointer
is taken; then the first live backend of the device's row runs. `use_backend` forces one.
"""
from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import sys
import warnings

import torch

_gradmill = sys.modules["gradmill"]  # for gradmill._C: an import statement in a function costs as much as a small op's work

BACKENDS = ("native", "triton", "torch", "reference")

# What may stand between a call and its kernel; a torch without one of these questions always goes through its dispatcher.
Tensor, Parameter, is_compiling = torch.Tensor, torch.nn.Parameter, torch.compiler.is_compiling
_strided = torch.strided
_KINDS = {"Tensor": {Tensor, Parameter}, "int": {int}, "SymInt": {int}, "bool": {bool}, "str": {str}, "ScalarType": {torch.dtype}}  # of a schema's arguments
_dispatch_modes, _function_modes, _tracing = (getattr(torch._C, name, lambda: True) for name in (
    "_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state"))
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)  # what is_grads_batched=True makes
_profiling = getattr(torch.autograd, "_profiler_enabled", lambda: True)

library = torch.library.Library("gradmill", "DEF")
OPS: dict[str, "Op"] = {}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("gradmill_backend", default=None)
#: The gradmill.profile.Profile that watches every op in every thread, or None.
profiler = None


class BackendError(RuntimeError):
    """No backend can run this op on this device, or the native call failed."""


def use_backend(name: str | None):
    """``with gradmill.use_backend(name):`` runs every gradmill op inside the block in one backend.

    Args:
        name: "native" (C++ or CUDA C++), "triton", "torch", "reference", or None for the usual choice.

    Raises:
        ValueError: for an unknown name. An op without that backend raises :class:`BackendError` when it is called.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be None or one of {', '.join(BACKENDS)}")
    return _forcing(name)


@contextlib.contextmanager
def _forcing(name):
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that :func:`use_backend` forces here, or None. None under torch.compile, which cannot look."""
    return None if is_compiling() else _forced.get()


def transforming() -> bool:
    """Whether a transform of torch.func is on. False on a torch that cannot be asked."""
    return _transform() not in (None, True)


def in_forwards_backend(backward):
    """Decorator of an autograd Function's backward: runs it in ``ctx.backend``, where forward left what :func:`forced_backend` said. Backward
    may run in another thread and outside the user's ``with use_backend``."""
    @functools.wraps(backward)
    def run(ctx, *gradients):
        if not is_compiling() and (transforming() or any(map(_batched, gradients))):
            raise RuntimeError("gradmill: a quantised layer's backward takes one gradient at a time, not a batch of them (is_grads_batched=True, vectorize=True, vmap)")
        if ctx.backend is None:
            return backward(ctx, *gradients)
        with use_backend(ctx.backend):
            return backward(ctx, *gradients)
    return run


# --- which backends can run here --------------------------------------------------------------------------
def native_module():
    """gradmill._C; BackendError with the reason where it is missing."""
    if (native := _gradmill._C) is not None:
        return native
    try:  # again, for the reason
        return importlib.import_module("gradmill._C")
    except ImportError as error:
        raise BackendError(f"gradmill's native module could not be imported ({error}); correct GRADMILL_ISA if it is that, else reinstall gradmill") from None


_warned: set[str] = set()


def warn_once(message: str):
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def problem(backend: str, device: str) -> str:
    """Why ``backend`` cannot run on ``device`` ("cpu" or "cuda") here, or ""."""
    if backend in ("reference", "torch"):
        return ""
    if backend == "native":
        try:
            native = native_module()
        except BackendError as error:
            return str(error)
        return native.cuda_problem() if device == "cuda" else ""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if device == "cuda" or interpreted else "Triton runs on CPU tensors only with TRITON_INTERPRET=1"


class Op:
    """One op: call it with the schema's arguments.

    Args:
        name: the op is ``torch.ops.gradmill.<name>``.
        schema: arguments and returns in torch.library's language.
        check: called with the arguments; raises TypeError or ValueError naming the argument.
        values: called after check, but not for the fake kernel: may read what tensors hold.
        fake: called with the arguments; returns empty outputs of the right shape, dtype and device.
        backends: {backend: function} with the op's arguments; a string "module:function" is imported when first used.
        order: {"cpu": (backend, ...), "cuda": (backend, ...)}: the first live one runs.
    """

    def __init__(self, name, schema, check, fake, backends, order, values=None):
        self.name, self.check, self.values, self.backends, self.order = name, check, values, backends, order
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._chosen: dict[str, object] = {}
        for device in ("cpu", "cuda"):
            library.impl(name, self._runner(device), device.upper())

        def fake_kernel(*args, **kwargs):
            check(*args, **kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"gradmill::{name}", fake_kernel, lib=library)
        self._overload = getattr(torch.ops.gradmill, name).default
        schema = self._overload._schema
        self._kinds, self._needed = {a.name: self._kind(str(a.real_type)) for a in schema.arguments}, sum(not a.has_default_value() for a in schema.arguments)
        self._positional = [] if schema.is_mutable else list(self._kinds.values())
        OPS[name] = self

    @staticmethod
    def _kind(type_: str) -> set[type]:
        """Exact types of a schema's argument that need no conversion."""
        if type_.startswith("Optional["):
            return _KINDS.get(type_[len("Optional["):-1], set()) | {type(None)}
        return _KINDS.get(type_, set())

    def __call__(self, *args, **kwargs):
        if is_compiling() or (device := self._plain(args, kwargs)) is None:
            return self._overload(*args, **kwargs)
        return self._run(device, args, kwargs)  # what the dispatcher would do, 4 us sooner

    def _plain(self, args, kwargs) -> str | None:
        """"cpu" or "cuda" where this call would go through torch's dispatcher straight to that device's kernel, else None: nothing is
        written in place, nothing to convert, to refuse or to differentiate, no subclass, no mode, transform, trace or torch.profiler that would want to see it."""
        device, grad, kinds = None, torch.is_grad_enabled(), self._positional
        if len(args) > len(kinds) or len(args) + len(kwargs) < self._needed:
            return None
        if kwargs:
            args, kinds = (*args, *kwargs.values()), (*kinds[:len(args)], *[self._kinds.get(name, ()) for name in kwargs])
        for x, allowed in zip(args, kinds):
            kind = type(x)
            if kind not in allowed:
                return None
            if kind is Tensor or kind is Parameter:
                if grad and x.requires_grad or x.is_neg() or x._is_zerotensor():  # the last two: views without memory of their own values
                    return None
                if x.is_cpu:
                    device = device or "cpu"
                elif x.is_cuda:
                    device = "cuda"
                else:
                    return None
        return None if _dispatch_modes() or _function_modes() or _transform() or _tracing() or _profiling() else device

    def _runner(self, device):
        return lambda *args, **kwargs: self._run(device, args, kwargs)

    def _run(self, device, args, kwargs):
        if profiler is not None:
            return self._watched(device, args, kwargs)
        self.check(*args, **kwargs)
        if self.values is not None:
            self.values(*args, **kwargs)
        return self.function(device)(*args, **kwargs)

    def _watched(self, device, args, kwargs):
        watched, result = profiler.start(self, device, args, kwargs), None
        try:
            self.check(*args, **kwargs)
            if self.values is not None:
                self.values(*args, **kwargs)
            result = self.function(device)(*args, **kwargs)
            return result
        finally:
            if watched is not None:
                watched.stop(result)

    def status(self, device: str) -> dict[str, str]:
        """{backend: "" if live on ``device``, else the reason it is not}, in the order they are tried."""
        return {b: problem(b, device) for b in self.order[device]}

    def backend(self, device: str) -> str:
        """The backend a call on ``device`` would run in now."""
        forced = _forced.get()
        if forced is not None:
            if forced not in self.order[device]:
                raise BackendError(f"{self.name} has no {forced} backend on {device}; it has {', '.join(self.order[device])}")
            reason = problem(forced, device)
            if reason:
                raise BackendError(f"{self.name}: backend {forced} cannot run on {device}: {reason}")
            return forced
        reasons = []
        for name in self.order[device]:
            reason = problem(name, device)
            if not reason:
                if reasons and name != "reference":
                    warn_once(f"gradmill uses {name} on {device}, because {reasons[0]}")
                elif reasons:
                    warn_once(f"gradmill runs its slow reference on {device}: {'; '.join(reasons)}")
                return name
            reasons.append(f"{name} cannot run: {reason}")
        raise BackendError(f"{self.name}: no backend can run on {device}: {'; '.join(reasons)}")

    def function(self, device: str):
        """The function a call on ``device`` runs."""
        key = (device, _forced.get())
        found = self._chosen.get(key)
        if found is None:
            name = self.backend(device)
            found = self.backends[name]
            if isinstance(found, str):
                module, attribute = found.split(":")
                found = self.backends[name] = getattr(importlib.import_module(module), attribute)
            self._chosen[key] = found
        return found


def readable(x: torch.Tensor) -> bool:
    """Whether Python may look at x's values: plain memory, no mode or transform on, no CUDA graph being captured."""
    return (type(x) in (Tensor, Parameter) and (x.is_cpu or x.is_cuda and not torch.cuda.is_current_stream_capturing())
            and not (_dispatch_modes() or _function_modes() or _transform() or _tracing()))


# --- what native calls need -------------------------------------------------------------------------------
def where(tensor: torch.Tensor) -> tuple[int, int]:
    """(device index, stream) for native calls: (-1, 0) on CPU."""
    if not tensor.is_cuda:
        return -1, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def key_tuple(key: torch.Tensor | None, stream: int):
    """(seed, step, stream) for native calls, or None."""
    if key is None:
        return None
    seed, step = key.tolist()
    return seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF, stream & 0xFFFFFFFF


# --- checks shared by all families ------------------------------------------------------------------------
def describe(x) -> str:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} on {x.device}"


def reject(op: str, argument: str, got, want, error: type = ValueError):
    """Raises ``error`` naming the op's argument, what it got and what it wants. Guarded by an ``if`` at the call, so
    that no message is built for good arguments."""
    raise error(f"gradmill.{op}: {argument} is {describe(got) if isinstance(got, torch.Tensor) else repr(got)}; it must be {want}")


def short(dtypes) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def require_matrix(op: str, argument: str, x: torch.Tensor, dtypes, shape=None, device=None, contiguous=False):
    """A strided 2-D tensor of one of ``dtypes``; ``shape`` entries of None are free."""
    size = x.shape
    if (x.dtype in dtypes and x.layout is _strided and len(size) == 2
            and (shape is None or (shape[0] is None or shape[0] == size[0]) and (shape[1] is None or shape[1] == size[1]))
            and (device is None or x.device == device) and (not contiguous or x.is_contiguous())):
        return
    if x.dtype not in dtypes:
        reject(op, argument, x, short(dtypes), TypeError)
    if x.layout != torch.strided:
        reject(op, argument, str(x.layout), "a dense (strided) tensor", TypeError)
    if x.dim() != 2:
        reject(op, argument, x, "2-D")
    if shape is not None and not all(want is None or want == got for want, got in zip(shape, size)):
        reject(op, argument, x, f"of shape ({', '.join('any' if s is None else str(s) for s in shape)})")
    if device is not None and x.device != device:
        reject(op, argument, x, f"on {device}")
    reject(op, argument, f"{describe(x)} with strides {x.stride()}", "contiguous")


def require_key(op: str, key: torch.Tensor | None):
    if key is not None and not (key.dtype == torch.int64 and key.shape == (2,) and key.device.type in ("cpu", "meta")):
        reject(op, "key", key, "an int64 CPU tensor [seed, step]")
