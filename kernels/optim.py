"""optim: one fused step for a whole parameter group: rule x state formats x weight format, few launches.

Every tensor of the group is a row of a table in device memory (pointers, shape, Philox id, scalars); a program finds
its tensor by binary search over the tensors' first programs, so one launch serves any number of tensors that cut alike
(see Cut). The rule works on fp32 registers between decoding and encoding; nothing is written but the results.

Bytes per element, AdamW, fp32 gradient: fp32 weight and states read 16, write 12; bf16 weight, 8-bit states, bf16
gradient: read 6, write 4 (+ 16/256 for scales). Limit on an H100 (3.0 TB/s copy): 107 and 300 G elements/s. A
stochastically rounded weight adds some 25 integer operations per element (one Philox call makes four words), at 300 G
elements/s about half of the integer rate. Expected, never measured on a GPU yet.

To add a rule: a @triton.jit function of (p, g, s0, s1, s2, h) that returns (p, s0, s1, s2), a branch
in apply_rule and its name in RULES.
"""
from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl

from gradmill.formats import CODES, Format, float_code
from gradmill.kernels._common import (BF16, DITHER, LAUNCH, NEAREST, NONE, STOCHASTIC, block_parameters, block_scales, differs,
                                      is_blocked, is_square, joined, load_floats, load_operand, load_split, low_bits, magnitude as magnitude_bits,
                                      measure, power_of_two, ready, rounding_words, run_scales, store_blocks, store_floats, store_piece,
                                      store_scales, store_split, warps_for)
from gradmill.reference import optim as reference
from gradmill.reference.philox import PURPOSES
from gradmill.reference.quant import LANES

TILE = 1024         # elements a tile aims at: 4 a thread keep registers below 128, so that two programs share an SM
LONGEST = 2048      # a longer unit is worked off in chunks, in two passes
TILES = 16          # tiles a program works off: the search for its tensor is paid once
DITHER_PURPOSE = tl.constexpr(PURPOSES["dither"])  # the table's stream has the weight's purpose, 0


# --- rules ------------------------------------------------------------------------------------------------
# The C++ twins are in csrc/common/rules.h, the specification in pyops/reference/optim.py; h points at the tensor's 16
# scalars, of which h[0] multiplied g already. Unused states come in and go out as they are.
@triton.jit
def adamw(p, g, m, v, unused, h):
    m = m + tl.load(h + 2) * (g - m)
    v = v * tl.load(h + 3) + (tl.load(h + 4) * g) * g
    p = p * tl.load(h + 1) - tl.load(h + 5) * tl.div_rn(m, tl.sqrt_rn(v) * tl.load(h + 6) + tl.load(h + 7))
    return p, m, v, unused


@triton.jit
def adamw_amsgrad(p, g, m, v, vmax, h):
    m = m + tl.load(h + 2) * (g - m)
    v = v * tl.load(h + 3) + (tl.load(h + 4) * g) * g
    vmax = tl.where((v > vmax) | (v != v), v, vmax)
    p = p * tl.load(h + 1) - tl.load(h + 5) * tl.div_rn(m, tl.sqrt_rn(vmax) * tl.load(h + 6) + tl.load(h + 7))
    return p, m, v, vmax


@triton.jit
def lion(p, g, m, unused1, unused2, h):
    p = p * tl.load(h + 1) - tl.load(h + 4) * sign(m + tl.load(h + 2) * (g - m))
    m = m + tl.load(h + 3) * (g - m)
    return p, m, unused1, unused2


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, tl.where(x != x, x, 0.0)))  # nan stays


@triton.jit
def lamb(p, g, m, v, unused, h):
    m = m + tl.load(h + 2) * (g - m)
    v = v * tl.load(h + 3) + (tl.load(h + 4) * g) * g
    p = tl.load(h + 1) * p + tl.load(h + 5) * tl.div_rn(m, tl.sqrt_rn(v) * tl.load(h + 6) + tl.load(h + 7))
    return p, m, v, unused


@triton.jit
def lars(p, g, m, unused1, unused2, h):
    m = tl.load(h + 2) * m + tl.load(h + 3) * (g + tl.load(h + 1) * p)
    return p - m, m, unused1, unused2


@triton.jit
def stable_spam(p, g, m, v, unused, h):
    return adamw(p, tl.load(h + 11) * tl.where(magnitude(g) > tl.load(h + 9), tl.load(h + 10) * g, g), m, v, unused, h)


