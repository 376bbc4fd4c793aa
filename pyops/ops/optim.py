"""optim: one fused step for many tensors: rule x state format x weight format."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, SPLIT, STEPPED, cached, float_code
from gradmill.ops import _registry
from gradmill.ops._registry import Op, native_module, reject, require_key, where
from gradmill.ops.quant import FLOATS
from gradmill.reference import optim as reference

MAX_SCALARS = 16


def _check_stored(op, name, i, codes, scales, zeros, format, shape, device):
    rows, columns = shape
    if codes.device != device or (format.blocked and scales.device != device):
        reject(op, f"{name}[{i}]", codes, f"on {device}, its scales too")
    if not format.blocked:
        if codes.dtype != format.code_dtype:
            reject(op, f"{name}[{i}]", codes, str(format.code_dtype), TypeError)
        if codes.numel() != rows * columns:
            reject(op, f"{name}[{i}]", codes, f"of {rows * columns} elements, as its gradient")
        if format.code in SPLIT and not (zeros.dtype == SPLIT[format.code][1] and zeros.shape == codes.shape and zeros.is_contiguous() and zeros.device == device):
            reject(op, f"{name[:-1]}_zeros[{i}]", zeros, f"contiguous {SPLIT[format.code][1]} of shape {tuple(codes.shape)} on {device}")
        return
    if codes.dtype != format.code_dtype:
        reject(op, f"{name}[{i}]", codes, str(format.code_dtype), TypeError)
    if codes.shape != (rows, format.code_columns(columns)):
        reject(op, f"{name}[{i}]", codes, f"of shape {(rows, format.code_columns(columns))}")
    blocks = (rows, format.blocks(columns))
    if scales.dtype != torch.float32 or scales.shape != blocks:
        reject(op, f"{name}_scales[{i}]", scales, f"fp32 of shape {blocks}")
    if not (codes.is_contiguous() and scales.is_contiguous()):
        reject(op, f"{name}[{i}]", codes, "contiguous, its scales too")
    if format.has_zero_point and not (zeros.dtype == torch.uint8 and zeros.shape == blocks and zeros.is_contiguous()):
        reject(op, f"{name}_zeros[{i}]", zeros, f"contiguous uint8 of shape {blocks}")


def _check(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
           state_codes, state_block, offsets=None, counts=None):
    op = "fused_step"
    if rule not in reference.RULES:
        reject(op, "rule", rule, f"one of {', '.join(reference.RULES)}")
    from gradmill.optim.rules import RULES  # here: gradmill.optim imports this module

    n, count = len(params), len(state_codes)
    if count != len(RULES[rule].states):
        reject(op, "state_codes", list(state_codes), f"{len(RULES[rule].states)} codes, one for each state of {rule}")
    for name, codes, known in (("param_code", [param_code], (*STEPPED, *SPLIT)), ("state_codes", state_codes, STEPPED)):
        if not set(codes) <= set(known):
            reject(op, name, codes, f"of {', '.join(known)}")
    param_format = cached(param_code, param_block)
    formats = [cached(c, state_block if cached(c).blocked else 0) for c in state_codes]
    if any(f.has_zero_point or f.code == "delta" for f in formats):
        reject(op, "state_codes", list(state_codes), "codes without a zero point, and not delta")
    has_zeros = param_format.has_zero_point or param_code in SPLIT
    for name, got, want in (("grads", len(grads), n), ("ids", len(ids), n), ("offsets", n if offsets is None else len(offsets), n), ("states", len(states), n * count),
                            ("param_scales", len(param_scales), n if param_format.blocked else 0),
                            ("param_zeros", len(param_zeros), n if has_zeros else 0),
                            ("state_scales", len(state_scales), n * count if any(f.blocked for f in formats) else 0)):
        if got != want:
            reject(op, f"len({name})", got, str(want))
    if counts is not None:
        device = params[0].device if n else counts.device
        for name, t, shape in (("counts", counts, (n,)), ("scalars", scalars, (n, MAX_SCALARS))):
            if not (t.dtype == torch.float32 and t.device == device and t.shape == shape and t.is_contiguous()):
                reject(op, name, t, f"contiguous fp32 of shape {shape} on {device}, where counts are")
    elif not (scalars.dtype == torch.float32 and scalars.device.type in ("cpu", "meta") and scalars.dim() == 2 and scalars.shape[0] in (1, n) and scalars.shape[1] == MAX_SCALARS):
        reject(op, "scalars", scalars, f"fp32 on CPU of shape (1 or {n}, {MAX_SCALARS})")
    require_key(op, key)
    blocks = {f.block for f in (param_format, *formats) if f.blocked and f.block}
    if not (all(max(blocks) % b == 0 for b in blocks) if blocks else True):
        reject(op, "blocks", sorted(blocks), "multiples of one another")
    dtype, device = (grads[0].dtype, params[0].device) if n else (None, None)
    for i, (p, g) in enumerate(zip(params, grads)):
        if g.dtype != dtype or dtype not in FLOATS:
            reject(op, f"grads[{i}]", g, "fp32, bf16 or fp16, one dtype for all", TypeError)
        if g.layout != torch.strided:
            reject(op, f"grads[{i}]", str(g.layout), "dense (strided)", TypeError)
        if g.device != device or p.device != device:
            reject(op, f"grads[{i}]", g, f"on {device}, as its parameter and all the others")
        shape = as_matrix_shape(g)
        if not (param_format.blocked or p.shape == g.shape):
            reject(op, f"grads[{i}]", g, f"of its parameter's shape {tuple(p.shape)}")
        _check_stored(op, "params", i, p, param_scales[i] if param_format.blocked else None,
                      param_zeros[i] if has_zeros else None, param_format, shape, device)
        for s, f in enumerate(formats):
            _check_stored(op, "states", i * count + s, states[i * count + s], state_scales[i * count + s] if f.blocked else None,
                          None, f, shape, device)


def as_matrix_shape(g):
    """(rows, columns) of the 2-D view that formats see."""
    shape = g.shape
    if len(shape) == 2:
        return shape
    return (1, g.numel()) if len(shape) < 2 else (shape[0], shape[1:].numel())


def _fake(*args, **kwargs):
    return None


def _table(rule, params, param_scales, param_zeros, grads, states, state_scales, ids, param_code, param_block, state_codes, state_block, offsets):
    """What the native call takes: (arguments before the table, the table), which tensors it holds (not the empty ones), and
    (original, copy) of those whose layout needed a copy."""
    count, param_format = len(state_codes), cached(param_code, param_block)
    has_scales = [cached(c).blocked for c in state_codes]
    has_zeros = param_format.has_zero_point or param_code in SPLIT
    table, copies, kept = [], [], []

    def contiguous(t):
        # Elements are numbered in logical order (Philox, blocks): any other layout works on a copy.
        if t.is_contiguous():
            return t
        copy = t.contiguous()
        copies.append((t, copy))
        return copy

    for i, (p, g) in enumerate(zip(params, grads)):
        if not g.numel():
            continue
        kept.append(i)
        p = contiguous(p)
        if not g.is_contiguous():
            g = g.contiguous()
            copies.append((None, g))  # keeps it alive until the call
        table += (p.data_ptr(), param_scales[i].data_ptr() if param_format.blocked else 0,
                  param_zeros[i].data_ptr() if has_zeros else 0, *as_matrix_shape(g), g.data_ptr(), ids[i], offsets[i] if offsets else 0)
        for s in range(i * count, (i + 1) * count):
            table += (contiguous(states[s]).data_ptr(), state_scales[s].data_ptr() if has_scales[s - i * count] else 0)
    head = (native_module().rules[rule][0], CODES[param_code], param_block, CODES[float_code(grads[0].dtype)], [CODES[c] for c in state_codes], state_block)
    return (head, table), kept, copies


def _native(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
            state_codes, state_block, offsets=None, counts=None):
    if not params:
        return
    if counts is not None and where(params[0])[0] < 0:  # for tests: optimizers count on the device where that is not the CPU
        return reference.fused_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
                                    state_codes, state_block, offsets, counts)
    (head, table), kept, copies = _table(rule, params, param_scales, param_zeros, grads, states, state_scales, ids, param_code, param_block,
                                         state_codes, state_block, offsets)
    if not kept:
        return
    if scalars.shape[0] > 1 and len(kept) < len(params):
        scalars = scalars[kept]
    seed, step = key.tolist()
    if counts is not None:
        counts = counts if len(kept) == len(params) else counts[kept]
        native_module().fused_step_live(*where(params[0]), *head, table, scalars.data_ptr(), counts.data_ptr(), seed & 0xFFFFFFFFFFFFFFFF)
    else:
        native_module().fused_step(*where(params[0]), *head, table, scalars.flatten().tolist(), seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF)
    for original, copy in copies:
        if original is not None:
            original.copy_(copy)


def repeats_on(device: str) -> bool:
    """Whether a step on this kind of device runs in native code now."""
    return device in ("cpu", "cuda") and fused_step.function(device) is _native


class Launch:
    """A native fused step that took place, to be repeated with other gradients: checking ten thousand small tensors again costs
    more than stepping them. Its owner sees to it that params and states still are the tensors they were, contiguous and not
    empty, on a device that ``repeats_on`` says yes to.
    """

    def __init__(self, rule, params, param_scales, param_zeros, grads, states, state_scales, ids, param_code, param_block, state_codes, state_block, offsets=None):
        (self._head, self._table), *_ = _table(rule, params, param_scales, param_zeros, grads, states, state_scales, ids, param_code,
                                               param_block, state_codes, state_block, offsets)
        self._width, self._numels, self._like = 8 + 2 * len(state_codes), [g.numel() for g in grads], grads[0].new_empty(0)

    def fits(self, grads) -> bool:
        """Whether ``grads`` can take the place of the first ones."""
        dtype, device, strided = self._like.dtype, self._like.device, torch.strided
        return (repeats_on(device.type) and _registry.profiler is None and [g.numel() for g in grads] == self._numels
                and all([g.dtype == dtype and g.layout == strided and g.is_contiguous() and g.device == device and not g.is_neg() for g in grads]))

    def run(self, grads, scalars, seed, step):
        """The step, with ``scalars`` a list of MAX_SCALARS."""
        self._table[5::self._width] = [g.data_ptr() for g in grads]
        native_module().fused_step(*where(self._like), *self._head, self._table, scalars, seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF)

    def run_live(self, grads, scalars, counts, seed):
        """The step with ``scalars`` and ``counts`` as fused_step takes them from the device."""
        self._table[5::self._width] = [g.data_ptr() for g in grads]
        native_module().fused_step_live(*where(self._like), *self._head, self._table, scalars.data_ptr(), counts.data_ptr(), seed & 0xFFFFFFFFFFFFFFFF)


fused_step = Op(
    "fused_step",
    "(str rule, Tensor(a!)[] params, Tensor(b!)[] param_scales, Tensor(c!)[] param_zeros, Tensor[] grads, Tensor(d!)[] states, "
    "Tensor(e!)[] state_scales, Tensor scalars, Tensor key, int[] ids, str param_code, int param_block, str[] state_codes, "
    "int state_block, int[]? offsets=None, Tensor? counts=None) -> ()",
    _check, _fake,
    backends={"native": _native, "triton": "gradmill.kernels.optim:fused_step", "reference": reference.fused_step},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
fused_step.__doc__ = """fused_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code,
param_block, state_codes, state_block)

