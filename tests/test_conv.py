"""Convolutions in every recipe: against their definition, against the linear layer over the patches, and as a drop-in."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradmill
from gradmill import QuantizedWeight, functional, ops
from gradmill.autograd import window as windows
from gradmill.nn import Conv2d
from gradmill.ops import binary as binary_ops, conv as conv_ops
from gradmill.recipes import RECIPES, Recipe
from gradmill.reference.conv import by_pixel, output_size, patches as reference_patches
from gradmill.reference.quant import unpack_bits
from gradmill.weight import nbytes

from .conftest import BLOCKED, FLOATS, LEVELS, SPECIAL, assert_native_is_reference, assert_same_bits, fit, isa, reference, threads, wild
from .test_recipes import DETERMINISTIC as DETERMINISTIC_LINEAR, FROZEN, NAMES as LINEAR, QAT, close, expected

NAMES, DETERMINISTIC = ([n for n in names if not RECIPES[n].history] for names in (LINEAR, DETERMINISTIC_LINEAR))
MADE = [*QAT, "one_bit_fqt"]  # recipes with Parameters made from the weight

NONE = Recipe("none")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["int8", "fp8_tensor", "int4", "bf16", "w4", "qat_w4", "int8_weights", "one_bit_fqt"])
def test_the_output_may_be_changed_in_place(name, compiled):
    """As ReLU(inplace=True) right behind a convolution does: torch refuses that of a custom Function's output that is a view."""
    for shape, out, kernel, layout in [((2, 5, 6, 4), 3, 3, torch.contiguous_format), ((2, 5, 6, 4), 3, 1, torch.channels_last), ((3, 8, 1, 1), 4, 1, torch.contiguous_format),
                                       ((2, 4, 5, 5), 1, 3, torch.contiguous_format), ((0, 4, 5, 5), 2, 3, torch.contiguous_format), ((4, 5, 5), 2, 3, None)]:
        layer = Conv2d(shape[-3], out, kernel, recipe=name)
        x = torch.randn(shape) if layout is None else torch.randn(shape).contiguous(memory_format=layout)
        results = []
        for change in (lambda y: y.mul(2).relu(), lambda y: y.mul_(2).relu_()):
            torch.manual_seed(0)
            layer.zero_grad()
            x = x.detach().requires_grad_()
            run = lambda x: change(layer(x))  # noqa: E731
            if compiled:
                torch._dynamo.reset()
                run = torch.compile(run, fullgraph=True, backend="aot_eager")
            y = run(x)
            y.sum().backward()
            results.append((y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
        for want, got in zip(*results):
            assert torch.equal(got, want)
        if compiled:
            break


def test_delayed_scaling_is_refused():
    with pytest.raises(ValueError, match="recipe is fp8_delayed"):
        Conv2d(3, 4, 3, recipe="fp8_delayed")
    with pytest.raises(ValueError, match="recipe is fp8_delayed"):
        functional.conv2d(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), recipe="fp8_delayed")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4))
    report = gradmill.convert(model, "fp8_delayed")
    assert report.skipped == [("0", "recipe fp8_delayed's delayed scaling is for linear layers")] and isinstance(model[1], gradmill.nn.Linear)


#: n, in, height, width, out, kernel, options
SHAPES = [
    (2, 5, 9, 7, 6, (3, 3), dict(padding=1)),
    (3, 16, 6, 5, 4, (1, 1), dict()),
    (2, 6, 11, 8, 7, (5, 2), dict(stride=2, padding=(2, 1))),
    (1, 4, 12, 13, 6, (3, 3), dict(dilation=2, padding=2, groups=2)),
    (2, 6, 8, 8, 12, (3, 3), dict(groups=6, padding=1, stride=(2, 1))),
    (1, 1, 3, 3, 1, (3, 3), dict()),
    (2, 33, 5, 5, 9, (1, 1), dict(stride=2)),
    (2, 3, 7, 6, 5, (4, 2), dict(padding="same", dilation=(1, 2))),
    (2, 3, 9, 9, 4, (2, 2), dict(stride=3, padding="valid")),
]
IDS = [f"{s[5][0]}x{s[5][1]}-" + ",".join(f"{k}={v}" for k, v in s[6].items()) for s in SHAPES]


def made(shape, name, bias=True):
    """A layer, torch's layer with the same weight, an input and an output gradient."""
    n, channels, height, width, out, kernel, options = shape
    plain = nn.Conv2d(channels, out, kernel, bias=bias, **options)
    x = torch.randn(n, channels, height, width)
    return Conv2d.from_conv2d(copy.deepcopy(plain), name), plain, x, torch.randn_like(plain(x))


