"""quant: floats to and from 8 and 4 bits. Bound by memory: x is read once, codes are written once."""
from __future__ import annotations

import torch

import gradmill
from gradmill import functional, ops
from gradmill.formats import Format

from .runner import Bench, Work, baseline, case, compiled, ours, peer

ROWS, COLUMNS = 4096, 1024   # 4096 tokens of width 1024, 16 MB in fp32


def _shape(ctx):
    return ctx.pick((ROWS, COLUMNS), (64, 256))


def _blocks(x, block):
    return x.view(x.shape[0], -1, block)


#: Of INT8 rows, also in scaling. csrc/cpu/quant.cpp counts.
ROWS_WHY = ("reading x alone takes four fifths of the limit's time, and finding scales and codes, 1.8 instructions a value with AVX2 (instructions.json), a thread as long from "
            "the cache (0.45 ms for half of 4096 rows, busy): with two threads on one memory neither hides behind the other")


# --- the same in torch expressions ------------------------------------------------------------------------
def torch_int8(x, dim=1):
    scale = x.abs().amax(dim, keepdim=True) / 127
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def torch_int8_stochastic(x):
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).add_(torch.rand_like(x)).floor_().clamp_(-127, 127).to(torch.int8), scale


def torch_zero_point(x, block, top):
    """Codes of a group with a zero point, in a byte each: (codes, scales, zeros)."""
    g = _blocks(x, block)
    low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    zero = (-low / scale).round_()
    return (g / scale).round_().add_(zero).clamp_(0, top).to(torch.uint8), scale, zero


def torch_pack(codes):
    flat = codes.view(codes.shape[0], -1)
    return flat[:, ::2] | flat[:, 1::2] << 4


def torch_unpack(packed, scale, zero, block):
    codes = torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
    return (_blocks(codes, block).to(torch.float32).sub_(zero)).mul_(scale).view(codes.shape)


def _compiled(expression, *rings):
    """The expression under torch.compile; the inputs are chosen outside of it."""
    def make():
        run = torch.compile(expression, dynamic=False)
        return lambda i: run(*(ring(i) for ring in rings))
    return compiled("torch expression, compiled", make)


# --- cases ------------------------------------------------------------------------------------------------
def _quantize(ctx, title, code, block, expression, peers=(), transpose=False, key=None, why=""):
    rows, columns = _shape(ctx)
    x = ctx.rotate(lambda: ctx.randn(rows, columns))
    out = Format(code, block).nbytes(*((columns, rows) if transpose else (rows, columns)))
    return Bench(f"{title}, {rows}x{columns}", Work(4.0 * rows * columns + out, 4.0 * rows * columns, "copy"), [
        ours(lambda: lambda i: ops.quantize(x(i), code, block, transpose, key)),
        baseline("torch expression", lambda: lambda i: expression(x(i))), _compiled(expression, x),
        *(peer(module, label, lambda m, run=run: lambda i: run(m, x(i))) for module, label, run in peers)], why)


@case("quant")
def quantize_int8(ctx):
    half = ctx.rotate(lambda: ctx.randn(*_shape(ctx), dtype=torch.float16))   # all it takes
    bench = _quantize(ctx, "quantize to INT8, a scale per row", "int8", 0, torch_int8, why=ROWS_WHY)
    bench.entries.append(peer("bitsandbytes", "bitsandbytes int8_vectorwise_quant, of fp16",
                              lambda m: lambda i: m.functional.int8_vectorwise_quant(half(i))))
    return bench


@case("quant")
def quantize_int8_transposed(ctx):
    return _quantize(ctx, "quantize to INT8, transposed, a scale per column", "int8", 0, lambda x: torch_int8(x, 0)[0].t().contiguous(),
                     transpose=True, why="a column's scale must be known before its codes: x is read twice, 1.8 times the bytes counted")