Steps every tensor in place by ``rule``. All tensors of a call share formats and gradient dtype. params are stored in
Format(param_code, param_block): plain tensors of any shape, or codes (rows, ...) with param_scales and param_zeros.
states are listed tensor by tensor, state_scales likewise (empty tensors for plain states). scalars is fp32 on CPU,
(1 or tensors, 16): [0] multiplies the gradient, the rest is the rule's (pyops/optim/rules.py). key = [seed, step] and
ids number the random words; bf16 and quantised params round stochastically, states to nearest, but second moments (square8,
square4) with dither. offsets: for row shards of larger tensors, the number of each one's first element in the whole tensor.
Params in two pieces ("bf16+16" and its like, formats.SPLIT) have their low bits, of the param's shape, in param_zeros.
counts: fp32 (tensors,), each tensor's step in place of key's; one below 0 is not stepped. It is on the params' device, and so is
scalars then, (tensors, 16): both are read when the kernel runs, not before, so that a CUDA graph replays with what they hold.
Raises TypeError and ValueError naming the argument."""


# --- steps scaled by norms --------------------------------------------------------------------------------
def _check_scaled(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
                  state_codes, state_block, lr, coefficient, decay, factor, offsets=None):
    if rule not in ("lamb", "lars"):
        reject("scaled_step", "rule", rule, "lamb or lars")
    if scalars.shape != (1, MAX_SCALARS):
        reject("scaled_step", "scalars", scalars, f"fp32 on CPU of shape (1, {MAX_SCALARS})")
    if param_code == "delta":
        reject("scaled_step", "param_code", param_code, "a code that weights are stored in")
    _check(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block, state_codes, state_block, offsets)


def _native_scaled(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
                   state_codes, state_block, lr, coefficient, decay, factor, offsets=None):
    if not params:
        return
    (head, table), kept, copies = _table(rule, params, param_scales, param_zeros, grads, states, state_scales, ids, param_code, param_block,
                                         state_codes, state_block, offsets)
    if not kept:
        return
    (seed, step), native = key.tolist(), native_module()
    native.scaled_step(*head, table, scalars.flatten().tolist(), seed & 0xFFFFFFFFFFFFFFFF, step & 0xFFFFFFFF,
                       native.rules["sgd"][0] if rule == "lamb" else -1, lr, coefficient, decay, factor)
    for original, copy in copies:
        if original is not None:
            original.copy_(copy)


scaled_step = Op(
    "scaled_step",
    "(str rule, Tensor(a!)[] params, Tensor(b!)[] param_scales, Tensor(c!)[] param_zeros, Tensor[] grads, Tensor(d!)[] states, "
    "Tensor(e!)[] state_scales, Tensor scalars, Tensor key, int[] ids, str param_code, int param_block, str[] state_codes, "
    "int state_block, float lr, float coefficient, float decay, float factor, int[]? offsets=None) -> ()",
    _check_scaled, _fake, backends={"native": _native_scaled, "reference": reference.scaled_step},
    order={"cpu": ("native", "reference"), "cuda": ("reference",)})
scaled_step.__doc__ = """scaled_step(rule, ..., state_block, lr, coefficient, decay, factor, offsets=None)

