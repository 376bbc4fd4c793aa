"""The forward and backward of quantised linear layers, convolutions and experts."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradmill.autograd.window import Patches, Window
from gradmill.formats import FORMATS, Format, float_code
from gradmill.ops._registry import forced_backend, in_forwards_backend, native_module
from gradmill.ops.grouped import matmul_grouped, quantize_grouped
from gradmill.ops.linear import linear_int8, linear_int8_backward
from gradmill.ops.matmul import matmul_int8, matmul_packed, matmul_scaled
from gradmill.ops.quant import BOTH_WAYS, block_absmax, dequantize, draw_key, hadamard, quantize, quantize_both, quantize_to
from gradmill.recipes import Matmul, Recipe
from gradmill.reference.grouped import ragged_blocks
from gradmill.reference.philox import stream
from gradmill.reference.quant import power_of_two_up, shared_scales
from gradmill.weight import QuantizedWeight

_EXACT = ("int8", "int7")


def _values(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _matrices(weight, groups: int, by_pixel: bool = False):
    """The weight's values as a matrix (out / groups, in / groups * window) for each group, with ``by_pixel`` (out / groups, window * in / groups)."""
    weight = _values(weight)
    weight = weight.permute(0, 2, 3, 1) if by_pixel else weight
    return [w.reshape(w.shape[0], w.shape[1:].numel()) for w in weight.chunk(groups)]


@dataclass
class Stored:
    """A matrix (rows, columns) in a format; plain floats have no scales."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: Format
    columns: int

    @property
    def tensors(self):
        return self.codes, self.scales, self.zeros

    def rows(self, first: int, last: int) -> "Stored":
        """Some of its rows."""
        zeros = self.zeros if self.zeros is None or self.zeros.dim() < 2 else self.zeros[first:last]
        return Stored(self.codes[first:last], None if self.scales is None else self.scales[first:last], zeros, self.format, self.columns)


def _store(x, format: Format, transpose=False, key=None, stream=0, largest=None) -> Stored:
    """x (a matrix or Patches), or its transpose, as an operand. largest: the magnitude that one scale for all of x comes from,
    instead of x's own."""
    columns = x.shape[0 if transpose else 1]
    if largest is not None:
        scale = shared_scales(largest.view(1, 1), replace(format, rows=1)).expand(x.shape[1 if transpose else 0], 1)
        return Stored(*quantize(x, format.code, 0, transpose, key, stream, scale), format, columns)
    if isinstance(x, Patches) and not format.shared and key is None:
        codes, scales, zeros = x.quantize(format, transpose)
        return Stored(codes, *((scales, zeros) if format.blocked else (None, None)), format, columns)
    x = x.matrix() if isinstance(x, Patches) else x
    if format.blocked:
        return Stored(*quantize_to(x, format, transpose, key, stream), format, columns)
    return Stored((x.t() if transpose else x).to(format.code_dtype).contiguous(), None, None, format, columns)


def _multiply(a: Stored, b: Stored, bias, dtype):
    """a b^T (+ bias)."""
    if a.format.code in _EXACT and b.format.code in _EXACT and not a.format.block and not b.format.block:
        return matmul_int8(a.codes, b.codes, a.scales, b.scales, bias, dtype)
    if a.scales is None and b.scales is None and (a.codes.is_cuda or a.codes.device.type == "cpu" and _torch_is_faster()):
        y = torch.nn.functional.linear(a.codes, b.codes).to(dtype)  # sums in fp32 too, but rounds them to 16 bits
        return y if bias is None else y + bias.to(dtype)
    return matmul_scaled(*a.tensors, a.format.code, a.format.block, *b.tensors, b.format.code, b.format.block, b.columns, False, bias, dtype)


def _torch_is_faster():
    return not torch.compiler.is_compiling() and forced_backend() is None and native_module().cpu_has_bf16()


def _over_tokens(x, format: Format, size: int, key, rounding=None, group: int = 0, largest=None) -> Stored:
    """x^T as an operand of dW, through the random Hadamard transform of that size (the same for both operands) where the recipe has one."""
    if not size:
        return _store(x, format, True, rounding, stream(3 * group + 1, "gradient"), largest)
    x = x.matrix() if isinstance(x, Patches) else x
    return _store(hadamard(x, size, True, key, stream(3 * group + 2, "hadamard"), x.dtype), format, False, rounding, stream(3 * group + 1, "gradient"))


