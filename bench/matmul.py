"""matmul: INT8 matmuls, the linear layer built on them, and products with a packed weight."""
from __future__ import annotations

import torch
import torch.nn.functional as F

import gradmill
from gradmill import functional, ops

from . import peers
from .quant import torch_int8, torch_pack, torch_unpack, torch_zero_point
from .runner import Bench, Work, baseline, case, knowing, nbytes, ours, peer, rival


def _operands(ctx, n):
    """x, w fp32 and their INT8 rows: x (n, n), w (n, n), the product is x w^T."""
    x, w = ctx.randn(n, n), ctx.randn(n, n)
    return x, w, *ops.quantize(x, "int8")[:2], *ops.quantize(w, "int8")[:2]


def _onednn(w8, w_scales, n):
    """oneDNN's u8 x s8 linear, the kernel behind torch's quantised CPU inference: (u8 x, scale) -> fp32."""
    packed = torch.ops.onednn.qlinear_prepack(w8.t(), None)
    scales, zeros = w_scales.flatten(), torch.zeros(n, dtype=torch.int64)

    def run(x_u8, scale):
        return torch.ops.onednn.qlinear_pointwise(x_u8, scale, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return run


def wrong_sums() -> str:
    """How exact each way is on random codes: with AVX2, oneDNN adds pairs of products in 16 bits that saturate."""
    n = 256
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
    exact, one = a.double() @ b.double().t(), torch.ones(n, 1)
    ways = {"gradmill": lambda: ops.matmul_int8(a, b, one, one, None, torch.float32), "torch._int_mm": lambda: torch._int_mm(a, b.t()),
            "oneDNN u8s8": lambda: _onednn(b, one, n)((a.to(torch.int16) + 128).to(torch.uint8), 1.0)}
    return "sums of random codes that come out wrong: " + ", ".join(f"{name} {(run().double() != exact).double().mean():.0%}" for name, run in ways.items())


def _bf16(ctx, n):
    """What one would run instead on a GPU. Not on CPU: without AVX-512 BF16 it takes minutes."""
    def make():
        x, w = (ctx.randn(n, n, dtype=torch.bfloat16) for _ in range(2))
        return lambda i: F.linear(x, w)
    return make


#: csrc/cpu/gemm.h has the blocking.
LARGE = ("oneDNN's product, which torch._int_mm is, is 1.03 to 1.08 times as fast where sums stay in the cache (256 or 512 rows, one thread, busy) and 1.2 times at 2048 cubed: there "
         "k is cut in blocks of 1024 between which 32-bit sums wait in L2, and their scales make them floats")


@case("matmul", goal=("torch", 1.4))
def int8(ctx):
    n = ctx.pick(2048, 128)

    def make_ours():
        _, _, x8, sx, w8, sw = _operands(ctx, n)
        return lambda i: ops.matmul_int8(x8, w8, sx, sw, None, torch.float32)

    def make_torch():
        x, w, *_ = _operands(ctx, n)
        return lambda i: F.linear(x, w)

    def make_int_mm():
        _, _, x8, _, w8, _ = _operands(ctx, n)
        return lambda i: torch._int_mm(x8, w8.t())

    def make_onednn():
        _, _, x8, _, w8, sw = _operands(ctx, n)
        run, x_u8 = _onednn(w8, sw, n), x8.to(torch.int16).add_(128).to(torch.uint8)
        return lambda i: run(x_u8, 0.02)

    def notes():
        return [wrong_sums()] if ctx.device == "cpu" else []
    return Bench(f"INT8 matmul {n} cubed, operands already quantised", Work(2.0 * n * n + 4.0 * n * n, 2.0 * n ** 3, "int8"), [
        ours(make_ours), baseline("torch fp32 matmul", make_torch), rival("torch._int_mm, int32 out", make_int_mm),
        *([rival("torch bf16 matmul", _bf16(ctx, n))] if ctx.device == "cuda" else
          [rival("oneDNN u8s8 linear, one scale for x", make_onednn)])], LARGE + "; with AVX2 both of theirs saturate: wrong sums", notes=notes)


@case("matmul", goal=("torch", 1.9))
def int7(ctx):
    n = ctx.pick(2048, 128)

    def make_ours():
        (x8, sx, _), (w8, sw, _) = (ops.quantize(ctx.randn(n, n), "int7") for _ in range(2))
        return lambda i: ops.matmul_int8(x8, w8, sx, sw, None, torch.float32)

    def make_torch():
        x, w, *_ = _operands(ctx, n)
        return lambda i: F.linear(x, w)
    return Bench(f"INT8 matmul {n} cubed, codes in [-63, 63]", Work(2.0 * n * n + 4.0 * n * n, 2.0 * n ** 3, "int7"), [
        ours(make_ours), baseline("torch fp32 matmul", make_torch)], LARGE)


@case("matmul", goal=("torch", 5.0))
def bf16(ctx):
    n = ctx.pick(1024, 128)
    x, w = (ctx.once(lambda: ctx.randn(n, n, dtype=torch.bfloat16)) for _ in range(2))
    fp32 = ctx.once(lambda: (x().float(), w().float()))

    def make_ours():
        return lambda i: ops.matmul_scaled(x(), None, None, "bf16", 0, w(), None, None, "bf16", 0, n, False, None, torch.bfloat16)
    return Bench(f"bf16 matmul {n} cubed, sums in fp32", Work(6.0 * n * n, 2.0 * n ** 3, "fp32"), [
        ours(make_ours), baseline("torch bf16 matmul", lambda: lambda i: F.linear(x(), w())),
        rival("torch fp32 matmul", lambda: lambda i: F.linear(*fp32()))],
                 "bf16 is widened to fp32 and multiplied at fp32's rate; torch's product has the processor's bf16 instructions, and recipe bf16 takes torch's where it has them")


@case("matmul", goal=("torch", 1.19))
def int8_quantizing(ctx):
    n = ctx.pick(2048, 128)

    def make_ours():
        x, w, *_ = _operands(ctx, n)

        def run(i):
            x8, sx, _ = ops.quantize(x, "int8")
            w8, sw, _ = ops.quantize(w, "int8")
            return ops.matmul_int8(x8, w8, sx, sw, None, torch.float32)
        return run

    def make_torch():
        x, w, *_ = _operands(ctx, n)
        return lambda i: F.linear(x, w)

    def make_int_mm():
        x, w, *_ = _operands(ctx, n)

        def run(i):
            (x8, sx), (w8, sw) = torch_int8(x), torch_int8(w)
            return torch._int_mm(x8, w8.t()).to(torch.float32).mul_(sx).mul_(sw.t())
        return run

    def torchao_dynamic(_):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        x, w, *_ = _operands(ctx, n)
        layer = torch.nn.Linear(n, n, bias=False, device=ctx.device)
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        layer = torch.nn.Sequential(layer)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        return torch.no_grad()(lambda i: layer(x))
    return Bench(f"INT8 matmul {n} cubed, quantising both operands", Work(14.0 * n * n, 2.0 * n ** 3 + 8.0 * n * n, "int8"), [
        ours(make_ours), baseline("torch fp32 matmul", make_torch), rival("torch quantise + _int_mm + scales", make_int_mm),
        *([rival("torch bf16 matmul", _bf16(ctx, n))] if ctx.device == "cuda" else []),
        peer("torchao", "torchao int8 dynamic (w ready)", torchao_dynamic)], LARGE + "; with AVX2 theirs saturates: wrong sums")


def both_ways(forward, *tensors):
    """run(i) of forward and backward: leaves, then the gradient of what forward makes of them."""
    *leaves, dy = tensors

    def run(i):
        for t in leaves:
            t.grad = None
        forward(*leaves).backward(dy)
    return run


LINEAR = "besides three products, X, W and dY each become codes by rows and by columns; small layers also pay torch's autograd at each call"


def _linear(ctx, tokens, inputs, outputs, recipes):
    """Forward + backward of one linear layer: int8 against torch, and ``recipes`` beside them."""
    tokens, inputs, outputs = ctx.pick((tokens, inputs, outputs), (64, 128, 128))

    def tensors(dtype=torch.float32):
        x, w, b = ctx.randn(tokens, inputs, dtype=dtype), ctx.randn(outputs, inputs, dtype=dtype) / 32, ctx.randn(outputs, dtype=dtype)
        return *(t.requires_grad_() for t in (x, w, b)), ctx.randn(tokens, outputs, dtype=dtype)

    def recipe(name):
        def make():
            x, w, b, dy = tensors()
            layer = torch.nn.Linear(inputs, outputs, device=ctx.device)
            layer.weight, layer.bias = torch.nn.Parameter(w.detach()), torch.nn.Parameter(b.detach())
            layer = gradmill.nn.Linear.from_linear(layer, name)

            def run(i):
                layer.zero_grad()
                x.grad = None
                layer(x).backward(dy)
            return run
        return make

    def torchao_training(_):
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_
        x, w, b, dy = tensors()
        layer = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, device=ctx.device))
        quantize_(layer, int8_mixed_precision_training())

        def run(i):
            layer.zero_grad()
            x.grad = None
            layer(x).backward(dy)
        return run
    n, weights = tokens * (inputs + outputs), inputs * outputs
    # Y, dX, dW in int8; x and dy are each read once and quantised along rows and columns, w likewise.
    work = Work(4.0 * (2 * n + 2 * weights) + 2.0 * (2 * n + 2 * weights), 6.0 * tokens * weights, "int8")
    return Bench(f"linear forward + backward, {tokens} tokens, {inputs}->{outputs}", work, [
        ours(recipe("int8"), "gradmill, recipe int8"),
        baseline("torch fp32", lambda: both_ways(F.linear, *tensors())),
        *(rival(f"gradmill, recipe {name}", recipe(name)) for name in recipes),
        *([rival("torch bf16", lambda: both_ways(F.linear, *tensors(torch.bfloat16)))] if ctx.device == "cuda" else []),
        peer("torchao", "torchao int8 mixed precision", torchao_training)],
        LINEAR)