@case("quant")
def quantize_int8_both_ways(ctx):
    rows, columns = _shape(ctx)
    x = ctx.rotate(lambda: ctx.randn(rows, columns))
    return Bench(f"quantize to INT8 by rows and, transposed, by columns, {rows}x{columns}",
                 Work(6.0 * rows * columns + 4.0 * (rows + columns), 8.0 * rows * columns, "copy"), [
        ours(lambda: lambda i: ops.quantize_both(x(i), "int8")),
        baseline("gradmill's two calls", lambda: lambda i: (ops.quantize(x(i), "int8"), ops.quantize(x(i), "int8", 0, True)))],
                 "x is read twice, 1.7 times the bytes counted; glibc gives 8 MB of results back to the system at each call, two calls' 4 MB it keeps: new pages take half the time here")


@case("quant")
def quantize_int8_stochastic(ctx):
    return _quantize(ctx, "quantize to INT8 with stochastic rounding", "int8", 0, torch_int8_stochastic,
                     key=torch.tensor([1, 2], dtype=torch.int64), why="bound by Philox: ten rounds of 64-bit multiplies for four random words, more than half of the instructions")


@case("quant")
def quantize_int4(ctx):
    return _quantize(ctx, "quantize to packed INT4, groups of 256", "uint4", 256, lambda x: torch_pack(torch_zero_point(x, 256, 15)[0]), [
        ("bitsandbytes", "bitsandbytes quantize_4bit (nf4)", lambda m, x: m.functional.quantize_4bit(x, blocksize=256, quant_type="nf4"))],
                     why="held to AVX2: 3.1 instructions a value (instructions.json), which take two threads about half a millisecond, as the bytes do")


@case("quant")
def quantize_state(ctx):
    return _quantize(ctx, "quantize an optimizer state to 8 bits, blocks of 256", "moment8", 256, lambda x: torch_int8(_blocks(x, 256), 2), [
        ("bitsandbytes", "bitsandbytes quantize_blockwise", lambda m, x: m.functional.quantize_blockwise(x, blocksize=256))])


def _dequantize(ctx, title, code, block, make_torch, peers=()):
    rows, columns = _shape(ctx)
    format = Format(code, block)

    def stored():
        return ops.quantize(ctx.randn(rows, columns), code, block)
    mine = ctx.rotate(stored)

    def make():
        return lambda i: ops.dequantize(*mine(i), code, block, columns, torch.float32)
    return Bench(f"{title}, {rows}x{columns}", Work(4.0 * rows * columns + format.nbytes(rows, columns), 2.0 * rows * columns, "copy"), [
        ours(make), baseline("torch expression", lambda: make_torch(mine)),
        *(peer(module, label, lambda m, prepare=prepare: prepare(m, ctx.randn(rows, columns))) for module, label, prepare in peers)])


@case("quant")
def dequantize_int8(ctx):
    def expression(mine):
        return lambda i: mine(i)[0].to(torch.float32).mul_(mine(i)[1])
    return _dequantize(ctx, "dequantize INT8 rows", "int8", 0, expression)


@case("quant")
def dequantize_int4(ctx):
    def expression(mine):
        return lambda i: torch_unpack(mine(i)[0], mine(i)[1][..., None], mine(i)[2][..., None], 256)

    def bnb(m, x):
        codes, state = m.functional.quantize_4bit(x, blocksize=256, quant_type="nf4")
        return lambda i: m.functional.dequantize_4bit(codes, state)
    return _dequantize(ctx, "dequantize packed INT4, groups of 256", "uint4", 256, expression,
                       [("bitsandbytes", "bitsandbytes dequantize_4bit (nf4)", bnb)])


def _hadamard(ctx, title, transpose=False, dtype=torch.float32, why=""):
    rows, columns = _shape(ctx)
    x = ctx.rotate(lambda: ctx.randn(rows, columns, dtype=dtype))
    matrix = ctx.once(lambda: ops.hadamard(torch.eye(16, device=ctx.device), dtype=dtype))   # symmetric, orthogonal
    key = torch.tensor([1, 2], dtype=torch.int64)

    def product(i):
        source = x(i).t().contiguous() if transpose else x(i)
        return (source.view(-1, 16) @ matrix()).view(source.shape)
    size = torch.finfo(dtype).bits / 8
    return Bench(f"{title}, {rows}x{columns}", Work(2 * size * rows * columns, 5.0 * rows * columns, "copy"), [
        ours(lambda: lambda i: ops.hadamard(x(i), 16, transpose, key)), baseline("matmul with a 16x16 matrix", lambda: product)], why)