def run(layer, x, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def padded(plain, x):
    """The input with what torch pads at the bottom and right for "same", and the padding left."""
    if plain.padding == "valid":
        return x, (0, 0)
    if plain.padding == "same":
        left, right, top, bottom = plain._reversed_padding_repeated_twice
        return F.pad(x, (left, right, top, bottom)), (0, 0)
    return x, plain.padding


def by_definition(name, plain, x, dy):
    """Y, dX and dW in fp64, each with a bound of its sums' magnitudes: torch's unfold, then test_recipes' products, group by group."""
    recipe, groups = RECIPES[name], plain.groups
    wide, padding = padded(plain, x)
    geometry = dict(kernel_size=plain.kernel_size, stride=plain.stride, padding=padding, dilation=plain.dilation)
    ys, dxs, dws, sizes = [], [], [], []
    for image, w, d in zip(wide.chunk(groups, 1), plain.weight.detach().chunk(groups), dy.chunk(groups, 1)):
        patches = F.unfold(image, **geometry).transpose(1, 2)
        n, tokens, columns = patches.shape
        d = d.flatten(2).transpose(1, 2).reshape(n * tokens, -1)
        (y, size_y), (dx, size_x), (dw, size_w) = expected(recipe, patches.reshape(n * tokens, columns), w.flatten(1), d)
        ys.append(y.view(n, tokens, -1).transpose(1, 2).reshape(n, -1, *dy.shape[2:]))
        dxs.append(F.fold(dx.view(n, tokens, columns).transpose(1, 2), wide.shape[2:], **geometry))
        dws.append(dw.view_as(w))
        sizes.append((size_y, size_x * columns / image.shape[1], size_w))
    sizes = [max(s) for s in zip(*sizes)]
    dx = torch.cat(dxs, 1)
    if plain.padding == "same":
        left, _, top, _ = plain._reversed_padding_repeated_twice
        dx = dx[:, :, top:top + x.shape[2], left:left + x.shape[3]]
    return (torch.cat(ys, 1), sizes[0]), (dx, sizes[1]), (torch.cat(dws), sizes[2])


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n not in QAT])
def test_the_three_products_are_the_definition(name, shape):
    layer, plain, x, dy = made(shape, name, bias=False)
    y, dx, dw = run(layer, x, dy)
    want_y, want_dx, want_dw = by_definition(name, plain, x, dy)
    bits = 8 if name == "bf16" else 17  # torch's bf16 product rounds its sums to bf16
    close(y, *want_y, bits)
    close(dx, *want_dx, bits)
    if RECIPES[name].frozen:
        assert dw is None
    else:
        close(dw, *want_dw, bits)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("name", QAT)
