"""Reference of the optim family: each rule in plain torch, and the step that wraps formats around it.

Every operation is an fp32 add, multiply, divide or square root in the order written (no fused multiply-add), so
that csrc/common/rules.h and kernels/optim.py give the same bits.
"""
from __future__ import annotations

import torch

from gradmill.formats import Format
from gradmill.reference import quant
from gradmill.reference.philox import stream


def adamw(p, g, states, h):
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2 (torch.optim.AdamW's form)."""
    m, v = states
    _, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps = h[:8]
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    p = p * decay - step_size * (m / (quant.sqrt(v) * inv_sqrt_bc2 + eps))
    return p, [m, v]


def adamw_amsgrad(p, g, states, h):
    """AdamW with the maximum of past v in the denominator (Reddi et al., "On the Convergence of Adam and Beyond")."""
    m, v, v_max = states
    _, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bc2, eps = h[:8]
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    v_max = torch.maximum(v_max, v)
    p = p * decay - step_size * (m / (quant.sqrt(v_max) * inv_sqrt_bc2 + eps))
    return p, [m, v, v_max]


def lion(p, g, states, h):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", Algorithm 2."""
    (m,) = states
    _, decay, one_minus_beta1, one_minus_beta2, lr = h[:5]
    u = m + one_minus_beta1 * (g - m)
    p = p * decay - lr * torch.where(u.isnan(), u, torch.sign(u))  # torch.sign(nan) is 0: a nan would vanish
    m = m + one_minus_beta2 * (g - m)
    return p, [m]


#: name -> rule(p, g, states, scalars) -> (p, states)
RULES = {"adamw": adamw, "adamw_amsgrad": adamw_amsgrad, "lion": lion}


def as_matrix(t):
    """The 2-D view formats see: rows = first dimension, the rest flattened; 1-D and 0-D count as one row."""
    return t.reshape(1, -1) if t.dim() < 2 else t.reshape(t.shape[0], t.shape[1:].numel())


def load(codes, scales, zeros, format, columns):
    if format.code == "delta":
        return torch.zeros_like(codes)
    if not format.blocked:
        return codes.to(torch.float32)
    return quant.dequantize(codes, scales, zeros, format.code, format.block, columns, torch.float32)


def changed_blocks(old, new, block):
    """(rows, blocks) bool: where any bit of the block differs."""
    differ = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    return quant._blocks(differ.to(torch.int32), block).bool().any(-1)


def write(codes, scales, zeros, format, values, key=None, stream_word=0, old=None, dither=False):
    """Stores fp32 ``values`` in place. ``old``: blocks without any change keep codes and scale."""
    new_codes, new_scales, new_zeros = quant.store(values, format, key, stream_word, dither)
    if format.blocked:
        if old is not None and values.numel():
            changed = changed_blocks(old, values, format.block)
            per_code = changed.repeat_interleave((format.block or values.shape[1]) * format.bits // 8 or 1, dim=1)
            if format.block == 0:
                per_code = changed.expand(-1, codes.shape[1])
            new_codes = torch.where(per_code[:, :codes.shape[1]], new_codes, codes)
            new_scales = torch.where(changed, new_scales, scales)
            if format.has_zero_point:
                new_zeros = torch.where(changed, new_zeros, zeros)
        scales.copy_(new_scales)
        if format.has_zero_point:
            zeros.copy_(new_zeros)
    codes.copy_(new_codes.view(codes.shape))


def fused_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids,
               param_code, param_block, state_codes, state_block):
    """See gradmill.ops.optim.fused_step."""
    count = len(state_codes)
    param_format = Format(param_code, param_block)
    state_formats = [Format(code, state_block if Format(code).blocked else 0) for code in state_codes]
    rows = scalars.tolist()
    for i, (param, grad) in enumerate(zip(params, grads)):
        h = rows[i if len(rows) > 1 else 0]
        g = as_matrix(grad).to(torch.float32) * h[0]
        columns = g.shape[1]
        scales = param_scales[i] if param_format.blocked else None
        zeros = param_zeros[i] if param_format.has_zero_point else None
        p = load(as_matrix(param), scales, zeros, param_format, columns)
        old_states = [load(as_matrix(states[i * count + s]), state_scales[i * count + s] if f.blocked else None, None, f, columns)
                      for s, f in enumerate(state_formats)]
        new_p, new_states = RULES[rule](p, g, old_states, h)
        for s, f in enumerate(state_formats):
            dither = f.code == "square8"  # a second moment rounded to nearest would freeze
            write(as_matrix(states[i * count + s]), state_scales[i * count + s] if f.blocked else None, None, f, new_states[s],
                  key if dither else None, stream(ids[i], "dither"), dither=dither)
        rounding = key if param_code not in ("fp32", "fp16", "delta") else None
        write(as_matrix(param), scales, zeros, param_format, new_p, rounding, stream(ids[i], "weight"), old=p)