@case("quant")
def hadamard(ctx):
    return _hadamard(ctx, "random Hadamard transform, blocks of 16")


@case("quant")
def hadamard_bf16(ctx):
    return _hadamard(ctx, "random Hadamard transform of bf16, blocks of 16", dtype=torch.bfloat16,
                     why="bound by instructions, fp32 butterflies and roundings; the matmul, without the random signs, has AVX-512's bf16 products where torch may use them")


@case("quant")
def hadamard_transposed(ctx):
    return _hadamard(ctx, "random Hadamard transform, transposed, blocks of 16", transpose=True,
                     why="a line of each of 4096 rows, pages apart, is read and a kilobyte written to each of 16: page walks, not bytes")


# --- fake quantisation ------------------------------------------------------------------------------------
def torch_fake(w, step, zero, top):
    """EfficientQAT's formula in torch operations, groups in the last dimension; autograd does the rest."""
    def straight(x, y):
        return x + (y - x).detach()
    zero = straight(zero, zero.round().clamp(0, top))
    ratio = w / step
    return ((straight(ratio, ratio.round()) + zero).clamp(0, top) - zero) * step


@case("quant")
def fake_quantize_w4(ctx):
    """Forward and backward: the weight and its gradient are read twice and once, W^ and dW are written."""
    rows, columns = _shape(ctx)
    group = 128
    weight = ctx.rotate(lambda: ctx.randn(rows, columns).requires_grad_())
    grad = ctx.rotate(lambda: ctx.randn(rows, columns))
    parameters = ctx.once(lambda: [p.requires_grad_() for p in functional.fake_quantize_parameters(ctx.randn(rows, columns), 4, group)])

    def step(i, forward):
        inputs = weight(i), *parameters()
        torch.autograd.grad(forward(*inputs), inputs, grad(i))
    return Bench(f"fake-quantise to 4 bits, groups of 128, forward + backward, {rows}x{columns}",
                 Work((20.0 + 24.0 / group) * rows * columns, 50.0 * rows * columns, "copy"), [
        ours(lambda: lambda i: step(i, lambda *inputs: functional.fake_quantize(*inputs, 4, group))),
        baseline("torch expression + autograd", lambda: lambda i: step(i, lambda w, s, z: torch_fake(
            _blocks(w, group), s[..., None], z[..., None], 15).view(rows, columns)))],
                 "W^ and dW are 16 MB each and made at each call: where glibc gave their memory back meanwhile their pages are new, a tenth of the time with 280 of 8,192 new (busy)")


@case("quant")
def train_steps_w2(ctx):
    """EfficientQAT's second phase (E2E-QP): a packed 2-bit layer of which the step sizes train."""
    tokens, n = ctx.pick((512, 2048), (4, 128))
    x, dy, plain = ctx.once(lambda: ctx.randn(tokens, n).requires_grad_()), ctx.once(lambda: ctx.randn(tokens, n)), ctx.once(lambda: torch.nn.Linear(n, n, bias=False).to(ctx.device))

    def run(make):
        layer = make()
        trained = [p for p in layer.parameters() if p.requires_grad]
        return lambda i: torch.autograd.grad(layer(x()), (x(), *trained), dy())
    return Bench(f"E2E-QP, a layer's forward + backward in packed 2 bits, {tokens} tokens, {n}->{n}", Work(16.0 * tokens * n + n * n * (0.25 + 4.0), 6.0 * tokens * n * n, "fp32"), [
        ours(lambda: run(lambda: gradmill.nn.Linear.from_linear(plain(), "w2").train_steps_())), baseline("torch fp32", lambda: run(plain))],
                 "three fp32 products, as torch's, which reach 0.9 of the limit; W's codes are decoded for two of them, and dW is summed to a number a group")