@triton.jit
def magnitude(x):
    return tl.where(x < 0.0, -x, x)


@triton.jit
def exp2_of(x):
    x = tl.where(x < -126.0, -126.0, tl.where(x > 127.75, 127.75, x))
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    p = (((((f * 1.53533663e-4 + 1.33988797e-3) * f + 9.61843692e-3) * f + 5.55033237e-2) * f + 0.240226477) * f + 0.693147182) * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log2_of(x):
    bits = x.to(tl.int32, bitcast=True) + (0x3f800000 - 0x3f3504f3)
    m = ((bits & 0x7fffff) + 0x3f3504f3).to(tl.float32, bitcast=True)
    e = ((bits >> 23) + 0x4b400000).to(tl.float32, bitcast=True) - (12582912.0 + 127.0)
    s = tl.div_rn(m - 1.0, m + 1.0)
    s2 = s * s
    return e + (((s2 * 0.431735814 + 0.576714396) * s2 + 0.961798847) * s2 + 2.88539004) * s


@triton.jit
def power(x, y):
    result = tl.where(x - x != 0.0, x, tl.where(x < 1.17549435e-38, 0.0, exp2_of(log2_of(x) * y)))
    return tl.where(y == 1.0, x, tl.where(y == 2.0, x * x, tl.where(y == 0.5, tl.sqrt_rn(x), result)))


@triton.jit
def with_decay(g, decay, p):
    return tl.where(decay != 0.0, g + decay * p, g)  # 0 times a weight of inf is nan


@triton.jit
def adam(p, g, m, v, unused, h):
    return adamw(p, g + tl.load(h + 8) * p, m, v, unused, h)


@triton.jit
def adam_amsgrad(p, g, m, v, vmax, h):
    return adamw_amsgrad(p, g + tl.load(h + 8) * p, m, v, vmax, h)


@triton.jit
def sgd(p, g, unused0, unused1, unused2, h):
    return p * tl.load(h + 1) - tl.load(h + 2) * with_decay(g, tl.load(h + 3), p), unused0, unused1, unused2


@triton.jit
def sgd_momentum(p, g, b, unused1, unused2, h):
    momentum, nesterov = tl.load(h + 4), tl.load(h + 6)
    g = with_decay(g, tl.load(h + 3), p)
    b = momentum * b + tl.load(h + 5) * g
    p = p * tl.load(h + 1) - tl.load(h + 2) * tl.where(nesterov != 0.0, nesterov * g + momentum * b, b)
    return p, b, unused1, unused2


@triton.jit
def adagrad(p, g, total, unused1, unused2, h):
    g = with_decay(g, tl.load(h + 2), p)
    total = total + g * g
    p = p - tl.load(h + 1) * tl.div_rn(g, tl.sqrt_rn(total) + tl.load(h + 3))
    return p, total, unused1, unused2


@triton.jit
def adabelief(p, g, m, s, unused, h):
    g = with_decay(g, tl.load(h + 9), p)
    m = m + tl.load(h + 2) * (g - m)
    d = g - m
    s = (s * tl.load(h + 3) + (tl.load(h + 4) * d) * d) + tl.load(h + 8)
    p = p * tl.load(h + 1) - tl.load(h + 5) * tl.div_rn(m, tl.sqrt_rn(s) * tl.load(h + 6) + tl.load(h + 7))
    return p, m, s, unused


@triton.jit
def diffgrad(p, g, m, v, previous, h):
    g = with_decay(g, tl.load(h + 1), p)
    m = m + tl.load(h + 2) * (g - m)
    v = v * tl.load(h + 3) + (tl.load(h + 4) * g) * g
    friction = tl.div_rn(tl.full(g.shape, 1.0, tl.float32), 1.0 + exp2_of(magnitude(previous - g) * -1.44269504))
    p = p - tl.load(h + 5) * tl.div_rn(friction * m, tl.sqrt_rn(v) + tl.load(h + 6))
    return p, m, v, g


@triton.jit
def grams(p, g, m, v, unused, h):
    m = m + tl.load(h + 2) * (g - m)
    v = v * tl.load(h + 3) + (tl.load(h + 4) * g) * g
    p = p * tl.load(h + 1) - tl.load(h + 5) * (sign(g) * tl.div_rn(magnitude(m), tl.sqrt_rn(v) + tl.load(h + 6)))
    return p, m, v, unused