def test_qat_is_torch_convolving_with_the_fake_quantised_weight(name, shape):
    layer, plain, x, dy = made(shape, name)
    group = layer.weight.detach().flatten(1), layer.weight_steps.detach(), layer.weight_zeros.detach(), *RECIPES[name].fake
    with torch.no_grad():
        plain.weight.copy_(functional.fake_quantize(*group).view_as(plain.weight))
    got, want = run(layer, x, dy), run(plain, x, dy)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-5, atol=1e-4)
    dw, dsteps, dzeros = ops.fake_quantize_backward(want[2].flatten(1), *group)
    torch.testing.assert_close((got[2], layer.weight_steps.grad, layer.weight_zeros.grad), (dw.view_as(got[2]), dsteps, dzeros), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_linear_layer_over_the_patches(name):
    """The same bits, random ones included, wherever a recipe gives a product formats."""
    layer, plain, x, dy = made((2, 5, 9, 7, 6, (3, 3), dict(padding=1)), name)
    linear = gradmill.nn.Linear(45, 6)
    with torch.no_grad():
        linear.weight.copy_(plain.weight.flatten(1)), linear.bias.copy_(plain.bias)
    linear = gradmill.nn.Linear.from_linear(linear.dequantize_(), name)
    torch.manual_seed(5)
    y, dx, dw = run(layer, x, dy)
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 45)
    torch.manual_seed(5)
    want_y, want_dx, want_dw = run(linear, patches, dy.permute(0, 2, 3, 1).reshape(-1, 6))
    want_dx = F.fold(want_dx.view(2, -1, 45).transpose(1, 2), (9, 7), 3, padding=1)
    want_y = want_y.view(2, 9, 7, 6).permute(0, 3, 1, 2)
    if RECIPES[name].y is not None:
        assert torch.equal(y, want_y)
    torch.testing.assert_close((y, dx), (want_y, want_dx), rtol=1e-5, atol=1e-4)
    if dw is not None:
        torch.testing.assert_close(dw.flatten(1), want_dw, rtol=1e-5, atol=1e-4)
        if RECIPES[name].dw not in (None, "forward"):
            assert torch.equal(dw.flatten(1), want_dw)
    assert torch.equal(layer.bias.grad, linear.bias.grad) or torch.allclose(layer.bias.grad, linear.bias.grad, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_a_recipe_without_formats_is_torch(shape):
    layer, plain, x, dy = made(shape, NONE)
    assert_same_bits(run(layer, x, dy)[0], run(plain, x, dy)[0])
    torch.testing.assert_close(run(layer, x, dy), run(plain, x, dy), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_integers_that_fit_are_exact():
    """Values whose scales come out as 1: quantised and exact arithmetic agree, gradients included."""
    x, w = torch.randint(-127, 128, (2, 3, 6, 6)).float(), torch.randint(-127, 128, (4, 3, 1, 1)).float()
    x[:, 0], x[0, :, 0, 0], w[:, 0], w[0] = 127, 127, 127, 127
    dy = torch.randint(-127, 128, (2, 4, 6, 6)).float()
    dy[:, 0], dy[0, :, 0, 0] = 127, 127
    leaves = [t.clone().requires_grad_() for t in (x, w)], [t.clone().requires_grad_() for t in (x, w)]
    results = []
    for function, (a, b) in zip((functional.conv2d, F.conv2d), leaves):
        y = function(a, b)
        y.backward(dy)
        results.append((y.detach(), a.grad, b.grad))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_of_pieces_changes_no_bit(name, monkeypatch):
    shape = (3, 4, 9, 7, 6, (3, 3), dict(padding=1, groups=2))
    layer, _, x, dy = made(shape, name)
    torch.manual_seed(1)
    whole = run(layer, x, dy)
    monkeypatch.setattr(windows, "CHUNK", 200)
    monkeypatch.setattr(windows, "IN_CACHE", 200)
    torch.manual_seed(1)
    pieces = run(layer, x, dy)
    if RECIPES[name].dw == "forward":  # adds floats up piece by piece
        torch.testing.assert_close(pieces[2], whole[2])
        pieces, whole = pieces[:2], whole[:2]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(pieces, whole))


@pytest.mark.parametrize("kernel, stride, padding, better", [(3, 1, 1, ("bf16", "fp8_tensor")), (1, 1, 0, ("bf16", "fp8_tensor", "int8", "fp8_row", "fp4")), (3, 2, 0, ("bf16",))])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in QAT])
def test_what_is_kept_is_counted_exactly_and_never_more_than_torch_keeps(name, kernel, stride, padding, better):
    layer = Conv2d(128, 4, kernel, stride, padding, bias=False, recipe=name)
    side = 31 * stride + kernel - 2 * padding
    x, seen = torch.randn(1, 128, side, side), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(x)  # x needs no gradient: only what dW needs is kept
    kept = sum(nbytes(t) for t in seen if t.dtype not in (torch.int64, torch.float64)  # random keys and draws
               and not any(t.numel() == p.numel() for p in layer.parameters()))
    assert layer.kept_bytes() == (x.nbytes, kept) and kept <= x.nbytes
    if name in better:
        assert kept < 0.6 * x.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_kept_images_and_kept_patches_give_the_same_gradient(name, monkeypatch):
    layer, _, x, dy = made(SHAPES[0], name)
    results = []
    for patches in (False, True):
        monkeypatch.setattr(windows.Window, "saved_bytes", lambda *a: (0, patches and RECIPES[name].dw is not None))
        torch.manual_seed(2)
        results.append(run(layer, x, dy))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5) if results[0][2] is not None else None


# --- the kernels ------------------------------------------------------------------------------------------
GEOMETRIES = [((3, 3), (1, 1), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0), (1, 1)), ((5, 2), (2, 3), (2, 0), (1, 2)), ((2, 3), (1, 2), (0, 3), (3, 1)),
              ((1, 4), (3, 1), (1, 2), (1, 1))]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("code", [*BLOCKED, "sign", "fp32", "bf16", "fp16"])