fused_step of a rule whose rate is a function of norms of each whole tensor, the norms included: one call, and tensors that fit the cache
stay there between the norms and what they scale. Arguments up to state_block are fused_step's, one row of scalars for all. With norms as
``measure`` finds them, in float64, of the weight's fp32 value w: "lamb": the rule turns a copy of the weight into its update u, which the
rule "sgd" applies at the rate lr * min(norm(w) / norm(u), coefficient); "lars": its fourth scalar becomes lr * coefficient * norm(w) /
(factor * norm(gradient) + decay * norm(w)). The rate is lr where a norm is 0 or nan. Raises TypeError and ValueError naming the argument."""


# --- norms ------------------------------------------------------------------------------------------------
def _check_measure(tensors, limits=None):
    for i, x in enumerate(tensors):
        if x.dtype not in FLOATS or x.dtype != tensors[0].dtype:
            reject("measure", f"tensors[{i}]", x, "fp32, bf16 or fp16, one dtype for all", TypeError)
        if x.layout != torch.strided:
            reject("measure", f"tensors[{i}]", str(x.layout), "dense (strided)", TypeError)
        if x.device != tensors[0].device:
            reject("measure", f"tensors[{i}]", x, f"on {tensors[0].device}, as the first")
    if limits is not None and not (limits.dtype == torch.float32 and limits.shape == (len(tensors), 2) and limits.device.type in ("cpu", "meta")):
        reject("measure", "limits", limits, f"fp32 on CPU of shape ({len(tensors)}, 2)")


def _empty_measures(tensors, limits=None):
    return torch.empty(len(tensors), 2, dtype=torch.float64, device=tensors[0].device)


def _native_measure(tensors, limits=None):
    out = _empty_measures(tensors)
    tensors = [x.contiguous() for x in tensors]
    chunks = sum(-(-x.numel() // reference.CHUNK) for x in tensors)
    partials = torch.empty(chunks, 2, dtype=torch.float64, device=out.device)
    limits = [float("inf"), 1.0] * len(tensors) if limits is None else limits.flatten().tolist()
    native_module().measure(*where(out), CODES[float_code(tensors[0].dtype)], [v for x in tensors for v in (x.data_ptr(), x.numel())], limits,
                            partials.data_ptr(), out.data_ptr())
    return out


measure = Op(
    "measure", "(Tensor[] tensors, Tensor? limits=None) -> Tensor", _check_measure, _empty_measures,
    backends={"native": _native_measure, "triton": "gradmill.kernels.optim:measure_tensors", "reference": reference.measure},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
measure.__doc__ = """measure(tensors, limits=None)

float64 (tensors, 2): the sum of squares and the largest magnitude of each, on their device. A tensor with a nan has nan in
both, one with an inf and no nan inf. tensors: at least one, fp32, bf16 or fp16, one dtype, any shapes. limits: fp32 (tensors, 2) on CPU,
(limit, factor): elements whose magnitude exceeds the limit count multiplied by the factor. Squares are exact in double and
added in a fixed order, so that threads and backends give the same bits. Raises TypeError and ValueError naming the argument."""