@triton.jit
def sophia(p, g, m, hessian, unused, h):
    m = m + tl.load(h + 2) * (g - m)
    d = tl.load(h + 3) * hessian
    u = tl.div_rn(m, tl.where(d < tl.load(h + 4), tl.load(h + 4), d))
    p = p * tl.load(h + 1) - tl.load(h + 5) * tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))
    return p, m, hessian, unused


@triton.jit
def sophia_hessian(p, g, hessian, unused1, unused2, h):
    new = tl.where(tl.load(h + 2) != 0.0, tl.load(h + 2) * g, (tl.load(h + 3) * g) * g)
    return p, hessian * tl.load(h + 1) + new, unused1, unused2


@triton.jit
def classp(p, g, total, unused1, unused2, h):
    grown = total + power(magnitude(g), tl.load(h + 4))
    kept = g * g <= tl.load(h + 2)
    p = tl.where(kept, p, p - tl.load(h + 1) * tl.div_rn(g, power(grown + tl.load(h + 3), tl.load(h + 5))))
    return p, tl.where(kept, total, grown), unused1, unused2


RULES = ("adamw", "adamw_amsgrad", "lion", "adam", "adam_amsgrad", "sgd", "sgd_momentum", "adagrad", "adabelief", "diffgrad", "grams", "sophia",
         "sophia_hessian", "classp", "lamb", "lars", "stable_spam")  # the names apply_rule knows


@triton.jit
def apply_rule(RULE: tl.constexpr, p, g, s0, s1, s2, h):
    if RULE == "adamw":
        return adamw(p, g, s0, s1, s2, h)
    elif RULE == "adamw_amsgrad":
        return adamw_amsgrad(p, g, s0, s1, s2, h)
    elif RULE == "lion":
        return lion(p, g, s0, s1, s2, h)
    elif RULE == "adam":
        return adam(p, g, s0, s1, s2, h)
    elif RULE == "adam_amsgrad":
        return adam_amsgrad(p, g, s0, s1, s2, h)
    elif RULE == "sgd":
        return sgd(p, g, s0, s1, s2, h)
    elif RULE == "sgd_momentum":
        return sgd_momentum(p, g, s0, s1, s2, h)
    elif RULE == "adagrad":
        return adagrad(p, g, s0, s1, s2, h)
    elif RULE == "adabelief":
        return adabelief(p, g, s0, s1, s2, h)
    elif RULE == "diffgrad":
        return diffgrad(p, g, s0, s1, s2, h)
    elif RULE == "grams":
        return grams(p, g, s0, s1, s2, h)
    elif RULE == "sophia":
        return sophia(p, g, s0, s1, s2, h)
    elif RULE == "sophia_hessian":
        return sophia_hessian(p, g, s0, s1, s2, h)
    elif RULE == "classp":
        return classp(p, g, s0, s1, s2, h)
    elif RULE == "lamb":
        return lamb(p, g, s0, s1, s2, h)
    elif RULE == "lars":
        return lars(p, g, s0, s1, s2, h)
    elif RULE == "stable_spam":
        return stable_spam(p, g, s0, s1, s2, h)
    else:
        tl.static_assert(False, "unknown rule")


# --- the table --------------------------------------------------------------------------------------------
# One row of int64 words per tensor; the last 8 words hold the 16 fp32 scalars.
FIELDS = ("param", "param_scales", "param_zeros", "grad", "state0", "scales0", "state1", "scales1", "state2", "scales2", "rows", "columns",
          "unit", "chunk", "param_block", "state_block", "stream", "seed", "step", "first", "first_program")
WIDTH = tl.constexpr(len(FIELDS) + 8)
SCALARS = tl.constexpr(len(FIELDS))
(PARAM, PARAM_SCALES, PARAM_ZEROS, GRAD, STATE0, _, STATE1, _, STATE2, _, ROWS, COLUMNS, UNIT, CHUNK, PARAM_BLOCK, STATE_BLOCK,
 STREAM, SEED, STEP, FIRST, FIRST_PROGRAM) = (tl.constexpr(i) for i in range(len(FIELDS)))


