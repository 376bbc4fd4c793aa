"""FusedOptimizer: what every gradmill optimizer shares. A subclass names its rule and its hyperparameters."""
from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections import defaultdict
from dataclasses import asdict, dataclass
from operator import is_
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from gradmill import formats
from gradmill.formats import SPLIT, Format, cached
from gradmill.ops._registry import describe, native_module, short
from gradmill.ops.optim import MAX_SCALARS, Launch, as_matrix_shape, fused_step, measure, repeats_on
from gradmill.ops.quant import FLOATS, dequantize, quantize
from gradmill.optim import staging
from gradmill.optim.projection import FIELDS as PROJECTION_FIELDS
from gradmill.optim.projection import COMING, QUEUE, Projected, Projection, later
from gradmill.optim.rules import RULES, number
from gradmill.reference import optim as reference
from gradmill.reference.optim import as_matrix
from gradmill.reference.quant import join_float
from gradmill.weight import QuantizedWeight

#: How ``states=`` stores what a rule calls a moment8 (signed) and a square8 (a second moment). A square's code has no zero
#: and is dithered, so that no second moment is flushed or freezes: docs/results/state_codes.md.
QUANTIZED = {
    "int8": {"moment8": cached("moment8", 256), "square8": cached("square8", 256)},
    "fp8": {"moment8": cached("e4m3", 256), "square8": cached("square8", 256)},
    "int4": {"moment8": cached("moment4", 128), "square8": cached("square4", 128)},
}
STATES = ("fp32", "bf16", *QUANTIZED)
#: Parameters that may have low bits: uint8 of the parameter's shape and one dimension more, a byte or two (two bytes are
#: little-endian; an int16 tensor neither gloo nor NCCL would send).
LOW_BITS = (torch.bfloat16, torch.float16)
MIN_ROW = 64           # rows shorter than this stay fp32: a scale per row would cost as much as it saves


# Group options that say how states are stored: a loaded checkpoint does not change them.
STORAGE = ("states", "min_quantized_numel", "master_weight_bits", "projection", "capturable", "offload")

#: What a step does with a nan or an inf in any gradient.
ON_NONFINITE = ("propagate", "skip", "raise")


class CheckpointError(ValueError):
    """A checkpoint does not fit or is damaged. What was to be loaded into is as it was."""


class Item(NamedTuple):
    """One tensor's work in a step: what fused_step needs of it."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict
    step: int | torch.Tensor  # a tensor: on the device, -1 where it is to be skipped
    options: dict = {}  # in place of the group's, for the rule's scalars
    offset: int = 0     # its first element's number in the whole tensor: above 0 in a shard
    owner: torch.Tensor | None = None  # the optimizer's parameter, whole


def split_code(dtype: torch.dtype, low: torch.Tensor) -> str:
    """The code (formats.SPLIT) of a weight of ``dtype`` whose low bits are ``low``."""
    return f"{formats.float_code(dtype)}+{8 * low.shape[-1]}"


def low_view(low: torch.Tensor) -> torch.Tensor:
    """This process's low bits as kernels take them: uint8 or int16 of the parameter's shape, sharing memory."""
    low = local(low)
    return (low if low.shape[-1] == 1 else low.view(torch.int16)).view(low.shape[:-1])


def stored_format(code: str, codes: torch.Tensor, columns: int) -> Format | None:
    """The format of a state that its rule calls ``code``, from its codes for rows of ``columns``; None if there is none such."""
    for formats_of in QUANTIZED.values():
        format = formats_of.get(code)
        if format and codes.dtype == format.code_dtype and codes.dim() == 2 and codes.shape[1] == format.code_columns(columns):
            return format
    return None


def full_precision(t: torch.Tensor) -> torch.dtype:
    """float64 for a float64 tensor, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def plain_dtype(format: Format, like: torch.Tensor) -> torch.dtype:
    """The dtype of a state without codes, of a tensor like ``like``."""
    return torch.float64 if like.dtype == torch.float64 else format.code_dtype


# --- sharded tensors (FSDP2's DTensor) ----------------------------------------------------------------------
_PLAIN = (torch.Tensor, torch.nn.Parameter, QuantizedWeight)


def is_sharded(t) -> bool:
    """Whether t is a DTensor (asked by type first: this runs for every parameter of every step)."""
    return type(t) not in _PLAIN and hasattr(t, "to_local")


def local(t: torch.Tensor) -> torch.Tensor:
    """This process's part of t, sharing its memory; t itself unless it is a DTensor."""
    return t.to_local() if is_sharded(t) else t


def shard_offset(p) -> int:
    """The number of the first element of p's local part in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    _, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return start[0] * p.shape[1:].numel() if start else 0


def check_placements(p):
    """Only whole rows can be sharded: blocks and element numbers run along rows."""
    for placement in p.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise TypeError(f"a parameter of shape {tuple(p.shape)} is placed {p.placements}; gradmill.optim steps DTensors that are sharded "
                            "along their first dimension (as fully_shard does), or replicated")


def like_shards(t: torch.Tensor, p, shape) -> torch.Tensor:
    """t, made for p's local part, as a DTensor of ``shape`` placed as p is; t itself if p is no DTensor."""
    if not is_sharded(p):
        return t
    from torch.distributed.tensor import DTensor
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def measured(tensors, limits=None, device=None) -> torch.Tensor:
    """gradmill.ops.measure of tensors of any dtypes and devices, float64 (tensors, 2) on CPU; with ``device`` there, without
    waiting for it. DTensors count whole: their
    shards' sums are added and their largest magnitudes compared between the processes, one all-reduce each."""
    out, rows = torch.zeros(len(tensors), 2, dtype=torch.float64, device="cpu"), {}
    buckets = defaultdict(list)
    for i, t in enumerate(tensors):
        buckets[t.dtype, t.device, (t.device_mesh, t.placements) if is_sharded(t) else None].append(i)
    for (_, _, sharding), members in buckets.items():
        ours = [local(tensors[i]) for i in members]
        found = (reference.measure if ours[0].dtype == torch.float64 else measure)(ours, None if limits is None else limits[members])
        for dim, placement in enumerate(sharding[1] if sharding else ()):
            if placement.is_shard():
                group, sums, largest = sharding[0].get_group(dim), found[:, 0].contiguous(), found[:, 1].contiguous().view(torch.int64)
                torch.distributed.all_reduce(sums, group=group)
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)  # as integers, a nan is the largest
                found = torch.stack((sums, largest.view(torch.float64)), 1)
        if device is None:
            out[members] = found.cpu()
        elif len(buckets) == 1:
            return found
        else:
            rows.update(zip(members, found))
    return out if device is None else torch.stack([rows[i] for i in range(len(tensors))])


def state_nbytes(optimizer: Optimizer) -> int:
    """Exact bytes of an optimizer's state tensors (any torch optimizer), step counters aside."""
    return sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step")


def counts_on(device: torch.device) -> bool:
    """Whether steps can be counted, and skipped, on this device, while the host has gone on."""
    return device.type == "cuda"


def repeatable(p, item) -> bool:
    """Whether a Plan can step this parameter: plain memory throughout, and its step counted as fp32 on the CPU, or where it is."""
    step = item.state["step"]
    return (type(p) in (torch.Tensor, torch.nn.Parameter) and p.dtype != torch.float64 and "next_refresh" not in item.state and step.dtype == torch.float32 and step.numel() == 1
            and step.device == (p.device if isinstance(item.step, torch.Tensor) else torch.device("cpu")) and repeats_on(p.device.type) and p.numel() > 0
            and all(t.is_contiguous() and not t.is_neg() for t in (p, item.grad, *item.state.values()) if isinstance(t, torch.Tensor)))


