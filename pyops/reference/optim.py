"""Reference of the optim family: each rule in plain torch, and the step that wraps formats around it.

Every operation is an fp32 add, multiply, divide or square root in the order written (no fused multiply-add), so
that csrc/common/rules.h and kernels/optim.py give the same bits. The same lines in float64 step float64 parameters (float64_step).
"""
from __future__ import annotations

import torch

from gradmill.formats import SPLIT, Format
from gradmill.reference import quant
from gradmill.reference.philox import stream


def sign(x):
    return torch.where(x.isnan(), x, torch.sign(x))  # torch.sign(nan) is 0: a nan would vanish


def magnitude(x):
    return torch.where(x < 0, -x, x)


def exp2(x):
    """2^x by a polynomial on [-1/2, 1/2], saturating at 2^-126 and 2^127.75; relative error within (1 + |x|) 2^-23. float64: torch's."""
    if x.dtype == torch.float64:
        return x.exp2()
    x = torch.where(x < -126, -126.0, torch.where(x > 127.75, 127.75, x))
    shifted = x + 12582912.0  # 1.5 * 2^23: the low bits are the nearest whole number
    f = x - (shifted - 12582912.0)
    p = f * 1.53533663e-4
    for c in (1.33988797e-3, 9.61843692e-3, 5.55033237e-2, 0.240226477, 0.693147182):
        p = (p + c) * f
    return ((p + 1).view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def log2(x):
    """log2 of normal numbers x > 0: exponent plus a series in (m - 1) / (m + 1); error within 2^-22 of max(1, |log2 x|)."""
    bits = x.view(torch.int32) + (0x3f800000 - 0x3f3504f3)
    m = ((bits & 0x7fffff) + 0x3f3504f3).view(torch.float32)
    e = ((bits >> 23) + 0x4b400000).view(torch.float32) - (12582912.0 + 127.0)
    s = (m - 1) / (m + 1)
    s2 = s * s
    return e + (((s2 * 0.431735814 + 0.576714396) * s2 + 0.961798847) * s2 + 2.88539004) * s


def power(x, y: float):
    """x^y for x >= 0: exact products and roots for y of 1, 2 and 1/2, else within (4 + |y log2 x|) 2^-23 of itself."""
    if y in (1.0, 2.0, 0.5):
        return x if y == 1.0 else x * x if y == 2.0 else quant.sqrt(x)
    if x.dtype == torch.float64:
        return x ** y
    return torch.where(x - x != 0, x, torch.where(x < 1.17549435e-38, 0.0, exp2(log2(x) * y)))


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
    p = p * decay - lr * sign(u)
    m = m + one_minus_beta2 * (g - m)
    return p, [m]


def adam(p, g, states, h):
    """Kingma and Ba, "Adam", in torch.optim.Adam's form: the decay is part of the gradient (h[1] is 1)."""
    return adamw(p, g + h[8] * p, states, h)


def adam_amsgrad(p, g, states, h):
    return adamw_amsgrad(p, g + h[8] * p, states, h)


def with_decay(g, decay, p):
    """The gradient with a decay in it, and as it is where there is none: 0 times a weight of inf (a mask, say) is nan."""
    return g + decay * p if decay else g


def sgd(p, g, states, h):
    """torch.optim.SGD without momentum; h[1] multiplies p."""
    _, factor, lr, decay = h[:4]
    return p * factor - lr * with_decay(g, decay, p), []


def sgd_momentum(p, g, states, h):
    """torch.optim.SGD; with dampening = momentum the moving average of Muon and AuON."""
    (b,) = states
    _, factor, lr, decay, momentum, one_minus_dampening, nesterov = h[:7]
    g = with_decay(g, decay, p)
    b = momentum * b + one_minus_dampening * g
    return p * factor - lr * (nesterov * g + momentum * b if nesterov else b), [b]


def adagrad(p, g, states, h):
    """Duchi, Hazan and Singer, "Adaptive Subgradient Methods", in torch.optim.Adagrad's form."""
    (total,) = states
    _, lr, decay, eps = h[:4]
    g = with_decay(g, decay, p)
    total = total + g * g
    return p - lr * (g / (quant.sqrt(total) + eps)), [total]


def adabelief(p, g, states, h):
    """Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients"."""
    m, s = states
    _, factor, one_minus_beta1, beta2, one_minus_beta2, step_size, root_factor, rest, eps, decay = h[:10]
    g = with_decay(g, decay, p)
    m = m + one_minus_beta1 * (g - m)
    d = g - m
    s = (s * beta2 + (one_minus_beta2 * d) * d) + eps
    return p * factor - step_size * (m / (quant.sqrt(s) * root_factor + rest)), [m, s]


def diffgrad(p, g, states, h):
    """Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks"."""
    m, v, previous = states
    _, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = h[:7]
    g = with_decay(g, decay, p)
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    friction = 1 / (1 + exp2(magnitude(previous - g) * -1.4426950408889634))
    return p - step_size * ((friction * m) / (quant.sqrt(v) + eps)), [m, v, g]


def grams(p, g, states, h):
    """Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling"."""
    m, v = states
    _, factor, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = h[:7]
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    return p * factor - step_size * (sign(g) * (magnitude(m) / (quant.sqrt(v) + eps))), [m, v]


def sophia(p, g, states, h):
    """Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer", Algorithm 3."""
    m, hessian = states
    _, factor, one_minus_beta1, rho, eps, lr = h[:6]
    m = m + one_minus_beta1 * (g - m)
    d = rho * hessian
    u = m / torch.where(d < eps, eps, d)
    return p * factor - lr * torch.where(u > 1, 1.0, torch.where(u < -1, -1.0, u)), [m, hessian]


def sophia_hessian(p, g, states, h):
    """Sophia's moving average of the Hessian's diagonal, of estimates or of squared gradients; p stays."""
    (hessian,) = states
    _, beta2, on_estimate, on_square = h[:4]
    return p, [hessian * beta2 + (on_estimate * g if on_estimate else (on_square * g) * g)]


def classp(p, g, states, h):
    """Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning"."""
    (total,) = states
    _, lr, threshold, eps, exponent, inverse = h[:6]
    grown = total + power(magnitude(g), exponent)
    kept = g * g <= threshold
    return torch.where(kept, p, p - lr * (g / power(grown + eps, inverse))), [torch.where(kept, total, grown)]


def lamb(p, g, states, h):
    """You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2, first half: p, a copy
    of the weight, becomes the update; sgd applies it times the trust ratio."""
    m, v = states
    _, decay, one_minus_beta1, beta2, one_minus_beta2, inv_bc1, inv_sqrt_bc2, eps = h[:8]
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + (one_minus_beta2 * g) * g
    return decay * p + inv_bc1 * (m / (quant.sqrt(v) * inv_sqrt_bc2 + eps)), [m, v]


def lars(p, g, states, h):
    """You et al., "Large Batch Training of Convolutional Networks", Algorithm 1; h3 is the rate times the trust ratio."""
    (m,) = states
    _, decay, momentum, rate = h[:4]
    m = momentum * m + rate * (g + decay * p)
    return p - m, [m]


def stable_spam(p, g, states, h):
    """Huang et al., "Stable-SPAM", Algorithm 1: AdamW after clipping single elements and scaling the tensor's gradient."""
    limit, share, scale = h[9:12]
    return adamw(p, scale * torch.where(magnitude(g) > limit, share * g, g), states, h)


#: name -> rule(p, g, states, scalars) -> (p, states)
RULES = {f.__name__: f for f in (adamw, adamw_amsgrad, lion, adam, adam_amsgrad, sgd, sgd_momentum, adagrad, adabelief, diffgrad, grams, sophia,
                                 sophia_hessian, classp, lamb, lars, stable_spam)}


def float64_step(rule, p, g, states, scalars, live=None):
    """Steps the float64 parameter p and its float64 states in place, with scalars as fused_step takes a row of them, but exact (numbers, or
    tensors on p's device). ``live``, a tensor there, says whether the step is taken at all."""
    parts = [(p, g, *states)]
    if p.device.type == "cpu" and all(t.is_contiguous() for t in parts[0]):  # in pieces whose many intermediate results stay in the cache
        parts = zip(*(t.view(-1).split(1 << 14) for t in parts[0]))
    for p, g, *states in parts:
        stepped, new_states = RULES[rule](p, g.to(torch.float64) * scalars[0], states, scalars)
        for old, new in zip((p, *states), (stepped, *new_states)):
            old.copy_(new if live is None else torch.where(live, new, old))


def as_matrix(t):
    """The 2-D view formats see: rows = first dimension, the rest flattened; 1-D and 0-D count as one row."""
    return t.reshape(1, -1) if t.dim() < 2 else t.reshape(t.shape[0], t.shape[1:].numel())


def load(codes, scales, zeros, format, columns):
    if format.code == "delta":
        return torch.zeros_like(codes)
    if format.code in SPLIT:
        return quant.join_float(codes, as_matrix(zeros), format.code)
    if not format.blocked:
        return codes.to(torch.float32)
    return quant.dequantize(codes, scales, zeros, format.code, format.block, columns, torch.float32)


def changed_blocks(old, new, block):
    """(rows, blocks) bool: where any bit of the block differs."""
    differ = old.contiguous().view(torch.int32) != new.contiguous().view(torch.int32)
    return quant._blocks(differ.to(torch.int32), block).bool().any(-1)


def write(codes, scales, zeros, format, values, key=None, stream_word=0, old=None, dither=False, first=0):
    """Stores fp32 ``values`` in place. ``old``: blocks without any change keep codes and scale."""
    new_codes, new_scales, new_zeros = quant.store(values, format, key, stream_word, dither, first)
    if format.blocked:
        if old is not None and values.numel():
            changed = changed_blocks(old, values, format.block)
            per_code = changed.repeat_interleave((format.block or values.shape[1]) * format.bits // 8 or 1, dim=1)
            if format.block == 0:
                per_code = changed.expand(-1, codes.shape[1])
            new_codes = torch.where(per_code[:, :codes.shape[1]], new_codes.view(torch.uint8), codes.view(torch.uint8)).view(codes.dtype)
            new_scales = torch.where(changed, new_scales, scales)
            if format.has_zero_point:
                new_zeros = torch.where(changed, new_zeros, zeros)
        scales.copy_(new_scales)
        if format.has_zero_point:
            zeros.copy_(new_zeros)
    if format.code in SPLIT:
        zeros.copy_(new_zeros.view(zeros.shape))
    codes.copy_(new_codes.view(codes.shape))


def fused_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids,
               param_code, param_block, state_codes, state_block, offsets=None, counts=None):
    """See gradmill.ops.optim.fused_step."""
    count = len(state_codes)
    param_format = Format(param_code, param_block)
    state_formats = [Format(code, state_block if Format(code).blocked else 0) for code in state_codes]
    rows, steps = scalars.tolist(), None if counts is None else counts.tolist()
    for i, (param, grad) in enumerate(zip(params, grads)):
        if steps is not None and steps[i] < 0:
            continue
        if steps is not None:
            key = torch.tensor([key[0], int(steps[i])], dtype=torch.int64, device="cpu")
        h = rows[i if len(rows) > 1 else 0]
        g = as_matrix(grad).to(torch.float32) * h[0]
        columns = g.shape[1]
        scales = param_scales[i] if param_format.blocked else None
        zeros = param_zeros[i] if param_format.has_zero_point or param_code in SPLIT else None
        first = offsets[i] if offsets else 0
        p = load(as_matrix(param), scales, zeros, param_format, columns)
        old_states = [load(as_matrix(states[i * count + s]), state_scales[i * count + s] if f.blocked else None, None, f, columns)
                      for s, f in enumerate(state_formats)]
        new_p, new_states = RULES[rule](p, g, old_states, h)
        for s, f in enumerate(state_formats):
            dither = f.code.startswith("square")  # a second moment rounded to nearest would freeze
            write(states[i * count + s], state_scales[i * count + s] if f.blocked else None, None, f, new_states[s],
                  key if dither else None, stream(ids[i], "dither"), dither=dither, first=first)
        rounding = key if param_code not in ("fp32", "fp16", "delta") else None
        write(param, scales, zeros, param_format, new_p, rounding, stream(ids[i], "weight"), old=p, first=first)


def scaled_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
                state_codes, state_block, lr, coefficient, decay, factor, offsets=None):
    """See gradmill.ops.optim.scaled_step."""
    format, row = Format(param_code, param_block), scalars.clone()
    for i, grad in enumerate(grads):
        if not grad.numel():
            continue
        one, own = slice(i, i + 1), slice(i * len(state_codes), (i + 1) * len(state_codes))
        place = key, ids[one], param_code, param_block
        first = offsets[one] if offsets else None
        value = load(as_matrix(params[i]), param_scales[i] if format.blocked else None,
                     param_zeros[i] if format.has_zero_point or param_code in SPLIT else None, format, as_matrix(grad).shape[1]).clone()
        other, weight = grad, float(measure([value])[0, 0].sqrt())
        if rule == "lamb":
            other = value.view(grad.shape)
            fused_step(rule, [other], [], [], [grad], states[own], state_scales[own], scalars, key, ids[one], "fp32", 0, state_codes, state_block, first)
        rate, norm = lr, float(measure([other])[0, 0].sqrt())
        if weight > 0 and norm > 0:
            rate = lr * (min(weight / norm, coefficient) if rule == "lamb" else coefficient * weight / (factor * norm + decay * weight))
        if rule == "lamb":
            row[0, :4] = torch.tensor([1.0, 1.0, rate, 0.0])
            fused_step("sgd", params[one], param_scales[one], param_zeros[one], [other], [], [], row, *place, [], 0, first)
        else:
            row[0, 3] = rate
            fused_step(rule, params[one], param_scales[one], param_zeros[one], [grad], states[own], state_scales[own], row, *place, state_codes, state_block, first)


CHUNK = 4096  # elements whose squares are added up before anything else


def measure(tensors, limits=None):
    """See gradmill.ops.optim.measure: chunk by chunk in lanes, then the chunks' sums in lanes (quant.lane_sums)."""
    out = torch.zeros(len(tensors), 2, dtype=torch.float64, device=tensors[0].device)
    for i, x in enumerate(tensors):
        x = x.reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
        if limits is not None:
            limit, factor = limits[i].tolist()
            x = torch.where(x.abs() > limit, x * factor, x)
        if x.numel():
            x = x.to(torch.float64)
            squares = torch.nn.functional.pad(x * x, (0, -x.numel() % CHUNK)).view(-1, CHUNK)
            out[i, 0], out[i, 1] = quant.lane_sums(quant.lane_sums(squares)), x.abs().amax()
    return out