# --- the step ---------------------------------------------------------------------------------------------
@triton.jit
def stepped(entry, p_scale, p_zero, scale0, scale1, scale2, row, col, limit, columns, RULE: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
            S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, P_SPLIT: tl.constexpr, S_SPLIT: tl.constexpr, P2: tl.constexpr):
    """Loads a tile and applies the rule: (old param, new param, new states). Whole-run scales come in, split ones are loaded."""
    if is_blocked(P) and P_SPLIT:
        p_scale, p_zero = block_scales(tl.load(entry + PARAM_SCALES), tl.load(entry + PARAM_ZEROS), row, col, limit, columns,
                                       tl.load(entry + PARAM_BLOCK), P, True, P2)
    if low_bits(P) > 0:
        old = load_split(tl.load(entry + PARAM), tl.load(entry + PARAM_ZEROS), row, col, limit, columns, P, P2)
    else:
        old = load_operand(tl.load(entry + PARAM), p_scale, p_zero, row, col, limit, columns, P, P2)
    s0 = load_state(entry + STATE0, scale0, row, col, limit, columns, tl.load(entry + STATE_BLOCK), S0, S_SPLIT, P2)
    s1 = load_state(entry + STATE1, scale1, row, col, limit, columns, tl.load(entry + STATE_BLOCK), S1, S_SPLIT, P2)
    s2 = load_state(entry + STATE2, scale2, row, col, limit, columns, tl.load(entry + STATE_BLOCK), S2, S_SPLIT, P2)
    h = (entry + SCALARS).to(tl.pointer_type(tl.float32))
    g = load_floats(tl.load(entry + GRAD), row, col, limit, columns, G, P2) * tl.load(h)
    p, s0, s1, s2 = apply_rule(RULE, old, g, s0, s1, s2, h)
    return old, p, s0, s1, s2


@triton.jit
def load_state(slot, scale, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr, P2: tl.constexpr):
    zero = scale
    if CODE >= 3 and SPLIT:
        scale, zero = block_scales(tl.load(slot + 1), tl.load(slot + 1), row, col, limit, columns, block, CODE, True, P2)
    return load_operand(tl.load(slot), scale, zero, row, col, limit, columns, CODE, P2)


@triton.jit
def store_param(param, scales, zeros, values, old, key, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr, P2: tl.constexpr):
    """bf16 and blocked weights round stochastically; a block whose values did not change is left alone."""
    if low_bits(CODE) > 0:
        store_split(param, zeros, values, rounding_words(key, row, col, 0, columns, STOCHASTIC if low_bits(CODE) == 8 else NEAREST, P2), row, col,
                    limit, columns, CODE, P2)
    elif is_blocked(CODE):
        store_blocks(param, scales, zeros, values, old, key, row, col, limit, columns, block, CODE, SPLIT, STOCHASTIC, True, P2)
    elif CODE == BF16:
        store_floats(param, values, rounding_words(key, row, col, 0, columns, STOCHASTIC, P2), row, col, limit, columns, CODE, True, P2)
    else:
        store_floats(param, values, 0, row, col, limit, columns, CODE, False, P2)


@triton.jit
def store_state(slot, values, key, row, col, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr, P2: tl.constexpr):
    """States are always written."""
    if is_square(CODE):  # a second moment rounded to nearest would freeze: it moves by less than half a code a step
        store_blocks(tl.load(slot), tl.load(slot + 1), 0, values, values, key, row, col, limit, columns, block, CODE, SPLIT, DITHER, False, P2)
    elif CODE >= 3:
        store_blocks(tl.load(slot), tl.load(slot + 1), 0, values, values, key, row, col, limit, columns, block, CODE, SPLIT, NEAREST, False, P2)
    elif CODE != NONE:
        store_floats(tl.load(slot), values, 0, row, col, limit, columns, CODE, False, P2)


@triton.jit
def store_state_piece(slot, values, scale, inverse, key, row, col, done, limit, columns, block, CODE: tl.constexpr, SPLIT: tl.constexpr,
                      P2: tl.constexpr):
    """The same ``done`` elements into a unit longer than a tile."""
    if is_square(CODE) and not SPLIT:
        store_piece(tl.load(slot), values, scale, inverse, key, row, col, done, limit, columns, CODE, DITHER, P2)
    elif CODE >= 3 and not SPLIT:
        store_piece(tl.load(slot), values, scale, inverse, key, row, col, done, limit, columns, CODE, NEAREST, P2)
    else:
        store_state(slot, values, key, row, col + done, limit, columns, block, CODE, SPLIT, P2)