RECIPES = [name for name in gradmill.recipes.RECIPES if name != "int8"]


@case("matmul", goal=("torch", 1.15))
def linear_training(ctx):
    return _linear(ctx, 4096, 1024, 1024, RECIPES)


@case("matmul")
def linear_training_small(ctx):
    return _linear(ctx, 1024, 256, 256, RECIPES)


@case("matmul")
def linear_training_wide(ctx):
    return _linear(ctx, 1024, 1024, 4096, RECIPES)


# --- experts ----------------------------------------------------------------------------------------------
@case("matmul")
def experts_training(ctx):
    """Forward and backward of a mixture's linear layers. The tokens are shared out as routers do: unevenly, and one expert has none."""
    experts, tokens, inputs, outputs = ctx.pick((8, 4096, 512, 1024), (4, 64, 64, 64))
    share = torch.tensor([*range(2, experts + 1), 0], dtype=torch.float64)
    offs = (share.cumsum(0) / share.sum() * tokens).to(torch.int32).to(ctx.device)
    spans = list(zip([0, *offs.tolist()], offs.tolist()))

    def tensors(dtype=torch.float32):
        x, w = ctx.randn(tokens, inputs, dtype=dtype), ctx.randn(experts, outputs, inputs, dtype=dtype) / 32
        return x.requires_grad_(), w.requires_grad_(), ctx.randn(tokens, outputs, dtype=dtype)

    def loop(x, w):
        return torch.cat([F.linear(x[i:j], w[e]) for e, (i, j) in enumerate(spans)])

    def grouped_mm(dtype):
        return lambda: both_ways(lambda x, w: torch._grouped_mm(x, w.mT, offs=offs), *tensors(dtype))

    def layer(recipe):
        return lambda: both_ways(lambda x, w: functional.grouped_linear(x, w, offs, None, recipe), *tensors())
    n, weights = tokens * (inputs + outputs), experts * inputs * outputs
    work = Work(6.0 * (2 * n + 2 * weights), 6.0 * tokens * inputs * outputs, "int8")
    return Bench(f"{experts} experts forward + backward, {tokens} tokens, {inputs}->{outputs}", work, [
        ours(layer("int8"), "gradmill, recipe int8"),
        baseline("torch fp32, a call per expert", lambda: both_ways(loop, *tensors())),
        *(rival(f"gradmill, recipe {name}", layer(name)) for name in ("fp8_row", "fp8_block")),
        rival("torch._grouped_mm, fp32", grouped_mm(torch.float32)),
        *([rival("torch._grouped_mm, bf16", grouped_mm(torch.bfloat16)), rival("torch bf16, a call per expert", lambda: both_ways(loop, *tensors(torch.bfloat16)))]
          if ctx.device == "cuda" else [])],
        "half the width of the linear layer above and eight weights to quantise for as many tokens: codes and scales take twice the share")