def test_quantised_patches_have_the_references_bits(code, geometry):
    for n, c, h, w in ((2, 3, 9, 7), (1, 17, 8, 40), (0, 3, 9, 9), (3, 0, 9, 9), (1, 1, 7, 7)):
        x = torch.randn(n, c, h, w)
        if x.numel():
            x.view(-1)[torch.randint(x.numel(), (len(SPECIAL) // 2,))] = torch.tensor(SPECIAL)[torch.randperm(len(SPECIAL))[:len(SPECIAL) // 2]]
        if code in ("square8",):
            x = x.abs()
        dtype = FLOATS[torch.randint(3, ()).item()]
        for image in (x.to(dtype), x.to(dtype).to(memory_format=torch.channels_last), torch.randn(n, c, 2 * h, w + 3)[:, :, ::2, 2:-1]):
            block = fit(code, torch.randint(1, 40, ()).item()) if code in BLOCKED else 0
            for b in {block, 0} if code != "int4_outlier" else {block}:
                for transpose in (False, True):
                    assert_native_is_reference(ops.quantize_patches, image, *geometry, code, b, transpose, what=f"{tuple(image.shape)} {b} {transpose}")


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_folded_patches_have_the_references_bits(geometry):
    for n, c, h, w in ((2, 3, 9, 7), (1, 17, 8, 40), (0, 3, 9, 9), (3, 0, 9, 9), (1, 1, 7, 7), (2, 33, 17, 16)):
        oh, ow = output_size(h, w, *geometry)
        d = wild(n * oh * ow, c * geometry[0][0] * geometry[0][1])
        for dtype in FLOATS:
            for count in (1, 2):
                with threads(count):
                    assert_native_is_reference(ops.fold_patches, d, n, c, h, w, *geometry, dtype)
        if n and c:
            kernel, stride, padding, dilation = geometry
            want = F.fold(d.double().view(n, oh * ow, -1).transpose(1, 2), (h, w), kernel, dilation, padding, stride)
            size = F.fold(d.double().abs().view(n, oh * ow, -1).transpose(1, 2), (h, w), kernel, dilation, padding, stride)
            got = ops.fold_patches(d, n, c, h, w, *geometry, torch.float32).double()
            assert ((got - want).abs() <= size * 2.0 ** -21).all()


IMAGES = ((2, 3, 9, 7), (1, 17, 8, 40), (0, 3, 9, 9), (3, 0, 9, 9), (1, 1, 7, 7), (2, 64, 8, 8), (2, 40, 7, 11))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_images_signs_and_their_patches(geometry):
    for n, c, h, w in IMAGES:
        x = torch.randn(n, c, h, w) * 1.2
        special = x.clone()
        if x.numel():
            special.view(-1)[torch.randint(x.numel(), (len(SPECIAL) // 2,))] = torch.tensor(SPECIAL)[torch.randperm(len(SPECIAL))[:len(SPECIAL) // 2]]
        for image in (x, special, special.to(memory_format=torch.channels_last), x.bfloat16(), torch.randn(n, c, 2 * h, w + 3)[:, :, ::2, 2:-1]):
            for count in (1, 2):
                with threads(count):
                    signs, outside, rows, columns = assert_native_is_reference(ops.pack_image, image, *geometry, what=str((n, c, h, w)))
            dirty = signs.clone()
            dirty[:, -1:] |= 128 * (c % 8 != 0)  # a bit that is not used
            patches = assert_native_is_reference(ops.patch_bits, dirty, n, c, h, w, *geometry)
            assert_same_bits(assert_native_is_reference(ops.transpose_bits, patches, c * geometry[0][0] * geometry[0][1]),
                             reference(ops.pack_signs, by_pixel(reference_patches(image.float(), *geometry), c), True)[0])
            by_rows, by_columns = (reference(ops.pack_signs, by_pixel(reference_patches(image, *geometry), c), transpose) for transpose in (False, True))
            assert_same_bits((patches, rows, columns), (by_rows[0], by_rows[1], by_columns[1]), "the patches' own signs")
            assert_same_bits(outside, reference(ops.pack_signs, (1 - image.float().abs()).permute(0, 2, 3, 1).reshape(n * h * w, c))[0])
            for module in (conv_ops._pack_rows, lambda x, *g: (conv_ops._patch_bytes(signs, *x.shape, *g), binary_ops._transposed(patches, columns.shape[0]))):
                got = module(image, *geometry)  # what CUDA and Triton are made of
                assert_same_bits(got, (signs, outside, rows, columns) if len(got) == 4 else (patches, ops.transpose_bits(patches, columns.shape[0])))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_few_patches_gradients_fold_as_all_with_zeros(geometry):
    kernel = geometry[0]
    for n, c, h, w in IMAGES:
        (oh, ow), columns = output_size(h, w, *geometry), c * kernel[0] * kernel[1]
        outside = torch.randint(0, 256, (n * h * w, -(-c // 8)), dtype=torch.uint8)
        inside = 1 - unpack_bits(outside, 1, c, False).view(n, h, w, c).permute(0, 3, 1, 2)
        for count in {None, 0, 1, n * oh * ow // 4}:
            kept = None if count is None else torch.randperm(n * oh * ow)[:count].sort().values
            d = wild(n * oh * ow if kept is None else len(kept), columns)
            if d.numel():
                d[0, 0] = torch.nan
            full = d if kept is None else torch.zeros(n * oh * ow, columns).index_copy_(0, kept, d)
            want = ops.fold_patches(full.view(len(full), kernel[0] * kernel[1], c).transpose(1, 2).reshape(full.shape), n, c, h, w, *geometry, torch.float32) * inside
            for last, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16), (True, torch.float16)):
                for threaded in (1, 2):
                    with threads(threaded):
                        got = assert_native_is_reference(ops.fold_kept, d, kept, outside, n, c, h, w, *geometry, dtype, last)
                assert_same_bits(got, want.to(dtype))
                assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        bare = assert_native_is_reference(ops.fold_kept, full, None, None, n, c, h, w, *geometry, torch.float32, False)
        assert_same_bits(bare * inside, want)


@pytest.mark.parametrize("width", [*range(1, 19), 31, 33])
def test_int8_patches_of_every_width(width):
    """Positions that lie in one, several and many runs of memory, columns that fill lanes and do not."""
    for channels, height, kernel, stride, padding, dilation in ((3, 5, (3, 3), (1, 1), (1, 1), (1, 1)), (17, 2, (1, 1), (1, 1), (0, 0), (1, 1)), (7, 4, (3, 1), (2, 1), (2, 0), (1, 1)),
                                                                (2, 9, (2, 3), (1, 2), (0, 2), (2, 1)), (40, 3, (3, 3), (1, 1), (1, 1), (1, 1))):
        x = wild(2 * channels * height, width).view(2, channels, height, width)
        for special in (False, True):
            if special:
                x.view(-1)[torch.randint(0, x.numel(), (6,))] = torch.tensor([torch.nan, -torch.inf, -0.0, 1e-45, 3e38, -3e38])
                x[:, :, height // 2] = 0.0
            for code in ("int8", "int7"):
                for transpose in (False, True):
                    assert_native_is_reference(ops.quantize_patches, x, kernel, stride, padding, dilation, code, 0, transpose)


def test_patches_are_torchs_unfold():
    for kernel, stride, padding, dilation in GEOMETRIES:
        x = torch.randn(2, 3, 9, 8)
        want = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
        assert torch.equal(ops.quantize_patches(x, kernel, stride, padding, dilation, "fp32")[0], want)
        assert torch.equal(ops.quantize_patches(x, kernel, stride, padding, dilation, "fp32", 0, True)[0], want.t())


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.ones(2, 3, 4)), ValueError, "x is .*4-D"), (dict(x=torch.ones(1, 1, 3, 3, dtype=torch.int8)), TypeError, "x is int8"),
    (dict(code="int9"), ValueError, "code is 'int9'"), (dict(kernel=[3]), ValueError, "kernel is"), (dict(kernel=[9, 1]), ValueError, "must fit"),
    (dict(stride=[0, 1]), ValueError, "stride is"), (dict(code="uint4", block=3), ValueError, "block is 3")])
def test_bad_arguments_of_the_kernels_are_refused_by_name(change, error, message):
    arguments = dict(x=torch.ones(1, 1, 4, 4), kernel=[2, 2], stride=[1, 1], padding=[0, 0], dilation=[1, 1], code="int8")
    with pytest.raises(error, match=message):
        ops.quantize_patches(**{**arguments, **change})
    with pytest.raises(ValueError, match="d is .*of shape"):
        ops.fold_patches(torch.ones(3, 4), 1, 1, 3, 3, [2, 2], [1, 1], [0, 0], [1, 1], torch.float32)
    window, pixels = ([2, 2], [1, 1], [0, 0], [1, 1]), torch.zeros(9, 1, dtype=torch.uint8)
    for kept in ([2, 1], [1, 1], [-1, 2], [0, 4], torch.ones(2)):
        with pytest.raises(ValueError, match="fold_kept: kept is"):
            ops.fold_kept(torch.ones(2, 4), torch.as_tensor(kept), pixels, 1, 1, 3, 3, *window, torch.float32, False)
    with pytest.raises(ValueError, match="outside is"):
        ops.fold_kept(torch.ones(4, 4), None, pixels[1:], 1, 1, 3, 3, *window, torch.float32, False)
    with pytest.raises(TypeError, match="dtype is"):
        ops.fold_kept(torch.ones(4, 4), None, pixels, 1, 1, 3, 3, *window, torch.float64, False)
    with pytest.raises(ValueError, match="patch_bits: bits is .*of shape"):
        ops.patch_bits(pixels, 1, 9, 3, 3, *window)
    with pytest.raises(ValueError, match="patch_bits: kernel is"):
        ops.patch_bits(pixels, 1, 1, 3, 3, [4, 2], *window[1:])
    with pytest.raises(TypeError, match="pack_image: x is"):
        ops.pack_image(torch.ones(1, 1, 3, 3, dtype=torch.float64), *window)
    with pytest.raises(ValueError, match="pack_image: x is"):
        ops.pack_image(torch.ones(1, 3, 3), *window)


# --- special values and layouts ---------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_show_in_the_output_and_the_gradients(name, groups, bad):
    layer, _, x, dy = made((2, 4, 6, 6, 6, (3, 3), dict(padding=1, groups=groups)), name)
    x[1, 0, 3, 3] = bad
    dy = torch.zeros_like(dy)
    dy[0, 0, 1, 1] = bad
    y, dx, dw = run(layer, x, dy)
    assert not y[1, :6 // groups, 2:5, 2:5].isfinite().any() and (name == "fp8_tensor" or name in ("fp4",) or y[0].isfinite().all())
    assert not dx[0, :4 // groups, 1, 1].isfinite().all()
    if dw is not None:
        assert not dw[0].isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, NONE])
def test_channels_last_stays_and_changes_no_bit(name):
    layer, _, x, dy = made(SHAPES[0], name)
    torch.manual_seed(1)
    want = run(layer, x, dy)
    torch.manual_seed(1)
    last = torch.channels_last
    y, dx, dw = run(layer, x.to(memory_format=last), dy.to(memory_format=last))
    assert y.is_contiguous(memory_format=last) and dx.is_contiguous(memory_format=last) and want[0].is_contiguous() and want[1].is_contiguous()
    torch.testing.assert_close((y, dx), want[:2], rtol=1e-5, atol=1e-5)
    if dw is not None:
        torch.testing.assert_close(dw, want[2], rtol=1e-5, atol=1e-5)


def test_layouts_expanded_transposed_and_sliced_inputs():
    w = torch.randn(5, 3, 3, 3)
    for x in (torch.randn(2, 3, 7, 9).transpose(2, 3), torch.randn(1, 3, 8, 8).expand(4, 3, 8, 8), torch.randn(4, 6, 8, 8)[::2, 1:4], torch.randn(2, 3, 16, 16)[..., ::2, 1::2]):
        assert_same_bits(functional.conv2d(x, w, padding=1), functional.conv2d(x.contiguous(), w, padding=1))
    results = []
    for expand in (True, False):
        a, b = x.detach().clone().requires_grad_(), w.clone().requires_grad_()
        y = functional.conv2d(a, b)
        y.backward(torch.ones(()).expand_as(y) if expand else torch.ones_like(y))
        results.append((a.grad, b.grad))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", [*NAMES, NONE])
def test_shapes_and_what_needs_a_gradient(name):
    layer = Conv2d(4, 6, 3, padding=1, groups=2, recipe=name)
    for shape in ((0, 4, 5, 5), (4, 5, 5), (1, 4, 1, 1), (3, 4, 2, 6)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-3], 6, *shape[-2:])
        layer.zero_grad()
        y.sum().backward()
        assert x.grad.shape == x.shape and (layer.weight.grad is None or layer.weight.grad.shape == layer.weight.shape)
        if shape[0] == 0 and layer.weight.grad is not None:
            assert layer.weight.grad.count_nonzero() == 0
    x = torch.randn(4, 5, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    layer(torch.randn(2, 4, 5, 5)).sum().backward()  # an input that needs none
    layer.requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()                        # frozen weights
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_layers(name, dtype):
    layer, x = Conv2d(8, 6, 3, padding=1, recipe=name, dtype=dtype), torch.randn(2, 8, 5, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()
    assert layer.weight.grad is None or layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("name", ["int8", "w4", "qat_w4", "int8_weights", "fp8_row"])
def test_autocast(name):
    layer, x = Conv2d(8, 6, 3, recipe=name), torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.05)


@pytest.mark.parametrize("name", ["int8", "int8_weights", "fp4", "int4"])
def test_threads_and_instruction_sets_give_the_same_bits(name):
    layer, _, x, dy = made((3, 40, 17, 16, 24, (3, 3), dict(padding=1)), name)
    results = []
    for level in LEVELS:
        for count in (1, 2):
            with isa(level), threads(count):
                torch.manual_seed(0)
                results.append(run(layer, x, dy))
    exact = slice(None) if RECIPES[name].y.left.code == "int8" else slice(0, 0)  # products of floats: fp32 sums in any order
    for other in results[1:]:
        assert_same_bits(other[exact], results[0][exact])
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


# --- the module -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same"], ids=str)
def test_padding_modes(mode, padding):
    plain = nn.Conv2d(3, 5, (3, 4), padding=padding, padding_mode=mode)
    layer, x, dy = Conv2d.from_conv2d(copy.deepcopy(plain), NONE), torch.randn(2, 3, 8, 9), None
    dy = torch.randn_like(plain(x))
    torch.testing.assert_close(run(layer, x, dy), run(plain, x, dy), rtol=1e-5, atol=1e-5)
    layer = Conv2d(3, 5, (3, 4), padding=padding, padding_mode=mode, recipe="int8")
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x), plain(x), rtol=0.1, atol=0.05)
    before, after = layer.kept_bytes()
    assert 0 < after <= before


def test_the_layer_is_a_drop_in():
    layer = Conv2d(4, 6, 3, 2, 1, 1, 2, False, "zeros")
    assert isinstance(layer, nn.Conv2d) and "groups=2" in repr(layer) and "recipe=int8" in repr(layer) and layer.bias is None
    with pytest.raises(ValueError, match="recipe is 'nope'"):
        Conv2d(4, 4, 3, recipe="nope")


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state_dicts(name):
    torch.manual_seed(3)
    plain = nn.Conv2d(16, 6, 3)
    layer, x = Conv2d.from_conv2d(copy.deepcopy(plain), name), torch.randn(2, 16, 5, 5)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for state, strict in ((layer.state_dict(), True), (plain.state_dict(), name not in MADE), (torch.load(file, weights_only=True), True)):
        fresh = Conv2d(16, 6, 3, recipe=name)
        fresh.load_state_dict(state, strict=strict)
        assert torch.equal(fresh(x), want)
        assert isinstance(fresh.weight, QuantizedWeight) == (RECIPES[name].weight is not None)
    back = nn.Conv2d(16, 6, 3)
    back.load_state_dict(layer.state_dict(), strict=name not in MADE)
    if RECIPES[name].weight is not None:
        assert_same_bits(back.weight.detach(), layer.weight.dequantize())
    flat = layer.dequantize_()
    assert type(flat) is nn.Conv2d and "recipe" not in repr(flat) and flat.bias is layer.bias and len(list(flat.parameters())) == 2
    if RECIPES[name].y is None and RECIPES[name].one_bit is None:
        torch.testing.assert_close(flat(x), want)


@pytest.mark.parametrize("name", ["int8", "w4", "int8_weights", "qat_w4"])
def test_meta_device_and_assigned_weights(name):
    layer = Conv2d(8, 6, 3, recipe=name, device="meta")
    assert layer.weight.is_meta and layer(torch.empty(2, 8, 5, 5, device="meta")).shape == (2, 6, 3, 3)
    layer.to_empty(device="cpu")
    plain = nn.Conv2d(8, 6, 3)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=0.2, atol=0.2)
    layer = Conv2d(8, 6, 3, recipe=name)
    layer.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(layer(x), plain(x), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("name", FROZEN)
def test_step_sizes_train(name):
    layer = Conv2d(16, 6, 3, recipe=name, bias=False).train_steps_()
    x, dy = torch.randn(2, 16, 5, 5), torch.randn(2, 6, 3, 3)
    layer(x).backward(dy)
    assert layer.weight.grad is None and layer.steps.grad.shape == layer.steps.shape
    with torch.no_grad():  # Y is linear in the steps: <dY, Y> is <dsteps, steps>
        torch.testing.assert_close((layer.steps.grad * layer.steps).sum(), (layer(x) * dy).sum(), rtol=1e-3, atol=1e-3)
        layer.steps.mul_(2)
        before = layer(x)
        assert torch.equal(layer.train_steps_(False)(x), before) and "steps" not in layer.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_checkpointing_and_accumulation(name):
    layer, _, x, dy = made(SHAPES[0], name)

    def go(recompute):
        torch.manual_seed(7)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        (checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)).backward(dy)
        return [leaf.grad] + [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    first = go(False)
    for again in (go(False), go(True)):
        assert len(first) == len(again) and all(torch.equal(a, b) for a, b in zip(first, again))
    torch.manual_seed(7)
    layer(x).backward(dy)
    if layer.weight.grad is not None:
        assert torch.equal(layer.weight.grad, 2 * first[1 + [n for n, p in layer.named_parameters() if p.grad is not None].index("weight")])


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name):
    layer, x = Conv2d(4, 6, 3, padding=1, groups=2, recipe=name), torch.randn(2, 4, 5, 5)
    torch._dynamo.reset()
    results = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = f(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)))
    if name in DETERMINISTIC:
        close = (lambda a, b: (a - b).norm() <= 2e-2 * b.norm()) if name == "bf16" else (lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5))
        assert all(close(a, b) for a, b in zip(*results))