def plain_precision():
    """Autocast off, where it is on: it would round the matmuls of a step (projections, Newton-Schulz) to bf16."""
    stack = contextlib.ExitStack()
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def padded(scalars) -> tuple[float, ...]:
    """scalars as fused_step takes a row of them."""
    return (*scalars, *[0.0] * (MAX_SCALARS - len(scalars)))


def table_of(scalars, counts: torch.Tensor) -> torch.Tensor:
    """A row of scalars for each of ``counts``, made on their device of numbers and of float64 tensors, of one element or one per count."""
    columns = [v.to(torch.float64) if isinstance(v, torch.Tensor) and v.device == counts.device else
               torch.full((), float(v), dtype=torch.float64, device=counts.device) for v in scalars]
    table = torch.stack([v.expand(len(counts)) for v in columns], 1).to(torch.float32)
    return torch.nn.functional.pad(table, (0, MAX_SCALARS - len(columns)))


class Coming(NamedTuple):
    """A basis that is being computed beside training: for which state, the step that takes it, and in which process."""

    future: object
    state: dict
    adopt_at: int
    process: int


class Plan:
    """A group's step that can be repeated as it was: its launches, and how to find out that every tensor still is where it was.

    It keeps no state alive: who clears or replaces states to free memory frees it."""

    def __init__(self, rule, params, states, launches, live):
        self.rule, self.params, self.launches, self.live = rule, params, launches, live  # live: counted on the device
        self._states = [(id(state), len(state), state["rng_id"]) for state in states]
        self._tensors = [(i, name, weakref.ref(t)) for i, state in enumerate(states) for name, t in state.items() if isinstance(t, torch.Tensor)]
        self._pointers = [p.data_ptr() for p in params] + [states[i][name].data_ptr() for i, name, _ in self._tensors]

    def fits(self, params, state) -> bool:
        """Whether these are the same parameters, and ``state``, the optimizer's, holds the same tensors, all in the same memory."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        states = [state.get(p, {}) for p in params]
        if [(id(s), len(s), s.get("rng_id")) for s in states] != self._states:
            return False
        tensors = [states[i].get(name) for i, name, _ in self._tensors]
        return (all([t is not None and t is ref() for t, (*_, ref) in zip(tensors, self._tensors)]) and all([p.is_contiguous() for p in params])
                and [p.data_ptr() for p in params] + [t.data_ptr() for t in tensors] == self._pointers)


@dataclass
class _Kept:
    """Carries a state tensor past torch's load_state_dict, which would cast it to the parameter's dtype."""

    tensor: torch.Tensor


@torch._disable_dynamo  # as torch's own optimizers: torch.compiler.disable would import dynamo, and triton with it, along with gradmill (2 s)
def _uncompiled(optimizer, closure):
    return optimizer._step(closure)


class FusedOptimizer(Optimizer):
    """Base of gradmill's optimizers.

    One native call steps all parameters of a group that share formats. Parameters may be fp32, bf16 (stochastically
    rounded), fp16 or :class:`gradmill.QuantizedWeight` (stochastically rounded); gradients fp32, bf16 or fp16. float64
    parameters step in float64, with float64 states, by torch's own operations: ``states="fp32"`` means full precision, and other
    states, a projection and offload of them are refused. Random bits depend on the seed, the step, the parameter's place and the
    element only, and all of that is in the state_dict: a resumed run is bit-equal to an uninterrupted one.

    Group options every subclass has: ``states`` ("fp32", "bf16"; "int8": 8-bit codes, one fp32 scale per 256 elements of
    a row; "fp8": float8_e4m3fn so, second moments as in "int8"; "int4": 4-bit codes, a scale per 128), ``min_quantized_numel``
    (smaller tensors keep fp32 states), ``master_weight_bits`` (None; 24 or 32: bf16 and fp16 parameters have 8 or 16 bits
    more in the state, ``low_bits``, and step as fp32: exactly with bf16 and 32, within 2^-15 of the value with bf16 and 24
    and 2^-18 with fp16 and 24, rounded stochastically; fp16 and 32 are exact from 2^-17 on; a weight that is written between two
    steps, by a clamp or the model's load_state_dict, keeps its low bits, and so steps on from half a step of its dtype off at most:
    zero ``state["low_bits"]`` where it must be exact), ``maximize``, ``seed`` (default
    ``torch.initial_seed()``), ``projection`` (None or a :class:`gradmill.optim.Projection`: matrices take the rule's step in a
    subspace, and their weight decay is decoupled whatever the rule; a group may give ``rank`` and other options of Projection instead),
    ``capturable`` (as in torch: a step on a GPU can be captured in a CUDA graph, after one outside of it; steps are counted in device memory,
    an lr or a beta that is a CUDA tensor is read there, and random bits change from replay to replay), ``offload`` (True: the states of
    parameters on a GPU, low bits too, live in CPU memory, and the CPU's kernels step, bit for bit alike; see :mod:`gradmill.optim.staging`.
    For parameters on the CPU it changes nothing; a projection's basis, norms and Muon's iteration stay on the GPU). capturable and offload
    exclude each other; capturable is refused with a projection and with rules about which the host decides something (StableSPAM, SWATS,
    STEPAdam, AdaGradNorm, FedSpeed). Of torch.optim's arguments ``foreach`` and ``fused`` are accepted and ignored (the step is always
    fused), ``differentiable`` refused if True.

    For the optimizer as a whole, attributes too: ``max_grad_norm`` (None; else all gradients together are scaled down to
    this norm in the step itself, as ``torch.nn.utils.clip_grad_norm_`` does before it; gradients are left as they are and
    ``grad_norm`` holds the norm found) and ``on_nonfinite``: where any gradient holds a nan or an inf, "propagate" steps as
    torch does, "skip" does nothing, "raise" raises FloatingPointError naming the parameter, with nothing changed.

    On a GPU, where all parameters are on one, clipping, "skip" and a GradScaler's inf are decided there, and the host goes on: then grad_norm is a
    tensor, and ``step`` in the state too. "raise", offload, projections and rules about which the host decides wait for the device.

    DTensor parameters (``fully_shard``) step their local rows, projected ones too; random bits and blocks are those of the whole tensor.
    """

    steps_shards = True  #: False in a subclass whose step is not a function of each row and of norms that ``measured`` takes
    host_decides = ""    #: why the host takes part in every step, where it does: what capturable=True is refused with
    offloads_not = ""    #: why offload=True is refused, where it is
    releases_not = ""    #: why release_gradients is
    made_in_step: tuple = ()  #: states that begin with a parameter's first gradient: each of its first steps, where it is there twice
    max_grad_norm, on_nonfinite, grad_norm = None, "propagate", None
    _projection_options: dict = {}  # what a group's ``rank`` alone means (galore.py)
    _step_supports_amp_scaling = True  # GradScaler hands us grad_scale and found_inf instead of unscaling itself

    def __init__(self, params, defaults: dict, *, states="fp32", min_quantized_numel=4096, master_weight_bits=None, maximize=False, seed=None,
                 projection=None, max_grad_norm=None, on_nonfinite="propagate", foreach=None, fused=None, capturable=False, differentiable=False,
                 offload=False):
        if differentiable:
            raise ValueError(f"{type(self).__name__}: differentiable=True is not supported; gradmill's step is already fused, and runs outside autograd")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm!r}; it must be None or positive")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite is {on_nonfinite!r}; it must be one of {', '.join(ON_NONFINITE)}")
        self.max_grad_norm, self.on_nonfinite, self.grad_norm = max_grad_norm, on_nonfinite, None
        defaults = {**defaults, "states": states, "min_quantized_numel": min_quantized_numel, "master_weight_bits": master_weight_bits,
                    "maximize": maximize, "seed": seed, "projection": projection, "capturable": capturable, "offload": offload}
        self._check_options(defaults)  # before params are looked at, as torch does
        super().__init__(params, defaults)

    # --- what a subclass says -----------------------------------------------------------------------------
    def rule(self, group: dict) -> str:
        """The rule's name (gradmill.optim.rules.RULES) for a group."""
        raise NotImplementedError

    def check_group(self, group: dict):
        """Raises ValueError for hyperparameters out of range."""

    def needs_the_host(self, group: dict) -> str:
        """What in this group's step the host has to know or decide; "" if nothing."""
        if self.host_decides:
            return f"{type(self).__name__}, {self.host_decides}"
        return "projection, whose basis is refreshed at steps that the host counts" if group["projection"] is not None else ""

    # --- parameters ---------------------------------------------------------------------------------------
    def add_param_group(self, param_group):
        chosen = {k: param_group[k] for k in PROJECTION_FIELDS if k in param_group}
        if chosen:  # rank and what else says how to project: the same as a projection
            if param_group.get("projection") is not None:
                raise ValueError(f"a group has a projection and {', '.join(chosen)}: give one or the other")
            options = {**self._projection_options, **chosen}
            if "rank" not in options:
                raise ValueError(f"a group has {', '.join(chosen)} but no rank: it would not be projected")
            param_group = {k: v for k, v in param_group.items() if k not in chosen}
            param_group["projection"] = None if options["rank"] is None else Projection(**options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            for p in group["params"]:
                if p.dtype == torch.float64:
                    self._check_float64(p, group)
                elif formats.float_code(p.dtype) is None:
                    raise TypeError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}; gradmill.optim steps float32, bfloat16, float16 and "
                                    "float64 parameters (and QuantizedWeight)")
                if is_sharded(p):
                    if not self.steps_shards:
                        raise TypeError(f"a parameter of shape {tuple(p.shape)} is a DTensor; {type(self).__name__}'s step needs whole tensors")
                    check_placements(p)
                    if group["offload"] and staging.staged(p.device):
                        raise ValueError(f"offload=True cannot be combined with DTensor parameters on {p.device}; fully_shard's CPUOffloadPolicy keeps "
                                         "their shards on the CPU, where gradmill's step is the same")
        except Exception:
            self.param_groups.pop()
            raise

    def _check_float64(self, p, group):
        """TypeError for an option that a float64 parameter cannot have."""
        if group["projection"] is not None and group["projection"].rank_of(p.shape):
            reason = f"projection={group['projection']!r}"
        elif any(f.code != "fp32" for f in self.state_formats(group, *as_matrix_shape(p), p.dim())):
            reason = f"states={group['states']!r}"
        elif group["offload"] and staging.staged(p.device):
            reason = "offload=True"
        else:
            return
        raise TypeError(f"a parameter of shape {tuple(p.shape)} is torch.float64, which steps in full precision where it is: {reason} is for "
                        "float32, bfloat16 and float16 parameters")

    def _check_options(self, group):
        if group["states"] not in STATES:
            raise ValueError(f"states is {group['states']!r}; it must be one of {', '.join(STATES)}")
        if not isinstance(group["min_quantized_numel"], (int, float)):
            raise TypeError(f"min_quantized_numel is {group['min_quantized_numel']!r}; it must be a number")
        seed = torch.initial_seed() if group["seed"] is None else group["seed"]
        if not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; it must be an int or None")
        group["seed"] = (seed & 0xFFFFFFFFFFFFFFFF) - (1 << 64 if seed & (1 << 63) else 0)  # as an int64 holds it
        if group.setdefault("master_weight_bits") not in (None, 24, 32):
            raise ValueError(f"master_weight_bits is {group['master_weight_bits']!r}; it must be None, 24 or 32")
        projection = group.setdefault("projection")
        if not (projection is None or isinstance(projection, Projection)):
            raise TypeError(f"projection is {projection!r}; it must be None or a gradmill.optim.Projection")
        if projection is not None and type(self)._step_group is not FusedOptimizer._step_group:
            raise ValueError(f"{type(self).__name__} needs whole gradients, so it takes no projection")
        if projection is not None and group["master_weight_bits"] is not None:
            raise ValueError(f"master_weight_bits is {group['master_weight_bits']}; it must be None in a group that is projected")
        for option in ("capturable", "offload"):
            if not isinstance(group.setdefault(option, False), bool):
                raise TypeError(f"{option} is {group[option]!r}; it must be True or False")
        if group["capturable"] and (reason := self.needs_the_host(group)):
            raise ValueError(f"capturable=True cannot be combined with {reason}; capture forward and backward, and call step() after the replay")
        if group["offload"] and self.offloads_not:
            raise ValueError(f"offload=True cannot be combined with {type(self).__name__}, {self.offloads_not}")
        if group["capturable"] and group["offload"]:
            raise ValueError("offload=True cannot be combined with capturable=True: the step runs on the host")
        self.check_group(group)

    def _projection(self, p, group) -> Projection | None:
        """How p is projected, if it is."""
        projection = group["projection"]
        return projection if projection is not None and projection.rank_of(p.shape) and p.dtype != torch.float64 else None

    def _stepped(self, p, group) -> torch.Tensor:
        """A tensor like what the rule steps: p itself, or its projection."""
        projection = self._projection(p, group)
        if projection is None:
            return p
        shape, part = projection.compressed(p.shape), local(p)
        if projection.left(p.shape[0], p.shape[1:].numel()):  # whole on every process
            return torch.empty(shape, dtype=torch.float32, device=p.device)
        return like_shards(torch.empty(len(part), shape[1], dtype=torch.float32, device=p.device), p, shape)

    @staticmethod
    def _home(t, group) -> torch.device:
        """Where the states of a parameter like t live."""
        return torch.device("cpu") if group["offload"] and staging.staged(t.device) else t.device

    def _rng_id(self, p) -> int:
        """The parameter's order of first appearance, which numbers its random bits; another where a state, a loaded one say, has that number."""
        ids = self.__dict__.setdefault("_ids", {})
        if p not in ids:
            ids.update({q: state["rng_id"] for q, state in self.state.items() if "rng_id" in state})
            taken = set(ids.values())
            for i, q in enumerate(q for group in self.param_groups for q in group["params"]):
                if q not in ids:
                    ids[q] = i if i not in taken else max(taken) + 1
                    taken.add(ids[q])
        return ids[p]

    def state_formats(self, group: dict, rows: int, columns: int, dims: int = 2) -> tuple[Format, ...]:
        """The formats of a (rows, columns) tensor's states under the group's ``states``."""
        rule = RULES[self.rule(group)]
        kind = group["states"]
        if kind in QUANTIZED and (dims < 2 or columns < MIN_ROW or rows * columns < group["min_quantized_numel"]):
            kind = "fp32"
        if kind not in QUANTIZED:
            return (cached(kind),) * len(rule.states)
        return tuple(QUANTIZED[kind].get(code) or cached(code) for code in rule.state_codes)  # a rule may keep a state plain

    def _formats_like(self, group, like) -> tuple[Format, ...]:
        """state_formats for a tensor shaped like ``like``; fp32 where its own blocks and the states' do not nest, and for float64, whose
        states are float64."""
        block = like.format.block if isinstance(like, QuantizedWeight) else 0
        wanted = self.state_formats(group, *as_matrix_shape(like), like.dim())
        if like.dtype == torch.float64 or block and any(f.blocked and max(block, f.block) % min(block, f.block) for f in wanted):
            return (cached("fp32"),) * len(wanted)
        return wanted

    def _new_states(self, state: dict, group: dict, like: torch.Tensor):
        """Zero states for a tensor of like's shape, named as torch names them (+ _codes, _scales when quantised)."""
        columns, home = as_matrix_shape(like)[1], self._home(like, group)
        for name, format in zip(RULES[self.rule(group)].states, self._formats_like(group, like)):
            if name in state or f"{name}_codes" in state:
                continue
            if format.blocked:
                state[f"{name}_codes"] = self._zeros(like, format.code_columns(columns), format.code_dtype, home)
                state[f"{name}_scales"] = self._zeros(like, format.blocks(columns), torch.float32, home)
            else:
                state[name] = self._zeros(like, None, plain_dtype(format, like), home)

    @staticmethod
    def _zeros(like, columns, dtype, home):
        """Zeros of like's shape, or of its rows and so many columns; sharded as it is."""
        part = local(like)
        rows = part.shape[0] if columns is not None and part.dim() > 1 else 1
        zeros = torch.zeros(part.shape if columns is None else (rows, columns), dtype=dtype, device=home)
        return like_shards(zeros, like, like.shape if columns is None else (like.shape[0], columns))

    @classmethod
    def _no_low_bits(cls, p, group):
        """Low bits that leave p as it is."""
        count = (group["master_weight_bits"] - 16) // 8
        return like_shards(torch.zeros(*local(p).shape, count, dtype=torch.uint8, device=cls._home(p, group)), p, (*p.shape, count))

    def _init_state(self, p, group):
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
        state["rng_id"] = self._rng_id(p)
        self._new_states(state, group, self._stepped(p, group))
        projection = self._projection(p, group)
        if projection is not None:
            state["refresh_interval"], state["next_refresh"] = projection.refresh_every, 1
            state["cosines"] = torch.zeros(0, dtype=torch.float32, device="cpu")
            # From the first step on, although they are needed later: loading a flattened checkpoint takes the names that a first step made.
            if projection.residual == "fira":
                state["residual_norm"] = 0.0
            if projection.moments == "reset":
                state["moments_since"] = 0
        elif group["master_weight_bits"] is not None and p.dtype in LOW_BITS and not isinstance(p, QuantizedWeight):
            state["low_bits"] = self._no_low_bits(p, group)

    # --- the step -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure=None):
        """Performs one step. ``closure`` re-evaluates the model and returns the loss, which is returned. In a compiled function it
        runs as it is, fused already: one graph break, and no recompilation as steps and rates change."""
        return _uncompiled(self, closure) if torch.compiler.is_compiling() else self._step(closure)

    def _step(self, closure):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None and getattr(self, "_released", None) is not None:
            raise RuntimeError("a GradScaler cannot be used with release_gradients: the parameters were stepped with scaled gradients")
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        wanted = scale is not None or found_inf is not None or self.max_grad_norm is not None or self.on_nonfinite != "propagate"
        device = self._deciding(work) if wanted else None
        if device is None and found_inf is not None and bool(found_inf.item()):
            return loss
        for _, params in work:  # every reason to refuse comes before anything is changed
            for p in params:
                self._check_gradient(p)
        if device is not None:
            self._step_work(work, *self._decided(work, scale, found_inf, device))
            return loss
        factor = 1.0 if scale is None else 1.0 / float(scale.item())
        if self.__dict__.get("_coming"):
            self.settle([p for _, params in work for p in params if p in self._coming and int(self._coming[p].state.get("step", 0)) + 1 >= self._coming[p].adopt_at])
        if self.max_grad_norm is not None or self.on_nonfinite != "propagate":
            clip = self._survey([p for _, params in work for p in params], factor)
            if clip is None:
                return loss
            factor *= clip
        self._step_work(work, factor)
        return loss

    def _deciding(self, work) -> torch.device | None:
        """The device on which what becomes of this step is decided, and its steps counted; None: the host has to know."""
        used = [(group, params) for group, params in work if params]
        device = used[0][1][0].device if used else None
        if device is None or not counts_on(device):
            return None
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.on_nonfinite == "raise":
            if capturing:
                raise RuntimeError("on_nonfinite='raise' cannot be captured in a CUDA graph: only the host can raise; take 'skip' or 'propagate'")
            return None
        if any(group["offload"] or self.needs_the_host(group) or not self._counts(group) for group, _ in used):
            return None
        return device if all([p.device == device for _, params in used for p in params]) else None

    def _counts(self, group) -> bool:
        """Whether the rule's scalars can be made of step numbers that only the device knows."""
        return True

    def _decided(self, work, scale, found_inf, device):
        """(what multiplies the gradients, whether the step is taken or None for yes), on the device, by nothing the host waits for."""
        factor, live = 1.0, None
        if scale is not None:
            factor = scale.to(device, torch.float64, non_blocking=True).reshape(()).reciprocal()
        if found_inf is not None:
            live = found_inf.to(device, non_blocking=True).reshape(()) == 0
        if self.max_grad_norm is not None or self.on_nonfinite == "skip":
            found = measured([p.grad for _, params in work for p in params], device=device)
            if self.on_nonfinite == "skip":
                finite = found[:, 1].isfinite().all()
                live = finite if live is None else live & finite
            self.grad_norm = found[:, 0].sum().sqrt() * factor
            if self.max_grad_norm is not None:
                factor = factor * (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)  # a nan stays
        return factor, live

    def _survey(self, params, factor) -> float | None:
        """What clipping multiplies the gradients by; None where this step is to be skipped."""
        found = measured([p.grad for p in params])
        finite = found[:, 1].isfinite()
        if not finite.all() and self.on_nonfinite == "raise":
            p = params[int((~finite).nonzero()[0])]
            raise FloatingPointError(f"the gradient of {self._called(p)} holds a nan or an inf; nothing was changed")
        if not finite.all() and self.on_nonfinite == "skip":
            return None
        self.grad_norm = float(found[:, 0].sum().sqrt()) * abs(factor)
        if self.max_grad_norm is None:
            return 1.0
        clip = self.max_grad_norm / (self.grad_norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
        return 1.0 if clip > 1 else clip  # a nan stays

    def _called(self, p) -> str:
        """p by its name, where the optimizer was made of named_parameters(), else by its place."""
        for i, group in enumerate(self.param_groups):
            for k, q in enumerate(group["params"]):
                if q is p:
                    return f"{group['param_names'][k]!r}" if "param_names" in group else f"parameter {k} of group {i}, of shape {tuple(p.shape)},"

    def _step_work(self, work, factor, live=None):
        """Steps [(group, its parameters with gradients)]; ``live``: a tensor that says whether."""
        with plain_precision():
            for group, params in work:
                self._step_params(group, params, factor, live)

    def _step_params(self, group, params, factor, live):
        counted = self._is_counted_there(group, params, factor, live)
        if self._repeat(group, params, factor, live, counted):
            return
        if counted and not all([counts_on(p.device) and p.device == params[0].device for p in params]):
            raise AssertionError("If capturable=True, params and state_steps must be on supported devices: ['cuda'], all of a group on one.")
        if len(set(map(id, params))) < len(params):  # as in torch, one that is there twice takes two steps, one after the other
            seen: set = set()
            again = [p for p in params if id(p) in seen or seen.add(id(p))]
            made = [(p, f"{name}{part}") for p in again for name in self.made_in_step for part in ("", "_codes", "_scales") if f"{name}{part}" not in self.state[p]]
            self._step_params(group, list(dict.fromkeys(params)), factor, live)
            for p, name in made:
                self.state[p].pop(name, None)
            self._step_params(group, again, factor, live)
            return
        states, names = [self.state[p] for p in params], RULES[self.rule(group)].states
        for p, state in zip(params, states):
            first = state.get(names[0]) if names else None
            if first is not None and (first.dtype == torch.float64) != (p.dtype == torch.float64):  # it was cast since
                state.update({name: state[name].to(full_precision(p)) for name in names if name in state})
            if not state:
                self._init_state(p, group)
            elif group["master_weight_bits"] is not None and p.dtype in LOW_BITS and "low_bits" not in state:  # it was fp32 before
                if not isinstance(p, QuantizedWeight) and "next_refresh" not in state:
                    state["low_bits"] = self._no_low_bits(p, group)
        if counted or params and staging.staged(params[0].device):
            self._bring_home(group, params, counted)
        steps = [state["step"] for state in states]
        if steps:
            torch._foreach_add_(steps, 1 if live is None else [live.to(torch.float32)] * len(steps))
        if counted:
            counts = list(self._numbers(steps, live))
        else:
            counts = list(map(int, torch.stack(steps).tolist())) if steps else []  # one call, not one .item() each
        items = [Item(local(p), local(p.grad), state, count, offset=shard_offset(p) if is_sharded(p) else 0, owner=p)
                 for p, state, count in zip(params, states, counts)]
        self._step_group(group, items, factor)
        self._prepare(group, params, items)
        if params:
            torch.autograd.graph.increment_version([local(p) for p in params])  # so that autograd refuses a stale saved weight

    def _bring_home(self, group, params, counted):
        """Moves states of a live group whose offload was changed, and steps that are counted elsewhere from now on."""
        names = {f"{name}{part}" for name in RULES[self.rule(group)].states for part in ("", "_codes", "_scales")} | {"low_bits"}
        for p in params:
            state, home = self.state[p], self._home(p, group)
            for name, value in list(state.items()):
                if name in names and value.device != home:  # not a projection's basis: it is needed where the gradient is
                    state[name] = value.to(home)
            there = p.device if counted else torch.device("cpu")
            if state["step"].device != there:
                state["step"] = torch.full((), float(state["step"]), dtype=torch.float32, device=there)

    def _is_counted_there(self, group, params, factor, live) -> bool:
        """Whether the group's steps are counted on its parameters' device, by nothing the host waits for."""
        if not params:
            return False
        p, there = params[0], group["capturable"] or live is not None or isinstance(factor, torch.Tensor)
        if not there and not p.is_cuda:
            return False
        if p.is_cuda and torch.cuda.is_current_stream_capturing():
            if not group["capturable"]:
                raise RuntimeError(f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but param_groups' capturable is False.")
            if not all([(state := self.state.get(q)) and state["step"].is_cuda for q in params]):
                raise RuntimeError(f"capture of {type(self).__name__}.step(): a parameter has no state yet, and a replay would clear it again; take a step outside "
                                   "of the graph first")
        if there:
            return True
        step = self.state.get(p, {}).get("step")  # once there, it stays there
        return step is not None and step.is_cuda and not (group["offload"] or self.needs_the_host(group)) and self._counts(group)

    @staticmethod
    def _numbers(steps, live) -> torch.Tensor:
        """Steps on the device as one tensor, -1 where they are not taken."""
        counts = torch.stack(steps)
        return counts if live is None else torch.where(live, counts, -1.0)

    def _prepare(self, group, params, items):
        """Remembers a step whose every tensor can be found again, from the second time on that a group steps the same ones."""
        plans, before = self.__dict__.setdefault("_plans", {}), self.__dict__.setdefault("_seen", {})
        seen, before[id(group)] = before.get(id(group)), params
        plans.pop(id(group), None)
        if not params or seen is None or len(seen) != len(params) or not all(map(is_, seen, params)):
            return
        own = all(getattr(type(self), name) is getattr(FusedOptimizer, name) for name in ("_step_group", "apply_rule", "_buckets"))
        own = own and not (group["offload"] and any(staging.staged(p.device) for p in params))
        if not own or torch.compiler.is_compiling() or not all(map(repeatable, params, items)):
            return
        name, places = self.rule(group), {id(p): i for i, p in enumerate(params)}
        launches = [(Launch(**arguments), [places[id(item.owner)] for item in bucket], [item.state["step"].data_ptr() for item in bucket])
                    for _, bucket, arguments in self._buckets(name, items)]
        plans[id(group)] = Plan(name, params, [item.state for item in items], launches, isinstance(items[0].step, torch.Tensor))
        if len(before) > len(self.param_groups):  # groups that are gone
            live = set(map(id, self.param_groups))
            self._plans, self._seen = ({k: v for k, v in d.items() if k in live} for d in (plans, before))

    def _repeat(self, group, params, factor, live=None, counted=False) -> bool:
        """The group's step by its plan; False, with nothing changed, where there is none or it does not fit."""
        plan = self.__dict__.get("_plans", {}).get(id(group))
        if plan is None or torch.compiler.is_compiling() or plan.rule != self.rule(group) or plan.live != counted or not plan.fits(params, self.state):
            return False
        grads = [p.grad for p in params]
        chosen = [[grads[i] for i in places] for _, places, _ in plan.launches]
        if not all(launch.fits(some) for (launch, *_), some in zip(plan.launches, chosen)):
            return False
        first, scalars = factor * (-1.0 if group["maximize"] else 1.0), RULES[plan.rule].scalars
        if counted:
            torch._foreach_add_([self.state[p]["step"] for p in params], 1 if live is None else [live.to(torch.float32)] * len(params))
            for (launch, places, _), some in zip(plan.launches, chosen):
                counts = self._numbers([self.state[params[i]]["step"] for i in places], live)
                launch.run_live(some, table_of((first, *scalars(group, counts.to(torch.float64), number(group["lr"]))), counts), counts, group["seed"])
            torch.autograd.graph.increment_version(params)
            return True
        native, lr = native_module(), float(group["lr"])
        if not all(native.count(counters) > 0 for *_, counters in plan.launches):  # set by hand, to different steps or to none
            return False
        for (launch, _, counters), some in zip(plan.launches, chosen):
            step = native.advance(counters)
            launch.run(some, padded((first, *scalars(group, step, lr))), group["seed"], step)
        torch.autograd.graph.increment_version(params)
        return True

    def _complete(self, group, items):
        """Where an option that adds a state (amsgrad) was set on a live group, that state starts at zero now."""
        rules, rule = self.__dict__.setdefault("_stepped_rules", {}), self.rule(group)
        if rules.get(id(group), rule) != rule:
            for item in items:
                self._new_states(item.state, group, self._stepped(item.owner, group))
        rules[id(group)] = rule

    def _check_gradient(self, p):
        g = p.grad
        if g.dtype in FLOATS and g.layout == torch.strided:
            return
        if p.dtype == g.dtype == torch.float64 and g.layout == torch.strided:
            if stored := [name for name in self.state.get(p, ()) if name.endswith("_codes") or name == "next_refresh"]:
                raise TypeError(f"a parameter of shape {tuple(p.shape)} has become torch.float64, but its state is quantised or projected ({stored[0]})")
            return
        what = f"the gradient of a parameter of shape {tuple(p.shape)}"
        if g.layout != torch.strided:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: {what} is {g.layout}")
        raise TypeError(f"{what} is {g.dtype}; it must be float32, bfloat16 or float16 (of a float64 parameter float64 too)")

    def _step_group(self, group: dict, items: list[Item], factor: float):
        self._complete(group, items)
        projected = [item for item in items if "next_refresh" in item.state]
        self._step_items(group, [item for item in items if "next_refresh" not in item.state] if projected else items, factor)
        if not projected:
            return
        parts = [Projected(group["projection"], item, group) for item in projected]
        compressed, released = [], getattr(self, "_released", None)
        for part, item in zip(parts, projected):
            part.refresh(self)
            low = part.project()
            if released is not None and item.owner in released.low:
                low += released.low.pop(item.owner)
            offset = 0 if part.left else part.rows.start * low.shape[1]
            compressed.append(Item(torch.empty_like(low), low, item.state, item.step - item.state.get("moments_since", 0), offset=offset, owner=item.owner))
        if compressed:
            self._step_items(group, compressed, factor, param_code="delta", decay=False)
        lr = float(group["lr"])
        for part, (update, low, *_) in zip(parts, compressed):
            part.back(low, update, factor * (-1.0 if group["maximize"] else 1.0), lr, 1 - lr * group.get("weight_decay", 0.0))

    def projected_gradient(self, p, group) -> torch.Tensor | None:
        """p's gradient in the basis of its next step; None if it is not projected, or that step needs the whole gradient for a new basis."""
        projection, state = self._projection(p, group), self.state.get(p)
        if projection is None or not state:
            return None
        part = Projected(projection, Item(p, local(p.grad), state, int(state["step"]) + 1, offset=shard_offset(p) if is_sharded(p) else 0, owner=p), group)
        with plain_precision():
            part.adopt(self)
            return None if part.due else part.project()

    def zero_grad(self, set_to_none: bool = True):
        super().zero_grad(set_to_none)
        if getattr(self, "_released", None) is not None:
            self._released.forget()

    def _step_items(self, group, items, factor, **options):
        """The rule on tensors, or on their projections; options are apply_rule's."""
        self.apply_rule(group, items, factor, **options)

    # --- bases computed beside training (Projection.background) --------------------------------------------
    def refresh_later(self, p, work):
        """Starts ``work``, which finds p's next basis."""
        state = self.state[p]
        self.__dict__.setdefault("_coming", {})[p] = Coming(later(work, p.device), state, state["adopt_at"], os.getpid())

    def settle(self, params=None):
        """Waits for the bases of ``params`` (None: of all) that are being computed, and puts them into the states. RuntimeError from
        what failed there; that parameter refreshes anew at its next step."""
        coming, failed = self.__dict__.get("_coming", {}), None
        for p in [p for p in (list(coming) if params is None else params) if p in coming]:
            future, state, _, process = coming[p]
            if self.state.get(p) is not state or "adopt_at" not in state:
                del coming[p]  # cleared or replaced meanwhile
                continue
            if process != os.getpid():
                del coming[p], state["adopt_at"]  # the thread stayed in the process that this one was forked from: refresh anew
                continue
            error = future.exception()  # Ctrl-C while this waits leaves all as it is
            del coming[p]
            if error is not None:
                del state["adopt_at"]
                failed = failed or (p, error)
                continue
            found = future.result()
            for name, value in found.items():
                if name != "low":  # of a gradient that is gone
                    if value.is_cuda:
                        value.record_stream(torch.cuda.current_stream(value.device))
                    state[COMING + name] = value
        if failed:
            p, error = failed
            raise RuntimeError(f"refreshing the basis of a parameter of shape {tuple(p.shape)} beside training failed: {error}") from error

    def map_moments(self, group, state, columns, device, first, second=None):
        """Each state m of a matrix with so many columns becomes first(m), a second moment second(m), where given; fp32 in between, on
        ``device``."""
        rule = RULES[self.rule(group)]
        for name, code in zip(rule.states, rule.state_codes):
            change = second if second is not None and code == "square8" else first
            if f"{name}_codes" in state:
                codes, scales = local(state[f"{name}_codes"]), local(state[f"{name}_scales"])
                format = stored_format(code, codes, columns)
                value = dequantize(codes, scales, scales.new_empty(0, dtype=torch.uint8), format.code, format.block, columns, torch.float32)
                for part, new in zip(("codes", "scales"), quantize(change(value.to(device)).to(value.device), format.code, format.block)):
                    like = state[f"{name}_{part}"]
                    state[f"{name}_{part}"] = like_shards(new, like, like.shape)
            else:
                value = local(state[name])
                state[name] = like_shards(change(value.to(device, torch.float32)).to(value).contiguous(), state[name], state[name].shape)

    def apply_rule(self, group: dict, items: list[Item], factor: float, *, rule=None, lr=None, param_code=None, decay=True):
        """Steps ``items`` by a rule (default: the group's), one native call for all that share formats, step and device. An
        item's options replace the group's (and lr) in its scalars.

        param_code "delta" leaves the update in each item's fp32 param instead of stepping it (no weight decay).
        """
        # A rule without states steps weights where they are.
        moves = [item for item in items if RULES[rule or self.rule(group)].states or "low_bits" in item.state] if group["offload"] else []
        if away := [item for item in moves if staging.staged(item.param.device)]:
            transport = self.__dict__.setdefault("_transports", {})
            for device in dict.fromkeys(item.param.device for item in away):
                if device not in transport:
                    transport[device] = staging.transport_of(device)
                staging.through(transport[device], [item for item in away if item.param.device == device and item.grad.numel()],
                                lambda chunk: self._apply(group, chunk, factor, rule=rule, lr=lr, param_code=param_code, decay=decay))
            items = [item for item in items if not any(item is other for other in away)]
        self._apply(group, items, factor, rule=rule, lr=lr, param_code=param_code, decay=decay)

    def _apply(self, group: dict, items: list[Item], factor: float, *, rule, lr, param_code, decay):
        """apply_rule, where the states are."""
        name = rule or self.rule(group)
        rule = RULES[name]
        if items and isinstance(items[0].step, torch.Tensor):
            items = [item for item in items if item.grad.numel()]  # an index of the rest would wait for the device
        if not items:
            return
        lr = (number if isinstance(items[0].step, torch.Tensor) else float)(group["lr"]) if lr is None else lr
        options, first = group if decay else {**group, "weight_decay": 0.0}, factor * (-1.0 if group["maximize"] else 1.0)
        wide = [item for item in items if item.param.dtype == torch.float64]
        for item in wide:
            if param_code == "delta":
                item.param.zero_()
            live, count = (item.step >= 0, item.step.to(torch.float64)) if isinstance(item.step, torch.Tensor) else (None, item.step)
            reference.float64_step(name, item.param, item.grad, [local(item.state[n]) for n in rule.states],
                                   (first, *rule.scalars({**options, **item.options}, count, item.options.get("lr", lr))), live)
        for step, bucket, arguments in self._buckets(name, [item for item in items if item.param.dtype != torch.float64] if wide else items, param_code):
            if step is None:
                counts = torch.stack([item.step for item in bucket])
                rates = torch.stack([item.options["lr"] for item in bucket]) if bucket[0].options else lr
                fused_step(**arguments, scalars=table_of((first, *rule.scalars(options, counts.to(torch.float64), rates)), counts),
                           key=torch.tensor([group["seed"], 0], dtype=torch.int64, device="cpu"), counts=counts)
                continue
            if any(item.options for item in bucket):
                scalars = [padded((first, *rule.scalars({**options, **item.options}, step, item.options.get("lr", lr)))) for item in bucket]
            else:
                scalars = [padded((first, *rule.scalars(options, step, lr)))]
            fused_step(**arguments, scalars=torch.tensor(scalars, dtype=torch.float32, device="cpu"),
                       key=torch.tensor([group["seed"], step], dtype=torch.int64, device="cpu"))

    @staticmethod
    def _buckets(name, items, param_code=None):
        """(step, None if the device counts it; items; fused_step's arguments but scalars and key) of all items that one call can step."""
        rule, buckets = RULES[name], defaultdict(list)
        code_names = [f"{n}_codes" for n in rule.states]
        for item in items:
            param, grad, state, step, *_ = item
            f = param_code or (param.format if isinstance(param, QuantizedWeight) else param.dtype)
            if "low_bits" in state and param.dtype in LOW_BITS and param_code is None:
                f = split_code(param.dtype, state["low_bits"])
            # What is stored decides a state's format, not the group's option, which may have changed.
            stored = tuple([(state[codes].dtype, state[codes].shape[1] == as_matrix_shape(param)[1]) if codes in state else state[n].dtype
                            for n, codes in zip(rule.states, code_names)])
            buckets[f, stored, grad.dtype, grad.get_device(), None if isinstance(step, torch.Tensor) else step].append(item)
        for (f, _, _, _, step), bucket in buckets.items():
            one, columns = bucket[0].state, as_matrix_shape(bucket[0].param)[1]
            states = [stored_format(code, one[codes], columns) if codes in one else cached(formats.float_code(one[n].dtype))
                      for n, code, codes in zip(rule.states, rule.state_codes, code_names)]
            format = f if isinstance(f, Format) else cached(f if isinstance(f, str) else formats.float_code(f))
            params = [item.param for item in bucket]
            blocked = any(s.blocked for s in states)
            names = [(f"{n}_codes", f"{n}_scales") if s.blocked else (n, None) for n, s in zip(rule.states, states)]
            empty = torch.empty(0, dtype=torch.float32, device="cpu")
            yield step, bucket, dict(
                rule=name, params=[p.codes for p in params] if format.blocked else params, param_scales=[p.scales for p in params] if format.blocked else [],
                param_zeros=[p.zeros for p in params] if format.has_zero_point else
                [low_view(item.state["low_bits"]) for item in bucket] if format.code in SPLIT else [],
                grads=[item.grad for item in bucket], states=[local(item.state[codes]) for item in bucket for codes, _ in names],
                state_scales=[local(item.state[scales]) if scales else empty for item in bucket for _, scales in names] if blocked else [],
                ids=[item.state["rng_id"] for item in bucket], param_code=format.code, param_block=format.block, state_codes=[s.code for s in states],
                state_block=max((s.block for s in states), default=0),
                offsets=[item.offset for item in bucket] if any(item.offset for item in bucket) else None)

    # --- weights ------------------------------------------------------------------------------------------
    def value(self, p, state=None) -> torch.Tensor:
        """The fp32 (of a float64 p, float64) value that the optimizer steps: p with its low bits, dequantised where it is quantised; a new tensor."""
        state, part = self.state.get(p, {}) if state is None else state, local(p.detach())
        if isinstance(part, QuantizedWeight):
            return part.dequantize().to(torch.float32)
        if "low_bits" in state and p.dtype in LOW_BITS:
            part = join_float(part, low_view(state["low_bits"]).to(part.device), split_code(p.dtype, state["low_bits"]))
        return like_shards(part.to(full_precision(part), copy=True), p, p.shape)

    @torch.no_grad()
    def full_precision_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """model.state_dict() with the fp32 value of every parameter that has master_weight_bits here."""
        out = dict(model.state_dict())
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in out and "low_bits" in self.state.get(p, {}):
                out[name] = self.value(p)
        return out

    # --- checkpoints --------------------------------------------------------------------------------------
    def state_dict(self):
        """torch's, a projection as a dict of its options."""
        self.settle()
        out = super().state_dict()
        for group in out.get("param_groups", ()):  # a hook may return something else
            if isinstance(group.get("projection"), Projection):
                group["projection"] = asdict(group["projection"])
        return out

    def load_state_dict(self, state_dict):
        """Loads a state_dict of this optimizer, or of torch's, bitsandbytes' (block-wise 8 bit or 32) or torchao's optimizer of
        the same rule.

        As in torch the checkpoint's hyperparameters win, but how states are stored is this optimizer's choice
        (``states``, ``min_quantized_numel``, ``master_weight_bits``, ``projection``): what was saved
        in another format is converted, but for a projection's basis, which must be stored as it is here. Quantised states keep their dtypes (torch's own method would cast codes to the
        parameter's dtype). Raises :class:`CheckpointError` for a state that does not fit its parameter or is another
        optimizer's; the optimizer is then as it was.
        """
        state_dict = state_dict.copy()
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self.__dict__.pop("_plans", None)  # they hold the states that are about to go
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(a["params"]) != len(b["params"]) for a, b in zip(groups, self.param_groups)):
            raise ValueError("loaded state dict contains a parameter group that doesn't match the size of optimizer's group")
        merged = [{**{k: v for k, v in mine.items() if k != "params"}, **saved, **{k: mine[k] for k in STORAGE if k in mine}}
                  for mine, saved in zip(self.param_groups, groups)]
        state = {}
        for saved, group, mine in zip(groups, merged, self.param_groups):
            try:
                self._check_options(group)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"a parameter group cannot be loaded: {error}") from None
            for index, p in zip(saved["params"], mine["params"]):
                if state_dict["state"].get(index):  # a state that was looked at before the first step is empty
                    state[index] = self._adopt(dict(state_dict["state"][index]), p, group, index)
        self.__dict__.pop("_coming", None)
        hooks, self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_pre_hooks, type(self._optimizer_load_state_dict_pre_hooks)()
        try:
            super().load_state_dict({**state_dict, "state": state, "param_groups": merged})
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
        self.__dict__.pop("_ids", None)  # the checkpoint's count now

    def __getstate__(self):
        self.settle()
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "on_nonfinite": self.on_nonfinite, "grad_norm": self.grad_norm}

    def __setstate__(self, state):
        for values in state.get("state", {}).values():
            for k, v in values.items():
                if isinstance(v, _Kept):
                    values[k] = v.tensor
        super().__setstate__(state)
        for group in self.param_groups:  # of a version without them
            group.setdefault("capturable", False), group.setdefault("offload", False)

    def _adopt(self, saved: dict, p, group: dict, index) -> dict:
        """A saved state, checked and converted to what this group stores, its tensors wrapped in _Kept."""
        from gradmill.optim.checkpoints import foreign_state  # late: it imports this module

        saved = foreign_state(saved, RULES[self.rule(group)].states, p.shape, index)
        rng_id = saved.setdefault("rng_id", self._rng_id(p))
        if not isinstance(rng_id, int) or not 0 <= rng_id < 1 << 24:
            raise CheckpointError(f"state {index}: rng_id is {rng_id!r}; it must be an int of at least 0, below 2^24")
        try:
            step = float(saved.get("step", 0.0))
        except (TypeError, ValueError, RuntimeError):
            step = -1.0
        if not 0 <= step < math.inf:
            raise CheckpointError(f"state {index}: step is {saved['step']!r}; it must be one number of at least 0")
        saved["step"] = torch.tensor(step, dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
        projection = self._projection(p, group)
        if projection is None and "next_refresh" in saved:
            raise CheckpointError(f"state {index} is a projected one; its parameter of shape {tuple(p.shape)} is not projected here")
        if projection is None:
            self._adopt_states(saved, p, group, index)
        else:
            self._adopt_projected(saved, projection, p, group, index)
        self._adopt_low_bits(saved, p, group, index)
        foreign = {n for rule in RULES.values() for n in rule.states} - set(RULES[self.rule(group)].states)
        foreign = sorted(k for k in saved if k.removesuffix("_codes").removesuffix("_scales") in foreign)
        if foreign:
            raise CheckpointError(f"state {index} is another optimizer's: {type(self).__name__} has no {', '.join(foreign)}")
        return {k: _Kept(v) if isinstance(v, torch.Tensor) else v for k, v in saved.items()}

    @staticmethod
    def _adopt_tensor(saved: dict, name: str, dtypes, shape, place, index) -> torch.Tensor:
        """saved[name] copied to ``place``, a device or the tensor beside which it belongs (and is sharded alike);
        CheckpointError unless it is a tensor of one of ``dtypes`` and of ``shape``."""
        value = saved.pop(name, None)
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"state {index}: {name} is {describe(value)}; it must be {short(dtypes)} of shape {tuple(shape)}")
        value, like = value.detach(), place if isinstance(place, torch.Tensor) else None
        if like is not None and is_sharded(like):
            from torch.distributed.tensor import distribute_tensor
            mesh = like.device_mesh, like.placements
            value = value.redistribute(*mesh) if is_sharded(value) else distribute_tensor(value.to(like.device), *mesh, src_data_rank=None)
        elif is_sharded(value):
            value = value.full_tensor()
        return value.to(place if like is None else like.device, copy=True)

    @staticmethod
    def _adopt_numbers(saved: dict, names, index):
        """Names that must hold numbers of at least 0; 0 where the checkpoint has none."""
        for name in names:
            value = saved.setdefault(name, 0)
            if not isinstance(value, (int, float)) or not value >= 0:
                raise CheckpointError(f"state {index}: {name} is {value!r}; it must be a number of at least 0")

    def _place(self, like, group):
        """Where what is adopted for ``like`` goes, as _adopt_tensor takes it."""
        home = self._home(like, group)
        return like if home == like.device else home

    def _adopt_low_bits(self, saved, p, group, index):
        """Low bits in the group's width; a checkpoint without them starts at the weight as it is."""
        low = saved.get("low_bits")
        if low is not None:
            count = low.shape[-1] if isinstance(low, torch.Tensor) and low.dim() and low.shape[-1] in (1, 2) else 1
            low = self._adopt_tensor(saved, "low_bits", (torch.uint8,), (*p.shape, count), self._place(p, group), index)
        if group["master_weight_bits"] is None or p.dtype not in LOW_BITS or isinstance(p, QuantizedWeight):
            saved.pop("low_bits", None)
            return
        wanted = self._no_low_bits(p, group)
        if low is not None:  # both widths continue the same bits: the last byte is the first of them
            local(wanted)[..., -1].copy_(local(low)[..., -1])
            if low.shape == wanted.shape:
                wanted = low
        saved["low_bits"] = wanted

    def _adopt_projected(self, saved, projection: Projection, p, group, index):
        """The states of a projected parameter, its basis and when it is refreshed; of galore-torch too, whose state holds a projector."""
        rows, columns = p.shape[0], p.shape[1:].numel()
        side, rank = rows if projection.left(rows, columns) else columns, projection.rank_of(p.shape)
        if "projector" in saved:
            vectors = getattr(saved.pop("projector"), "ortho_matrix", None)
            if not (projection.stored and isinstance(vectors, torch.Tensor)):
                raise CheckpointError(f"state {index}: a projector without one basis, or basis {projection.basis!r}, cannot be converted")
            vectors = vectors.t() if projection.left(rows, columns) else vectors
            if tuple(vectors.shape) != (rank, side):
                raise CheckpointError(f"state {index}: projector has a basis of shape {tuple(vectors.shape)}; it must be {(rank, side)}")
            saved.update(refresh_interval=projection.refresh_every, refreshed_at=1, cosines=torch.zeros(0), next_refresh=1 - int(-saved["step"] // projection.refresh_every)
                         * projection.refresh_every)
            saved.update(projection.packed(vectors.detach().to(p.device, torch.float32).contiguous()))
        if "next_refresh" not in saved:
            raise CheckpointError(f"state {index} is not projected; its parameter of shape {tuple(p.shape)} is, with rank {projection.rank}")
        self._adopt_states(saved, self._stepped(p, group), group, index)
        for name, dtypes, shape in projection.basis_tensors(rank, side):
            if saved["step"] > 0 or name in saved:
                saved[name] = self._adopt_tensor(saved, name, dtypes, shape, p.device, index)
            if "adopt_at" in saved:
                saved[COMING + name] = self._adopt_tensor(saved, COMING + name, dtypes, shape, p.device, index)
        if COMING + "cosine" in saved:
            saved[COMING + "cosine"] = self._adopt_tensor(saved, COMING + "cosine", (torch.float32,), (), "cpu", index)
        self._adopt_numbers(saved, ["residual_norm"] if projection.residual == "fira" else [], index)
        cosines = saved.get("cosines")
        length = min(len(cosines), QUEUE) if isinstance(cosines, torch.Tensor) and cosines.dim() == 1 else 0
        saved["cosines"] = self._adopt_tensor(saved, "cosines", (torch.float32,), (length,), "cpu", index)
        for name, least in (("refresh_interval", 1), ("next_refresh", 1), ("refreshed_at", 0), ("moments_since", 0), *([("adopt_at", 1)] if "adopt_at" in saved else [])):
            value = saved.get(name, least if name in ("refreshed_at", "moments_since") and not (name == "refreshed_at" and saved["step"] > 0) else None)
            if not isinstance(value, int) or value < least:
                raise CheckpointError(f"state {index}: {name} is {saved.get(name)!r}; it must be an int of at least {least}")

    def _adopt_states(self, saved, like, group, index):
        rows, columns = as_matrix_shape(like)
        wanted, place = self._formats_like(group, like), self._place(like, group)
        for name, code, format in zip(RULES[self.rule(group)].states, RULES[self.rule(group)].state_codes, wanted):
            if f"{name}_codes" in saved:
                codes = saved[f"{name}_codes"]
                stored = (stored_format(code, codes, columns) if isinstance(codes, torch.Tensor) else None) or QUANTIZED["int8"].get(code)
                if stored is None:
                    raise CheckpointError(f"state {index}: {name} is never quantised; got {name}_codes")
                codes = self._adopt_tensor(saved, f"{name}_codes", (stored.code_dtype,), (rows, stored.code_columns(columns)), place, index)
                scales = self._adopt_tensor(saved, f"{name}_scales", (torch.float32,), (rows, stored.blocks(columns)), place, index)
                if format == stored:
                    saved[f"{name}_codes"], saved[f"{name}_scales"] = codes, scales
                    continue
                value = dequantize(local(codes), local(scales), torch.empty(0, dtype=torch.uint8, device=codes.device), stored.code, stored.block,
                                   columns, torch.float32).view(local(like).shape)
            elif name in saved:
                value = local(self._adopt_tensor(saved, name, FLOATS + (torch.float64,), like.shape, place, index))
            else:
                raise CheckpointError(f"state {index}: neither {name} nor {name}_codes is there; got {', '.join(sorted(saved))}")
            if format.blocked:
                codes, scales, _ = quantize(as_matrix(value.to(torch.float32)), format.code, format.block)
                saved[f"{name}_codes"] = like_shards(codes, like, (rows, codes.shape[1]))
                saved[f"{name}_scales"] = like_shards(scales, like, (rows, scales.shape[1]))
            else:
                saved[name] = like_shards(value.to(plain_dtype(format, like)), like, like.shape)