def _both_ways(x, rows: Format, columns: Format, size: int, key, rounding=None, largest=None) -> tuple[Stored, Stored]:
    """x as an operand by rows, and of dW: see _over_tokens. One walk through x where both formats are the same."""
    if rows == columns and rows.code in BOTH_WAYS and not rows.shared and not size:
        codes, scales, turned, turned_scales = quantize_both(x, rows.code, rows.block, rounding, stream(0, "gradient"), stream(1, "gradient"))
        return Stored(codes, scales, None, rows, x.shape[1]), Stored(turned, turned_scales, None, columns, x.shape[0])
    return _store(x, rows, False, rounding, stream(0, "gradient"), largest), _over_tokens(x, columns, size, key, rounding, largest=largest)


def _delayed(history, x):
    """x's largest magnitude, and what its scale comes from: the largest of the steps in ``history``, x's own before there is one."""
    now, before = x.abs().amax().to(torch.float32) if x.numel() else history.new_zeros(()), history.max()
    return now, torch.where(before > 0, before, now)


class QuantizedLinear(torch.autograd.Function):
    """Y = X W^T + b with each of the three matmuls in its recipe's formats.

    X (tokens, in), W (out, in) plain or QuantizedWeight, b (out) or None. A quantised product has both operands quantised
    along the dimension it sums over, so X, W and dY each need two copies: X's and dY's come from one tensor, once by rows
    and once by columns. Saved for dW: the quantised X that dW needs, not X. ``steps`` (out, groups), or None: the scales
    of a packed weight as a trained Parameter; their gradient is the sum of dW (q - z) over each group (Chen et al.,
    "EfficientQAT", E2E-QP).

    With a ``window`` X is an image (n, in, h, w), W (out, in / groups, kh, kw), and the same three products run over the image's
    patches, a row for each output position: each group of channels is a linear layer of its own, dX goes back through
    col2im. A product without formats is torch's own convolution. Kept for dW: the image or its quantised patches, whichever
    is smaller (of a 3x3 window, which sees every pixel 9 times, the image). Patch matrices are worked off in pieces:
    Y and dX by images, dW by channels, wherever no scale spans the pieces, so that no bit depends on their size.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, dtype, steps, window: Window | None = None, history=None):
        y_recipe, dw_recipe, groups = recipe.y, recipe.dw, 1 if window is None else window.groups
        needs_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
        keeps_operand = window is None or window.saved_bytes(recipe, x.shape, x.element_size())[1]
        kept_x, kept_w = [], []
        key = draw_key(x, getattr(weight, "codes", weight)) if recipe.gradient_rounding == "stochastic" or isinstance(dw_recipe, Matmul) and dw_recipe.hadamard else None
        x_over_tokens = magnitudes = largest_x = largest_w = None
        if history is not None:
            (now_x, largest_x), (now_w, largest_w) = _delayed(history[0], x), _delayed(history[1], _values(weight))
            magnitudes = torch.stack((now_x, now_w, largest_w))
        if isinstance(y_recipe, Matmul):
            kept_w = [_store(w, y_recipe.right, largest=largest_w) for w in _matrices(weight, groups)]
            whole = not _by_row(y_recipe.left) or needs_dw and dw_recipe == "forward" and keeps_operand
            parts = []
            for group, w in enumerate(kept_w):
                part_bias = None if bias is None else bias.chunk(groups)[group]
                pieces = []
                for rows in [x] if window is None else window.patches(x, group).split(0, whole):
                    if window is None and needs_dw and isinstance(dw_recipe, Matmul):
                        left, x_over_tokens = _both_ways(x, y_recipe.left, dw_recipe.right, dw_recipe.hadamard, key, None, largest_x)
                    else:
                        left = _store(rows, y_recipe.left, largest=largest_x)
                    kept_x.append(left)
                    pieces.append(_multiply(kept_x[-1], w, part_bias, dtype))
                    if not whole:
                        kept_x.clear()
                parts.append(_joined(pieces, 0))
            y = _joined(parts, 1)
            y = y if window is None else window.image(y, x.shape, x)
        elif window is not None:
            y = torch.nn.functional.conv2d(x.to(dtype), _stepped(weight, steps).to(dtype), None if bias is None else bias.to(dtype), *window[1:])
        elif isinstance(weight, QuantizedWeight):
            y = matmul_packed(x, *_packed(weight, steps), False, bias, dtype)
        else:
            y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        saved_x = ()
        if needs_dw and not keeps_operand:
            format = window.kept_format(recipe, x.shape)
            image = x.detach()
            saved_x = (image,) if format is None else _store(image.reshape(len(x), x.shape[1:].numel()), format).tensors
        elif needs_dw and dw_recipe == "forward":
            saved_x = [t for operand in kept_x for t in operand.tensors]
        elif x_over_tokens is not None:
            saved_x = x_over_tokens.tensors
        elif needs_dw and dw_recipe is not None:
            saved_x = [t for group in range(groups) for t in _over_tokens(x if window is None else window.patches(x, group), dw_recipe.right,
                                                                          dw_recipe.hadamard, key, group=group).tensors]
        elif needs_dw:
            saved_x = (x,)
        saved_w = ()
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[5]:
            saved_w = [t for operand in kept_w for t in operand.tensors] if recipe.dx == "forward" else (weight,)
        ctx.lengths = len(saved_w), len(saved_x)
        ctx.save_for_backward(key, steps, magnitudes, *saved_w, *saved_x)
        ctx.history = history  # not among the saved: other backward passes write into it before this one
        ctx.backend = forced_backend()
        ctx.recipe, ctx.x_dtype, ctx.x_shape, ctx.weight_dtype, ctx.shape = recipe, x.dtype, x.shape, weight.dtype, weight.shape
        ctx.window, ctx.keeps_operand, ctx.last = window, keeps_operand, window is not None and x.is_contiguous(memory_format=torch.channels_last)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        key, steps, magnitudes, *saved = ctx.saved_tensors
        saved_w, saved_x = saved[:ctx.lengths[0]], saved[ctx.lengths[0]:]
        recipe, window, dx, dw, db, dsteps = ctx.recipe, ctx.window, None, None, None, None
        rounding = key if recipe.gradient_rounding == "stochastic" else None
        needs_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
        if window is None:
            dys = [dy]
        elif recipe.dx is not None and ctx.needs_input_grad[0] or recipe.dw is not None and needs_dw:
            here = recipe.exact is not None and dy.is_cpu and not dy.is_contiguous(memory_format=torch.channels_last)
            dys = [(window.points if here else window.rows)(dy, group) for group in range(window.groups)]
        by_rows = over_tokens = largest = largest_w = None  # dY as dX and as dW want it
        if magnitudes is not None:
            now, largest = _delayed(ctx.history[2], dy)
            largest_w = magnitudes[2]
            # Here, not in forward, which may run twice (checkpointing) or without training.
            noted = torch.cat((magnitudes[:2], now[None]))
            ctx.history.copy_(torch.cat((torch.where(noted.isfinite(), noted, 0)[:, None], ctx.history[:, :-1]), 1))
        if window is None and ctx.needs_input_grad[0] and needs_dw and isinstance(recipe.dx, Matmul) and isinstance(recipe.dw, Matmul):
            by_rows, over_tokens = _both_ways(dy, recipe.dx.left, recipe.dw.left, recipe.dw.hadamard, key, rounding, largest)
        if ctx.needs_input_grad[0]:
            if recipe.dx is not None:
                dx = _dx(ctx, dys, saved_w, rounding, by_rows, largest, largest_w)
            elif window is not None:
                dx = torch.nn.grad.conv2d_input(ctx.x_shape, _stepped(saved_w[0], steps).to(dy.dtype), dy, *window[1:]).to(ctx.x_dtype)
            elif isinstance(saved_w[0], QuantizedWeight):
                dx = matmul_packed(dy, *_packed(saved_w[0], steps), True, None, ctx.x_dtype)
            else:
                dx = (dy @ saved_w[0].to(dy.dtype)).to(ctx.x_dtype)
        if needs_dw:
            if recipe.dw is not None:
                dw = _dw(ctx, dys, saved_x, key, rounding, over_tokens, largest).view(ctx.shape)
            elif window is not None:
                dw = torch.nn.grad.conv2d_weight(saved_x[0].to(dy.dtype), ctx.shape, dy, *window[1:]).to(ctx.weight_dtype)
            else:
                dw = (dy.t() @ saved_x[0].to(dy.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[5]:
            dsteps = _step_gradient(dw, saved_w[0])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0 if window is None else (0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw if ctx.needs_input_grad[1] else None, db, None, None, dsteps, None, None


class ExactLinear(torch.autograd.Function):
    """QuantizedLinear for a plain weight and a recipe that is ``exact``: the same bits from one op forward and one backward.

    One thread's CPU time in us, a Zen 4 in use by others, tokens x in -> out, forward + backward (forward alone), before, now, torch's fp32:
    1x16->16 295 106 39 (72 27 3), 64x64->64 329 141 57, 64x128->128 360 196 123, 256x64->256 576 315 335. Of the 106, torch's
    autograd.Function takes 35 and native code 17. W's codes are not kept from one forward to the next: ``weight.data.copy_(...)``, as
    many an optimizer writes, leaves the weight's version as it was, and a stale product would go unnoticed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, dtype):
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        key = draw_key(x, weight) if recipe.gradient_rounding == "stochastic" else None
        y, codes, scales = linear_int8(x, weight, bias, recipe.exact, needs_dw, dtype)
        ctx.save_for_backward(key, weight if needs_dx else None, *((codes, scales) if needs_dw else (None, None)))
        ctx.code, ctx.dtypes = recipe.exact, (x.dtype if needs_dx else None, weight.dtype if needs_dw else None, bias.dtype if needs_db else None)
        ctx.backend = forced_backend()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        (key, weight, codes, scales), (dx, dw, db) = ctx.saved_tensors, ctx.dtypes
        if dx is not None or dw is not None:
            products = linear_int8_backward(dy, weight, codes, scales, ctx.code, key, _BY_ROWS, _OVER_TOKENS, dx, dw)
            dx, dw = (None if dtype is None else product for dtype, product in zip((dx, dw), products))
        return dx, dw, None if db is None else dy.sum(0, dtype=torch.float32).to(db), None, None