def test_double_backward_is_refused_not_wrong():
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    (g,) = torch.autograd.grad(functional.conv2d(x, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


X, W = torch.ones(1, 4, 6, 6), torch.ones(6, 4, 3, 3)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(input=[1]), TypeError, "input is a builtins.list"), (dict(input=X.double()), TypeError, "input is torch.float64"),
    (dict(weight=W[0]), ValueError, "weight has shape .*4-D"), (dict(groups=4), ValueError, "groups is 4; it must be positive and divide 6"),
    (dict(groups=0), ValueError, "groups is 0"), (dict(input=X[:, :3]), ValueError, "input has shape"), (dict(input=X[0, 0]), ValueError, "input has shape"),
    (dict(groups=2), ValueError, r"must be \(\(n,\) 8"), (dict(bias=torch.ones(5)), ValueError, "bias has shape"),
    (dict(stride=0), ValueError, "stride is"), (dict(stride=(1, 2, 3)), ValueError, "stride is"), (dict(padding=-1), ValueError, "padding is"),
    (dict(padding="most"), ValueError, "padding is 'most'"), (dict(padding="same", stride=2), ValueError, "stride is .*'same'"),
    (dict(dilation=1.5), (TypeError, ValueError), "dilation|iterable"), (dict(dilation=3), ValueError, "must fit into the padded image"),
    (dict(recipe="int9"), ValueError, "recipe is 'int9'"), (dict(recipe="qat_w4"), ValueError, "needs both"),
    (dict(steps=torch.ones(6, 1)), ValueError, "steps were given")])
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        functional.conv2d(**{"input": X, "weight": W, **arguments})