# --- packed weights ---------------------------------------------------------------------------------------
GROUP = 128


#: csrc/cpu/matmul.cpp counts.
FEW_ROWS = "bound by instructions: turning codes into floats and adding them takes three to seven for a vector's worth"
SOME_ROWS = "16 rows do not pay for packed panels: dot products on decoded rows, an instruction to load for each fma"


def _weight_only(ctx, batch):
    n = ctx.pick(4096, 256)

    def w():
        return ctx.randn(n, n) / n ** 0.5
    x = ctx.once(lambda: ctx.randn(batch, n))
    packed = ctx.rotate(lambda: ops.quantize(w(), "uint4", GROUP))
    plain = ctx.rotate(w)

    def make_int4pack():
        def prepare():
            codes, scale, zero = torch_zero_point(w(), GROUP, 15)
            # w = (code - 8) * scale + offset
            both = torch.cat((scale, (8 - zero) * scale), -1).transpose(0, 1).contiguous()
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, n).to(torch.int32), 1), both
        ring = ctx.rotate(prepare)
        return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x(), ring(i)[0], GROUP, ring(i)[1])

    def make_unpacked():
        def prepare():
            codes, scale, zero = torch_zero_point(w(), GROUP, 15)
            return torch_pack(codes.view(n, n)), scale, zero
        ring = ctx.rotate(prepare)
        return lambda i: F.linear(x(), torch_unpack(*ring(i), GROUP))

    def bnb(m):
        ring = ctx.rotate(lambda: m.functional.quantize_4bit(w(), blocksize=GROUP, quant_type="nf4"))
        run = torch.no_grad()(lambda i: m.matmul_4bit(x(), ring(i)[0].t(), quant_state=ring(i)[1]))
        return knowing(run, lambda: {"weight bytes": nbytes([ring(0)[0], ring(0)[1].absmax])})
    def layer(make):
        """A peer's layer. One: making its weight takes seconds, so that it may find it in the cache where the others do not."""
        def made(m):
            linear = torch.nn.Linear(n, n, bias=False, device=ctx.device)
            linear.weight.data.copy_(w())
            run = make(m, linear)
            return torch.no_grad()(lambda i: run(x()))
        return made
    bytes = n * n / 2 + n * n / GROUP * 5 + 8.0 * batch * n
    # At batch 16 it is still the codes' bytes that bound it, if the arithmetic keeps up: 16 x 2 operations per half byte.
    entries = [
        ours(lambda: knowing(lambda i: ops.matmul_packed(x(), *packed(i), "uint4", GROUP, n, False, None, torch.float32), lambda: {"weight bytes": nbytes(packed(0))})),
        baseline("torch fp32 weight", lambda: knowing(lambda i: F.linear(x(), plain(i)), lambda: {"weight bytes": nbytes(plain(0))})),
        rival("torch _weight_int4pack_mm_for_cpu", make_int4pack),
        rival("torch unpack + fp32 matmul", make_unpacked),
        peer("bitsandbytes", "bitsandbytes matmul_4bit (nf4)", bnb),
        peer("hqq", "hqq HQQLinear, one weight", layer(peers.hqq_layer), full=True),   # 15 s of searching for its scales
        peer("optimum.quanto", "optimum-quanto QLinear (qint4), one weight", layer(peers.quanto_layer)),
        peer("gemlite", "gemlite GemLiteLinear", lambda m: peers.gemlite_layer(m, n, ctx.device))]
    return Bench(f"packed INT4 weight-only, batch {batch}, {n}x{n}", Work(bytes, 2.0 * batch * n * n, "read" if batch == 1 else "fp32"),
                 [e for e in entries if ctx.device == "cpu" or "for_cpu" not in e.label],
                 FEW_ROWS if batch == 1 else SOME_ROWS)


@case("matmul", goal=("torch", 4.0))
def weight_only_batch_1(ctx):
    return _weight_only(ctx, 1)


@case("matmul", goal=("torch", 1.5))
def weight_only_batch_16(ctx):
    return _weight_only(ctx, 16)