@triton.jit
def step_kernel(table, tensors, RULE: tl.constexpr, P: tl.constexpr, G: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
                P_SPLIT: tl.constexpr, S_SPLIT: tl.constexpr, LOOP: tl.constexpr, ALIGNED: tl.constexpr, NB: tl.constexpr, P2: tl.constexpr,
                TILES: tl.constexpr):
    pid = tl.program_id(0)
    # Which tensor: the last one whose first program is not after this one.
    low = pid * 0
    high = low + tensors
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(table + middle.to(tl.int64) * WIDTH + FIRST_PROGRAM) > pid
        low, high = tl.where(after, low, middle), tl.where(after, middle, high)
    entry = table + low.to(tl.int64) * WIDTH

    P_BLOCKED: tl.constexpr = is_blocked(P)
    columns, unit, chunk = tl.load(entry + COLUMNS), tl.load(entry + UNIT), tl.load(entry + CHUNK)
    p_block, s_block = tl.load(entry + PARAM_BLOCK), tl.load(entry + STATE_BLOCK)
    param, p_scales, p_zeros = tl.load(entry + PARAM), tl.load(entry + PARAM_SCALES), tl.load(entry + PARAM_ZEROS)
    seed, step = tl.load(entry + SEED).to(tl.uint64, bitcast=True), tl.load(entry + STEP).to(tl.int32)
    stream = tl.load(entry + STREAM).to(tl.int32)
    shard = tl.load(entry + FIRST)
    key, dither = (seed, step, stream, ALIGNED, shard), (seed, step, stream + DITHER_PURPOSE, ALIGNED, shard)
    units_per_row = tl.cdiv(columns, unit)
    units = tl.where(tl.load(entry + STEP) < 0, 0, tl.load(entry + ROWS) * units_per_row)  # a step below 0: not stepped
    first = (pid - tl.load(entry + FIRST_PROGRAM)) * (NB * TILES)

    for tile in range(TILES):
        index = first + tile * NB + tl.arange(0, NB)
        row = index // units_per_row
        col = (index % units_per_row) * unit
        size = tl.where(index < units, tl.minimum(unit, columns - col), 0)
        p_scale, p_zero = run_scales(p_scales, p_zeros, row, col, size, columns, p_block, P, P_SPLIT, P2)
        scale0, _ = run_scales(tl.load(entry + STATE0 + 1), 0, row, col, size, columns, s_block, S0, S_SPLIT, P2)
        scale1, _ = run_scales(tl.load(entry + STATE1 + 1), 0, row, col, size, columns, s_block, S1, S_SPLIT, P2)
        scale2, _ = run_scales(tl.load(entry + STATE2 + 1), 0, row, col, size, columns, s_block, S2, S_SPLIT, P2)

        if not LOOP:  # the unit is in registers at once
            old, p, s0, s1, s2 = stepped(entry, p_scale, p_zero, scale0, scale1, scale2, row, col, size, columns, RULE, P, G, S0, S1, S2,
                                         P_SPLIT, S_SPLIT, P2)
            store_state(entry + STATE0, s0, dither, row, col, size, columns, s_block, S0, S_SPLIT, P2)
            store_state(entry + STATE1, s1, dither, row, col, size, columns, s_block, S1, S_SPLIT, P2)
            store_state(entry + STATE2, s2, dither, row, col, size, columns, s_block, S2, S_SPLIT, P2)
            store_param(param, p_scales, p_zeros, p, old, key, row, col, size, columns, p_block, P, P_SPLIT, P2)
        else:
            # A block longer than a tile: the first pass finds its new parameters, the second steps again and writes.
            none = tl.zeros((NB,), tl.int32)
            p_stats, stats0, stats1, stats2, changed = (none, none, none), (none, none, none), (none, none, none), (none, none, none), none
            for done in range(0, unit, chunk):
                limit = tl.minimum(size - done, chunk)
                old, p, s0, s1, s2 = stepped(entry, p_scale, p_zero, scale0, scale1, scale2, row, col + done, limit, columns, RULE, P, G, S0,
                                             S1, S2, P_SPLIT, S_SPLIT, P2)
                valid = tl.arange(0, P2)[None, :] < limit[:, None]
                p_stats, changed = joined(p_stats, measure(p, valid)), tl.maximum(changed, differs(p, old, valid))
                stats0, stats1, stats2 = joined(stats0, measure(s0, valid)), joined(stats1, measure(s1, valid)), joined(stats2, measure(s2, valid))
            new_scale, new_zero = block_parameters(p_stats[0], p_stats[1], p_stats[2], P)
            new0, zero0 = block_parameters(stats0[0], stats0[1], stats0[2], S0)
            new1, zero1 = block_parameters(stats1[0], stats1[1], stats1[2], S1)
            new2, zero2 = block_parameters(stats2[0], stats2[1], stats2[2], S2)
            for done in range(0, unit, chunk):
                limit = tl.minimum(size - done, chunk)
                old, p, s0, s1, s2 = stepped(entry, p_scale, p_zero, scale0, scale1, scale2, row, col + done, limit, columns, RULE, P, G, S0,
                                             S1, S2, P_SPLIT, S_SPLIT, P2)
                tl.debug_barrier()  # the loads above before the stores below, whichever thread does which
                store_state_piece(entry + STATE0, s0, new0, zero0, dither, row, col, done, limit, columns, s_block, S0, S_SPLIT, P2)
                store_state_piece(entry + STATE1, s1, new1, zero1, dither, row, col, done, limit, columns, s_block, S1, S_SPLIT, P2)
                store_state_piece(entry + STATE2, s2, new2, zero2, dither, row, col, done, limit, columns, s_block, S2, S_SPLIT, P2)
                if P_BLOCKED and not P_SPLIT:
                    store_piece(param, p, new_scale, new_zero, key, row, col, done, tl.where(changed != 0, limit, 0), columns, P, STOCHASTIC, P2)
                else:
                    store_param(param, p_scales, p_zeros, p, old, key, row, col + done, limit, columns, p_block, P, P_SPLIT, P2)
            tl.debug_barrier()  # every thread has read the old scales
            at_s, at_p = row * tl.cdiv(columns, s_block) + col // s_block, row * tl.cdiv(columns, p_block) + col // p_block
            if S0 >= 3 and not S_SPLIT:
                store_scales(tl.load(entry + STATE0 + 1), 0, at_s, new0, zero0, size > 0, S0)
            if S1 >= 3 and not S_SPLIT:
                store_scales(tl.load(entry + STATE1 + 1), 0, at_s, new1, zero1, size > 0, S1)
            if S2 >= 3 and not S_SPLIT:
                store_scales(tl.load(entry + STATE2 + 1), 0, at_s, new2, zero2, size > 0, S2)
            if P_BLOCKED and not P_SPLIT:
                store_scales(p_scales, p_zeros, at_p, new_scale, new_zero, (size > 0) & (changed != 0), P)