_BY_ROWS, _OVER_TOKENS = stream(0, "gradient"), stream(1, "gradient")


def _dx(ctx, dys, saved_w, rounding, by_rows=None, largest=None, largest_w=None):
    """dX = dY W in the recipe's formats. by_rows: dY as the operand, if there already."""
    recipe, window = ctx.recipe, ctx.window
    # The weight's columns may be in any order where each has a scale of its own: (window, channels) adds up runs of channels.
    by_pixel = window is not None and recipe.dx != "forward" and dys[0].device.type == "cpu" and _by_row(recipe.dx.right)
    if recipe.dx == "forward":
        format, columns = recipe.y.right, ctx.shape[1:].numel()
        weights = [Stored(*saved_w[i:i + 3], format, columns) for i in range(0, len(saved_w), 3)]
    else:
        weights = [_store(w, recipe.dx.right, transpose=True, largest=largest_w) for w in _matrices(saved_w[0], len(dys), by_pixel)]
    if window is not None:
        dx = torch.empty(ctx.x_shape, dtype=ctx.x_dtype, device=dys[0].device, memory_format=torch.channels_last if ctx.last else torch.contiguous_format)
    for group, (dy, w) in enumerate(zip(dys, weights)):
        left = dy if recipe.dx == "forward" else by_rows or _store(dy, recipe.dx.left, False, rounding, stream(3 * group, "gradient"), largest)

        def product(first, last, dtype):
            if recipe.dx == "forward":
                return matmul_packed(left[first:last], *w.tensors, w.format.code, w.format.block, w.columns, True, None, dtype)
            return _multiply(left.rows(first, last), w, None, dtype)

        if window is None:
            return product(0, len(dy), ctx.x_dtype)
        first, pieces = 0, window.patches(dx, group).split(0, whole=False)
        for piece in pieces:
            last = first + piece.shape[0]
            part = piece.fold(product(first, last, torch.float32), ctx.x_dtype, by_pixel)
            if len(dys) == len(pieces) == 1:
                return part
            piece.image.copy_(part)
            first = last
    return dx