# --- convert ----------------------------------------------------------------------------------------------
class Special(nn.Conv2d):
    pass


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(),
                         nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=8, padding=1), nn.Flatten(), nn.Linear(256, 10))


def test_convert_leaves_depthwise_convolutions():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(1, 8, 3))
    report = gradmill.convert(model, "int8")
    assert report.replaced == ["2", "3"] and all("depthwise" in why for _, why in report.skipped)
    assert gradmill.convert(model, "int8", filter=lambda *_: True).replaced == ["0", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_cnn_trains(name):
    torch.manual_seed(0)
    model = small_cnn()
    before = {k: v.shape for k, v in model.state_dict().items()}
    report = gradmill.convert(model, name)
    assert report.replaced == (["0", "2", "4", "6", "8"] if RECIPES[name].one_bit is None else ["2", "4", "6"])
    assert before.items() <= {k: v.shape for k, v in model.state_dict().items()}.items()
    optimizer = gradmill.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    classes, centres = torch.randint(0, 10, (40,)), torch.randn(10, 1, 8, 8)
    x, losses = centres[classes] + 0.3 * torch.randn(40, 1, 8, 8), []
    for _ in range(15):
        loss = F.cross_entropy(model(x), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]  # frozen weights train biases only
    assert len(str(report).splitlines()) > 8


def test_convert_names_what_it_leaves_and_keeps_ties_and_hooks():
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "special": Special(4, 4, 3), "up": nn.ConvTranspose2d(4, 4, 3), "line": nn.Conv1d(4, 4, 3),
                           "head": nn.Conv2d(4, 2, 1), "lazy": nn.LazyConv2d(3, 3), "b": nn.Conv2d(4, 4, 3), "wide": nn.Conv2d(2, 2, 1, dtype=torch.float64)})
    model["again"], calls = model["a"], []
    model["b"].weight = model["a"].weight
    model["a"].register_forward_hook(lambda *_: calls.append(1))
    weight = model["a"].weight
    report = gradmill.convert(model, "int8")
    assert report.replaced == ["a", "b", "again"]
    why = dict(report.skipped)
    assert "subclass of nn.Conv2d (Special)" in why["special"] and "transposed" in why["up"] and "not a 2-D convolution (Conv1d)" in why["line"]
    assert "head" in why["head"] and "LazyConv2d" in why["lazy"] and "float64" in why["wide"]
    assert model["a"] is model["again"] and model["a"].weight is model["b"].weight is weight
    assert report.bytes_before == report.bytes_after == weight.nbytes and [layer.again for layer in report.layers.values()] == [False, True, True]
    model["a"](torch.randn(1, 4, 5, 5))
    assert calls and gradmill.convert(model, "int8").replaced == []
    with pytest.raises(ValueError, match="itself a torch.nn.Conv2d.*Conv2d.from_conv2d"):
        gradmill.convert(nn.Conv2d(1, 1, 1))


def test_convert_reports_what_a_convolution_keeps():
    def layers(name, **options):
        return gradmill.convert(nn.Sequential(nn.Conv2d(64, 8, **options)), name).layers["0"]

    image = 64 * 32 * 32
    assert layers("int8", kernel_size=3, padding=1)[:4] == (8 * 576 * 4, 8 * 576 * 4, 4 * image, 4 * image)
    assert layers("bf16", kernel_size=3, padding="same").kept_after == 2 * image
    assert layers("fp8_tensor", kernel_size=3, padding=1).kept_after == image + 4
    assert layers("int8", kernel_size=1).kept_after == image + 64 * 4
    assert layers("w4", kernel_size=3, padding=1)[:4] == (8 * 576 * 4, 8 * 288 + 8 * 5 * 5, 4 * image, 0)