# --- host -------------------------------------------------------------------------------------------------
#: How a tensor is cut: tensors with the same Cut share a launch.
Cut = namedtuple("Cut", "p_split s_split loop aligned runs p2")


def _cut(rows, columns, param_format, state_blocked, state_block):
    """(Cut, rows, columns, unit, chunk, param block, state block) of a tensor. The unit is the longest block."""
    if not param_format.blocked and not state_blocked:
        rows, columns = 1, rows * columns  # no blocks: one long row
        unit = min(columns, TILE)
        chunk, p_block, s_block = unit, columns, columns
    else:
        p_block = min(param_format.block or columns, columns) if param_format.blocked else 0
        s_block = min(state_block or columns, columns) if state_blocked else 0
        unit = chunk = max(p_block, s_block)
        p_block, s_block = p_block or unit, s_block or unit
        shorter = min(p_block, s_block)
        if unit > LONGEST and (shorter == unit or shorter <= LONGEST):
            chunk = TILE if shorter == unit else max(1, TILE // shorter) * shorter
    # What is left is two different blocks that are both longer than LONGEST: one wide (and slow) tile.
    p2 = power_of_two(chunk)
    if p2 > 1 << 20:
        raise ValueError(f"gradmill.fused_step: blocks of {p_block} and {s_block} elements are too long for one Triton tile; "
                         "make them equal, or one of them shorter")
    aligned = (rows == 1 or columns % 4 == 0) and (unit >= columns or unit % 4 == 0) and (chunk >= unit or chunk % 4 == 0)
    cut = Cut(param_format.blocked and p_block < unit, state_blocked and s_block < unit, chunk < unit, aligned,
              1 if chunk < unit else max(1, TILE // p2), p2)
    return cut, rows, columns, unit, chunk, p_block, s_block


def fused_step(rule, params, param_scales, param_zeros, grads, states, state_scales, scalars, key, ids, param_code, param_block,
               state_codes, state_block, offsets=None, counts=None):
    """See gradmill.ops.optim.fused_step."""
    if params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("gradmill.fused_step: Triton's table of tensors is copied from the host, which a CUDA graph does not repeat; "
                           "capture with the native backend")
    count, param_format = len(state_codes), Format(param_code, param_block)
    blocked = [Format(code).blocked for code in state_codes]
    seed, step = key.tolist()
    keep, copy_back = [], []  # temporaries that must outlive the launches; layouts that work on a copy

    def address(t, written=True):
        if t.is_contiguous():
            return t.data_ptr()
        copy = t.contiguous()
        keep.append(copy)
        if written:
            copy_back.append((t, copy))
        return copy.data_ptr()

    launches: dict[Cut, list] = {}
    for i, (param, grad) in enumerate(zip(params, grads)):
        if not grad.numel():
            continue
        rows = grad.shape[0] if grad.dim() > 1 else 1
        cut, rows, columns, unit, chunk, p_block, s_block = _cut(rows, grad.numel() // rows, param_format, any(blocked), state_block)
        first = offsets[i] if offsets else 0
        if first % 4:
            cut = cut._replace(aligned=False)
        table, programs, members = launches.setdefault(cut, [[], 0, []])
        members.append(i)
        slots = [0] * 6
        for s in range(count):
            slots[2 * s:2 * s + 2] = address(states[i * count + s]), state_scales[i * count + s].data_ptr() if blocked[s] else 0
        table.append([address(param), param_scales[i].data_ptr() if param_format.blocked else 0,
                      param_zeros[i].data_ptr() if param_zeros else 0, address(grad, written=False), *slots, rows, columns,
                      unit, chunk, p_block, s_block, (ids[i] << 8 | PURPOSES["weight"]) & 0xFFFFFFFF, seed,
                      step & 0xFFFFFFFF, first, programs])
        units = rows * triton.cdiv(columns, unit)
        launches[cut][1] = programs + triton.cdiv(units, cut.runs * TILES)
    codes = [CODES[c] for c in state_codes] + [NONE.value] * (3 - count)
    for cut, (table, programs, members) in launches.items():
        if programs >= 1 << 31:
            raise ValueError("gradmill.fused_step: too many blocks for one Triton launch; take larger blocks")
        which, device = torch.tensor(members) if scalars.shape[0] > 1 else torch.zeros(len(members), dtype=torch.int64), params[0].device
        if counts is None:
            table = torch.cat([torch.tensor(table), scalars[which].contiguous().view(torch.int64)], dim=1).to(device, non_blocking=True)
        else:
            table, which = torch.tensor(table).to(device, non_blocking=True), which.to(device, non_blocking=True)
            table[:, STEP.value] = counts[which].to(torch.int64)
            table = torch.cat([table, scalars[which].view(torch.int64)], dim=1)
        with ready(params[0]):
            step_kernel[(programs,)](table, table.shape[0], RULE=rule, P=CODES[param_code], G=CODES[float_code(grads[0].dtype)], S0=codes[0],
                                     S1=codes[1], S2=codes[2], P_SPLIT=cut.p_split, S_SPLIT=cut.s_split, LOOP=cut.loop, ALIGNED=cut.aligned, NB=cut.runs,
                                     P2=cut.p2, TILES=TILES, num_warps=warps_for(4 * cut.runs * cut.p2), **LAUNCH)
    for original, copy in copy_back:
        original.copy_(copy)


# --- norms ------------------------------------------------------------------------------------------------
# Chunks' sums of squares in LANES lanes, then the chunks of a tensor added in the same way: two launches for all tensors.
CHUNK_SIZE, LANES = tl.constexpr(reference.CHUNK), tl.constexpr(LANES)
CHUNKS = 8  # chunks a program takes


@triton.jit
def lane_total(sums, NB: tl.constexpr):
    """(NB, LANES) -> (NB): lanes added in halves; a sum of two has no order."""
    tl.static_assert(LANES == 32)
    sums = tl.sum(tl.reshape(sums, (NB, 2, 16)), axis=1)
    sums = tl.sum(tl.reshape(sums, (NB, 2, 8)), axis=1)
    sums = tl.sum(tl.reshape(sums, (NB, 2, 4)), axis=1)
    sums = tl.sum(tl.reshape(sums, (NB, 2, 2)), axis=1)
    return tl.sum(sums, axis=1)


@triton.jit
def measure_kernel(table, tensors, partials, CODE: tl.constexpr, NB: tl.constexpr):
    pid = tl.program_id(0)
    low = pid * 0
    high = low + tensors
    while high - low > 1:  # the last tensor whose first program is not after this one
        middle = (low + high) // 2
        after = tl.load(table + middle.to(tl.int64) * 5 + 3) > pid
        low, high = tl.where(after, low, middle), tl.where(after, middle, high)
    entry = table + low.to(tl.int64) * 5
    count, limits = tl.load(entry + 1), (entry + 4).to(tl.pointer_type(tl.float32))
    chunk = (pid - tl.load(entry + 3)).to(tl.int64) * NB + tl.arange(0, NB)
    zero = (chunk * 0).to(tl.int64)
    size = tl.minimum(count - chunk * CHUNK_SIZE, CHUNK_SIZE)
    sums, largest = tl.zeros((NB, LANES), tl.float64), tl.zeros((NB, LANES), tl.int32)
    for at in range(0, CHUNK_SIZE, LANES):
        x = load_floats(tl.load(entry), zero, chunk * CHUNK_SIZE + at, size - at, count, CODE, LANES)
        x = tl.where(tl.abs(x) > tl.load(limits), x * tl.load(limits + 1), x)
        largest = tl.maximum(largest, magnitude_bits(x))
        x = x.to(tl.float64)
        sums += x * x
    out = partials + (tl.load(entry + 2) + chunk) * 2
    tl.store(out, lane_total(sums, NB), mask=size > 0)
    tl.store(out + 1, tl.max(largest, axis=1).to(tl.float32, bitcast=True).to(tl.float64), mask=size > 0)


@triton.jit
def measure_total_kernel(table, partials, out):
    entry = table + tl.program_id(0).to(tl.int64) * 5
    chunks, first = tl.cdiv(tl.load(entry + 1), CHUNK_SIZE), tl.load(entry + 2)
    sums, largest = tl.zeros((1, LANES), tl.float64), tl.zeros((1, LANES), tl.int32)
    for at in range(0, chunks, LANES):
        index = at + tl.arange(0, LANES)[None, :]
        partial = partials + (first + index) * 2
        sums += tl.load(partial, mask=index < chunks, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(tl.load(partial + 1, mask=index < chunks, other=0.0).to(tl.float32)))
    at = tl.program_id(0).to(tl.int64) * 2 + tl.arange(0, 1)
    tl.store(out + at, lane_total(sums, 1))
    tl.store(out + at + 1, tl.max(largest, axis=1).to(tl.float32, bitcast=True).to(tl.float64))


def measure_tensors(tensors, limits=None):
    """See gradmill.ops.optim.measure."""
    table, chunks, programs, device = [], 0, 0, tensors[0].device
    tensors = [x.contiguous() for x in tensors]
    limits = torch.tensor([[float("inf"), 1.0]]).expand(len(tensors), 2) if limits is None else limits
    for x in tensors:
        table.append([x.data_ptr(), x.numel(), chunks, programs])
        chunks += triton.cdiv(x.numel(), reference.CHUNK)
        programs += triton.cdiv(triton.cdiv(x.numel(), reference.CHUNK), CHUNKS)
    table = torch.cat([torch.tensor(table), limits.contiguous().view(torch.int64)], dim=1).to(device, non_blocking=True)
    partials, out = (torch.empty(n, 2, dtype=torch.float64, device=device) for n in (chunks, len(tensors)))
    with ready(out):
        if programs:
            measure_kernel[(programs,)](table, len(tensors), partials, CODE=CODES[float_code(tensors[0].dtype)], NB=CHUNKS, num_warps=4, **LAUNCH)
        measure_total_kernel[(len(tensors),)](table, partials, out, num_warps=1, **LAUNCH)
    return out