def _dw(ctx, dys, saved_x, key, rounding, over_tokens=None, largest=None):
    """dW = dY^T X in the recipe's formats: (out, in) or, of a convolution, ``weight.flatten(1)``'s."""
    recipe, window, parts = ctx.recipe, ctx.window, []
    forward, columns = recipe.dw == "forward", ctx.shape[1:].numel()
    if not ctx.keeps_operand:
        format = window.kept_format(recipe, ctx.x_shape)
        image = saved_x[0] if format is None or not format.blocked else dequantize(*saved_x, format.code, format.block, ctx.x_shape[1:].numel(), ctx.x_dtype)
        image = image.view(ctx.x_shape)
    for group, dy in enumerate(dys):
        kept = saved_x[3 * group:3 * group + 3]
        if forward:
            format, first, total = recipe.y.left, 0, None
            operands = [Stored(*kept, format, columns)] if ctx.keeps_operand else (
                _store(piece, format) for piece in window.patches(image, group).split(0, not _by_row(format)))
            for operand in operands:
                last = first + len(operand.codes)
                part = matmul_packed(dy[first:last].t(), *operand.tensors, format.code, format.block, columns, True, None, torch.float32)
                first, total = last, part if total is None else total.add_(part)
            parts.append(total.to(ctx.weight_dtype))
        else:
            format, size = recipe.dw.right, recipe.dw.hadamard
            left = over_tokens or _over_tokens(dy, recipe.dw.left, size, key, rounding, group, largest)
            operands = [Stored(*kept, format, left.columns)] if ctx.keeps_operand else (
                _over_tokens(piece, format, size, key, group=group) for piece in window.patches(image, group).split(1, not _by_row(format)))
            parts.append(_joined([_multiply(left, operand, None, ctx.weight_dtype) for operand in operands], 1))
    return _joined(parts, 0)


def _by_row(format: Format) -> bool:
    """Whether each row of an operand is quantised for itself, so that the operand can be made in pieces."""
    return not format.blocked or format.rows == 1 and format.scale != "e4m3"


def _joined(parts, dim: int):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _stepped(weight, steps):
    """The values of a weight whose steps, if given, replace its scales."""
    if steps is None:
        return _values(weight)
    return dequantize(weight.codes, steps.detach(), weight.zeros, weight.format.code, weight.format.block, weight.shape[1:].numel(), weight.dtype).view(weight.shape)


def _packed(weight: QuantizedWeight, steps):
    """matmul_packed's arguments for a stored weight."""
    scales = weight.scales if steps is None else steps.detach()
    return weight.codes, scales, weight.zeros, weight.format.code, weight.format.block, weight.shape[1]


def _step_gradient(dw, weight: QuantizedWeight):
    """The sum of dW (q - z) over each group: (out, groups) fp32."""
    format, columns = weight.format, weight.shape[1:].numel()
    units = dequantize(weight.codes, torch.ones_like(weight.scales), weight.zeros, format.code, format.block, columns, torch.float32)
    block = format.block or columns
    product = torch.nn.functional.pad(units.mul_(dw.reshape(units.shape)), (0, -columns % block))
    return product.view(dw.shape[0], -1, block).sum(-1)


# --- a linear layer per expert ----------------------------------------------------------------------------
def _store_experts(weight, format: Format, transpose=False) -> Stored:
    """weight (experts, out, in), or each expert's transpose, as an operand, in one call: scales are each expert's own."""
    operand = weight.mT if transpose else weight
    experts, rows, columns = operand.shape
    if not format.blocked:
        return Stored(operand.to(format.code_dtype).contiguous(), None, None, format, columns)
    blocks, scales = format.blocks(columns), None
    if format.shared:
        group = format.rows or max(rows, 1)
        absmax = torch.nn.functional.pad(block_absmax(weight, format, transpose), (0, 0, 0, -rows % group))  # no group reaches into the next expert
        scales = shared_scales(absmax.flatten(0, 1), replace(format, rows=group)).view(experts, -1, blocks)[:, :rows]
    if not transpose:
        codes, scales, _ = quantize(weight.flatten(0, 1), format.code, format.block, False, None, 0, None if scales is None else scales.flatten(0, 1))
        return Stored(codes.view(weight.shape), scales.view(experts, rows, blocks), None, format, columns)
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=weight.device) * columns  # every expert has as many "tokens" as outputs
    if scales is not None:  # there is room for one block more of each
        room = ragged_blocks(format, experts * columns, experts)
        scales = torch.nn.functional.pad(scales.flatten(), (0, rows * (room - experts * blocks))).view(rows, room)
    codes, scales = quantize_grouped(weight.flatten(0, 1), offs, format.code, format.block, None, 0, scales)
    return Stored(codes.view(operand.shape), scales.flatten()[:experts * rows * blocks].view(experts, rows, blocks), None, format, columns)


def _expert_scales(x, offs, format: Format):
    """The scale of every expert, (experts, 1), for formats that have one for all of a matrix; and each token's expert (the number of
    experts for tokens of nobody)."""
    expert = torch.searchsorted(offs, torch.arange(x.shape[0], dtype=torch.int32, device=x.device), right=True)
    largest = x.abs().amax(1).to(torch.float32) if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float32)
    amax = largest.new_zeros(offs.shape[0] + 1).scatter_reduce(0, expert, largest, "amax")
    return shared_scales(amax[:, None], replace(format, rows=1)), expert


def _store_tokens(x, format: Format, offs, key=None) -> Stored:
    """x (tokens, columns) as an operand by rows; a scale shared by a matrix is shared by an expert's tokens."""
    if format.blocked and format.rows == 0:
        scales, expert = _expert_scales(x, offs, format)
        codes, scales, _ = quantize(x, format.code, format.block, False, key, stream(0, "gradient"), scales[expert])
        return Stored(codes, scales, None, format, x.shape[1])
    return _store(x, format, False, key, stream(0, "gradient"))


def _over_expert_tokens(x, format: Format, offs, key=None) -> Stored:
    """x (tokens, columns) as an operand of dW: quantised, each expert's tokens transposed; plain floats stay as they are."""
    if not format.blocked:
        return Stored(x.to(format.code_dtype).contiguous(), None, None, format, x.shape[1])
    scales = None
    if format.rows == 0:
        scales = _expert_scales(x, offs, format)[0][:-1].expand(-1, x.shape[1]).reshape(x.shape[1], -1).contiguous()
    elif format.shared:
        scales = power_of_two_up(quantize_grouped(x, offs, format.code, format.block)[1])
    codes, scales = quantize_grouped(x, offs, format.code, format.block, key, stream(1, "gradient"), scales)
    return Stored(codes, scales, None, format, x.shape[1])


def _multiply_grouped(a: Stored, b: Stored, bias, offs, dtype):
    return matmul_grouped(a.codes, a.scales, a.format.code, a.format.block, b.codes, b.scales, b.format.code, b.format.block, offs, bias, dtype)


class QuantizedGroupedLinear(torch.autograd.Function):
    """QuantizedLinear with a weight per expert: Y[tokens of e] = X[tokens of e] W[e]^T + b[e].

    X (tokens, in) sorted by expert, W (experts, out, in), b (experts, out) or None, offs int32 (experts): where each expert's
    tokens end. Every expert has the scales that a layer of its own would have.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, offs, recipe: Recipe, dtype):
        plain = Matmul(FORMATS[float_code(dtype)], FORMATS[float_code(dtype)])
        recipe = replace(recipe, y=recipe.y or plain, dx=recipe.dx or plain, dw=recipe.dw or plain)
        y = _multiply_grouped(_store_tokens(x, recipe.y.left, offs), _store_experts(weight, recipe.y.right), bias, offs, dtype)
        key = draw_key(x, weight) if recipe.gradient_rounding == "stochastic" else None
        saved_x = _over_expert_tokens(x, recipe.dw.right, offs).tensors[:2] if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(key, offs, weight if ctx.needs_input_grad[0] else None, *saved_x)
        ctx.backend = forced_backend()
        ctx.recipe, ctx.x_dtype, ctx.weight_dtype, ctx.columns = recipe, x.dtype, weight.dtype, x.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        key, offs, weight, *saved_x = ctx.saved_tensors
        recipe, dx, dw, db = ctx.recipe, None, None, None
        if ctx.needs_input_grad[0]:
            right = _store_experts(weight, recipe.dx.right, transpose=True)
            dx = _multiply_grouped(_store_tokens(dy, recipe.dx.left, offs, key), right, None, offs, ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            left = _over_expert_tokens(dy, recipe.dw.left, offs, key)
            dw = _multiply_grouped(left, Stored(*saved_x, None, recipe.dw.right, ctx.columns), None, offs, ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            expert = torch.searchsorted(offs, torch.arange(dy.shape[0], dtype=torch.int32, device=dy.device), right=True)
            db = dy.new_zeros((offs.shape[0] + 1, dy.shape[1]), dtype=torch.float32).index_add_(0, expert, dy.to(torch.float32))[:-1].to(ctx.bias_dtype)
        return dx, dw, db, None, None, None
