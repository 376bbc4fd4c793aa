"""CUDA: the sources of csrc/cuda against the reference, on a GPU and, through csrc/cuda/emulation, on the CPU.

Every test body runs in several "places": `native` and `triton` on a GPU (marker gpu; on a stream of its own), and
`emulated`, where the CUDA sources are compiled by the C++ compiler and run with fibers for threads. The emulation checks
indices, tails, masks and arithmetic, and, by running the threads of a block backwards or shuffled and with fewer blocks
than pieces of work, barriers and grid loops. It does not check what only a GPU can: real races, the hardware's mma, speed.
"""
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradmill
from gradmill import ops
from gradmill.formats import SPLIT, Format
from gradmill.optim._base import QUANTIZED
from gradmill.optim.rules import RULES
from gradmill.reference import binary as reference_binary
from gradmill.reference import codebook as reference_codebook
from gradmill.reference import grouped as reference_grouped
from gradmill.reference import matmul as reference_matmul
from gradmill.reference import optim as reference_optim
from gradmill.reference import projection as reference_projection
from gradmill.reference import quant as reference_quant
from gradmill.reference.philox import stream

from .conftest import fit, scalars_of

ROOT = Path(__file__).resolve().parent.parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKED = ("int8", "uint8", "int4", "uint4", "moment8", "square8", "e4m3", "e5m2", "e2m1", "int7", "uint2", "int2", "uint3", "int3", "int4_outlier",
           "moment4", "square4")
NOT_WRITTEN = ("uint3", "int3", "int4_outlier")  # quantised by the reference on CUDA
KEY = torch.tensor([0x123456789ABCDEF, 7])
FAMILIES = [sys.modules[f"gradmill.ops.{name}"] for name in ("quant", "matmul", "grouped", "optim", "projection", "binary", "codebook")]


# --- places -----------------------------------------------------------------------------------------------
class Place:
    """Where an op runs. ``context()`` makes gradmill's ops run there; ``put`` and ``get`` move tensors."""

    def __init__(self, name, device, context):
        self.name, self.device, self.context = name, device, context
        self.emulated = name == "emulated"

    def put(self, t):
        return None if t is None else t.to(self.device)

    def get(self, t):
        return t.cpu()


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """gradmill._C built from the CUDA sources by the C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the CUDA emulation needs a C++ compiler on Linux")
    pybind11 = pytest.importorskip("pybind11")
    import sysconfig
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas",
             "-DGRADMILL_WITH_CUDA", f"-I{ROOT / 'csrc/cuda/emulation'}", "-isystem", pybind11.get_include(),
             "-isystem", sysconfig.get_path("include")]
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + [ROOT / "csrc/cuda/emulation/tables.cpp", ROOT / "csrc/bindings.cpp"]
    running = [subprocess.Popen([compiler, *flags, "-x", "c++", "-c", str(s), "-o", str(folder / f"{s.stem}.o")]) for s in sources]
    assert [p.wait() for p in running] == [0] * len(sources)
    target = folder / "_C.so"
    subprocess.run([compiler, "-shared", "-o", str(target), *map(str, folder.glob("*.o"))], check=True)
    spec = importlib.util.spec_from_file_location("gradmill_emulated._C", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated_place(module, monkeypatch, order, grid):
    monkeypatch.setenv("GM_EMULATION_ORDER", order)
    monkeypatch.setenv("GM_EMULATION_GRID", str(grid))
    for family in FAMILIES:
        monkeypatch.setattr(family, "native_module", lambda: module)
        monkeypatch.setattr(family, "where", lambda tensor: (0, 0))
    return Place("emulated", "cpu", lambda: gradmill.use_backend("native"))


def gpu_place(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (torch.cuda.is_available() is false)")

    @contextlib.contextmanager
    def context():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), gradmill.use_backend(backend):
            yield
        side.synchronize()

    return Place(backend, "cuda", context)


@pytest.fixture(params=["forward", "reverse", "random", pytest.param("native", marks=pytest.mark.gpu),
                        pytest.param("triton", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    if request.param in ("native", "triton"):
        return gpu_place(request.param)
    module = request.getfixturevalue("emulated_module")
    return emulated_place(module, monkeypatch, request.param, {"forward": 1 << 20, "reverse": 3, "random": 2}[request.param])


# --- inputs and comparisons -------------------------------------------------------------------------------
def sample(rows, columns, seed, dtype=torch.float32):
    """Normal numbers with what formats trip over: zeros, -0, denormals, huge values, a nan, an inf."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    x[:, ::7] *= 30
    if rows > 1:
        x[1] = 0
    if rows > 2:
        x[2] = torch.where(torch.arange(columns) % 3 == 0, -0.0, 1e-41)
    if rows > 3:
        x[3] = torch.linspace(-3e38, 3.3e38, columns)
    if rows > 4:
        x[4, columns // 2] = torch.nan
    if rows > 5:
        x[5, columns - 1] = -torch.inf
    if rows > 6:
        x[6] = x[6].abs() + 5
    return x.to(dtype)


def same(got, want, what=""):
    got, want = got.cpu(), want.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, what
    if want.is_floating_point():
        integer = {1: torch.int8, 4: torch.int32, 2: torch.int16, 8: torch.int64}[want.element_size()]
        equal = (got.contiguous().view(integer) == want.contiguous().view(integer)) | (got.isnan() & want.isnan())
    else:
        equal = got == want
    if not equal.all():
        at = tuple((~equal).nonzero()[0].tolist())
        raise AssertionError(f"{what}: {int((~equal).sum())} of {equal.numel()} differ, first at {at}: {got[at]} instead of {want[at]}")


def close(got, want, bound, what=""):
    """|got - want| <= bound element by element; nan and inf where the reference has them."""
    got, want, bound = got.cpu().double(), want.double(), bound.double()
    finite = want.isfinite() & bound.isfinite()
    assert torch.equal(got.isnan()[~finite], want.isnan()[~finite]), what
    excess = ((got - want).abs() - bound)[finite]
    assert not (excess > 0).any() and not excess.isnan().any(), f"{what}: off by {excess.max():.3g} more than the bound"


def quantised(rows, columns, code, block, seed, exact=False):
    """A stored matrix; ``exact``: scales are powers of two, so that small sums of products have no rounding."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales, zeros = reference_quant.quantize(x.abs() if code.startswith("square") else x, code, block)
    if exact:
        scales = torch.full_like(scales, 2.0 ** -6)
    return codes, scales, zeros


# --- without a GPU ----------------------------------------------------------------------------------------
def test_imports_and_says_why_without_gpu():
    from gradmill import _C
    reason = _C.cuda_problem()
    if torch.cuda.is_available() and _C.has_cuda:
        assert reason == ""
    else:
        assert isinstance(reason, str) and reason
        assert not _C.has_cuda or re.search("driver|device|CUDA", reason)


def test_launch_without_gpu_raises():
    from gradmill import _C
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x = torch.ones(4, 4)
    codes, scales = torch.empty(4, 4, dtype=torch.int8), torch.empty(4, 1)
    with pytest.raises(RuntimeError, match="CUDA|cuda"):
        _C.quantize(0, 0, x.data_ptr(), 0, 4, (codes.data_ptr(), scales.data_ptr(), 0, 3, 4, 4, 4), False, None, False)


def find_cuobjdump():
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None:
        candidate = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(candidate) if candidate.exists() else None
    if found is None:
        pytest.skip("no cuobjdump (CUDA toolkit or triton)")
    return found


def test_every_architecture_has_code():
    from gradmill import _C
    if not _C.has_cuda:
        pytest.skip("this gradmill was built without CUDA")
    out = subprocess.run([find_cuobjdump(), "-lelf", "-lptx", _C.__file__], capture_output=True, text=True).stdout
    sources = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    for arch in re.findall(r"sm_\w+", _C.cuda_archs):
        assert len(re.findall(rf"ELF file.*\.{arch}\.cubin", out)) >= sources - 1, f"{arch} is missing:\n{out}"  # device.cu has no kernel
    assert len(re.findall(r"PTX file.*\.sm_80\.ptx", out)) >= sources - 1


def test_tensor_core_instructions():
    from gradmill import _C
    if not _C.has_cuda:
        pytest.skip("this gradmill was built without CUDA")
    for arch in re.findall(r"sm_\w+", _C.cuda_archs):
        sass = subprocess.run([find_cuobjdump(), "-sass", "-arch", arch, _C.__file__], capture_output=True, text=True).stdout
        assert re.search(r"IMMA\.16832\.S8\.S8", sass), f"matmul_int8 has no int8 tensor-core instruction on {arch}"
        assert re.search(r"HMMA\.\S*TF32", sass), f"matmul_packed has no tf32 tensor-core instruction on {arch}"


# --- quant ------------------------------------------------------------------------------------------------
QUANT_SHAPES = [(7, 70, 32), (1, 1, 0), (7, 1030, 256), (3, 3001, 0), (9, 37, 0), (2, 130, 10)]


@pytest.mark.parametrize("code", [code for code in BLOCKED if code not in NOT_WRITTEN])
@pytest.mark.parametrize("rows, columns, block", QUANT_SHAPES)
def test_quantize(place, code, rows, columns, block):
    block = fit(code, block)
    for number, (dtype, transpose, key) in enumerate([(torch.float32, False, None), (torch.bfloat16, False, KEY), (torch.float16, True, None),
                                                      (torch.float32, True, KEY)]):
        x = sample(rows, columns, number, dtype)
        if code.startswith("square"):
            x = x.abs()
        if transpose:
            x = x.t().contiguous()  # so that the result has the same shape
        wide = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=dtype)
        wide[:, 1:-2] = x  # a row stride and an address that is not aligned
        want = reference_quant.quantize(x, code, block, transpose, key, stream(3, "gradient"))
        for strided in (False, True):
            source = place.put(wide)[:, 1:-2] if strided else place.put(x)
            with place.context():
                got = ops.quantize(source, code, block, transpose, key, stream(3, "gradient"))
            for g, w, name in zip(got, want, ("codes", "scales", "zeros")):
                same(g, w, f"{name} of {code} {dtype} transpose={transpose} key={key is not None} strided={strided}")


@pytest.mark.parametrize("code", ["int8", "int7", "e4m3", "e5m2"])
@pytest.mark.parametrize("rows, columns, block", [*QUANT_SHAPES, (70, 133, 0), (1030, 9, 0)])
def test_quantize_both(place, code, rows, columns, block):
    for number, (dtype, key) in enumerate([(torch.float32, None), (torch.bfloat16, None), (torch.float16, KEY)]):
        x = sample(rows, columns, number, dtype)
        for turned in (False, True):
            source = x.t() if turned else x
            want = reference_quant.quantize_both(source, code, block, key, stream(3, "gradient"), stream(4, "gradient"))
            with place.context():
                got = ops.quantize_both(place.put(x).t() if turned else place.put(x), code, block, key, stream(3, "gradient"), stream(4, "gradient"))
            for g, w, name in zip(got, want, ("codes", "scales", "turned codes", "turned scales")):
                same(g, w, f"{name} of {code} {dtype} key={key is not None} turned={turned}")


@pytest.mark.parametrize("code", ["int8", "int7", "e4m3", "e5m2", "e2m1", "int2"])
@pytest.mark.parametrize("rows, columns, block", QUANT_SHAPES)
def test_quantize_with_given_scales(place, code, rows, columns, block):
    block = fit(code, block)
    for transpose in (False, True):
        x = sample(rows, columns, 3, torch.float32)
        x.view(-1)[-1] = torch.inf
        scales = torch.rand(rows, Format(code, block).blocks(columns)) / 50
        scales[0, 0] = 0
        x = x.t().contiguous() if transpose else x
        want = reference_quant.quantize(x, code, block, transpose, KEY, 3, scales)
        with place.context():
            got = ops.quantize(place.put(x), code, block, transpose, KEY, 3, place.put(scales))
        for g, w, name in zip(got, want, ("codes", "scales", "zeros")):
            same(g, w, f"{name} of {code} transpose={transpose}")


@pytest.mark.parametrize("code", BLOCKED)
@pytest.mark.parametrize("rows, columns, block", [*QUANT_SHAPES, (2, 9001, 0)])
def test_dequantize(place, code, rows, columns, block):
    block = fit(code, block)
    codes, scales, zeros = quantised(rows, columns, code, block, 5)
    scales.view(-1)[::3] = torch.tensor([torch.nan, 0.0, 3e38])[torch.arange(scales.view(-1)[::3].numel()) % 3]
    for dtype in FLOATS:
        want = reference_quant.dequantize(codes, scales, zeros, code, block, columns, dtype)
        with place.context():
            got = ops.dequantize(*map(place.put, (codes, scales, zeros)), code, block, columns, dtype)
        same(got, want, f"{code} to {dtype}")


@pytest.mark.parametrize("rows, columns, block", [(7, 70, 16), (1, 1, 16), (17, 301, 2), (9, 128, 128), (3, 700, 256), (2, 1000, 512), (2, 2047, 1024),
                                                  (40, 133, 64), (0, 5, 16), (5, 0, 16)])
def test_hadamard(place, rows, columns, block):
    for number, (dtype, out, transpose, key, inverse) in enumerate([
            (torch.float32, None, False, KEY, False), (torch.bfloat16, torch.float32, False, None, False), (torch.float16, None, True, KEY, True),
            (torch.float32, torch.bfloat16, True, KEY, False), (torch.float32, torch.float16, False, KEY, True)]):
        x = sample(rows, columns, number, dtype) if columns else torch.empty(rows, columns, dtype=dtype)
        if transpose:
            x = x.t().contiguous()
        wide = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=dtype)
        wide[:, 1:-2] = x
        want = reference_quant.hadamard(x, block, transpose, key, stream(3, "hadamard"), out, inverse)
        for strided in (False, True):
            source = place.put(wide)[:, 1:-2] if strided else place.put(x)
            with place.context():
                got = ops.hadamard(source, block, transpose, key, stream(3, "hadamard"), out, inverse)
            same(got, want, f"{dtype} to {out} transpose={transpose} key={key is not None} inverse={inverse} strided={strided}")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows, columns, block", QUANT_SHAPES)
def test_fake_quantize(place, bits, rows, columns, block):
    for number, (dtype, grad_dtype, out_dtype) in enumerate([(torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.float16, torch.bfloat16),
                                                             (torch.float16, torch.bfloat16, torch.float16)]):
        weight, grad = sample(rows, columns, number, dtype), sample(rows, columns, number + 10, grad_dtype)
        if rows > 1:
            grad[:-1] = grad[:-1].roll(1, 0)
        steps, zeros = reference_quant.fake_quantize_parameters(weight, bits, block)
        steps, zeros = steps * 0.6, zeros + 0.3
        steps.view(-1)[::7] = torch.tensor([-1.0, torch.nan, 0.0, torch.inf])[torch.arange(steps.view(-1)[::7].numel()) % 4]
        want = reference_quant.fake_quantize(weight, steps, zeros, bits, block, out_dtype)
        with place.context():
            got = ops.fake_quantize(*map(place.put, (weight, steps, zeros)), bits, block, out_dtype)
        same(got, want, f"{dtype} to {out_dtype}")
        want = reference_quant.fake_quantize_backward(grad, weight, steps, zeros, bits, block)
        with place.context():
            got = ops.fake_quantize_backward(*map(place.put, (grad, weight, steps, zeros)), bits, block)
        for g, w, name in zip(got, want, ("dweight", "dsteps", "dzeros")):
            same(g, w, f"{name} of {dtype}, grad {grad_dtype}")


# --- matmul -----------------------------------------------------------------------------------------------
INT8_SHAPES = [(1, 1, 1), (5, 7, 3), (33, 65, 130), (130, 129, 64), (2, 3, 0)]


@pytest.mark.parametrize("m, n, k", INT8_SHAPES)
def test_matmul_int8(place, m, n, k):
    g = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randint(-128, 128, (rows, k), generator=g, dtype=torch.int8) for rows in (m, n))
    a_scales, b_scales, bias = torch.rand(m, 1, generator=g), torch.rand(n, 1, generator=g), torch.randn(n, generator=g)
    a_scales[0] = torch.nan
    for dtype, bias in ((torch.float32, bias), (torch.bfloat16, None), (torch.float16, bias)):
        want = reference_matmul.matmul_int8(a, b, a_scales, b_scales, bias, dtype)
        with place.context():
            got = ops.matmul_int8(*map(place.put, (a, b, a_scales, b_scales, bias)), dtype)
        same(got, want, str(dtype))


@pytest.mark.parametrize("k", [65536, 65536 + 65, 200003])
def test_matmul_int8_long_sums(place, k):
    if place.emulated and (os.environ["GM_EMULATION_ORDER"] != "forward" or k != 65536 + 65):
        pytest.skip("a minute in the emulation: one case is enough")
    a = torch.full((2, k), -128, dtype=torch.int8)
    b = torch.full((1, k), -128, dtype=torch.int8)
    a[1, ::2] = 127
    ones = torch.ones(2, 1)
    want = reference_matmul.matmul_int8(a, b, ones, ones[:1], None, torch.float32)
    with place.context():
        got = ops.matmul_int8(*map(place.put, (a, b, ones, ones[:1])), None, torch.float32)
    same(got, want)


PACKED_SHAPES = [(1, 33, 64, 32), (3, 10, 192, 64), (13, 7, 128, 0), (17, 65, 66, 0), (70, 37, 101, 32), (5, 9, 70, 10), (1, 1, 1, 0),
                 (16, 5, 4128, 0)]


@pytest.mark.parametrize("code", BLOCKED)
@pytest.mark.parametrize("m, rows, columns, block", PACKED_SHAPES)
def test_matmul_packed(place, code, m, rows, columns, block):
    if place.emulated and columns > 4000 and code not in ("int8", "uint4"):
        pytest.skip("slow in the emulation; two codes are enough")
    block = fit(code, block)
    codes, scales, zeros = quantised(rows, columns, code, block, 3)
    if rows > 4:
        scales[2, 0] = torch.nan
    w = reference_quant.dequantize(codes, scales, zeros, code, block, columns, torch.float64)
    for dtype in FLOATS:
        for transpose in (False, True):
            k = rows if transpose else columns
            g = torch.Generator().manual_seed(k)
            x = torch.randn(m, k, generator=g).to(dtype)
            bias = torch.randn(columns if transpose else rows, generator=g) if transpose else None
            want = reference_matmul.matmul_packed(x, codes, scales, zeros, code, block, columns, transpose, bias, torch.float64)
            with place.context():
                got = ops.matmul_packed(*map(place.put, (x, codes, scales, zeros)), code, block, columns, transpose, place.put(bias), dtype)
            # fp32 sums of k products in any order; tensor cores cut instead of rounding and see 21 bits of a weight; for
            # the integer codes a block's scale may be multiplied in last, when codes and zero point are 2^8 larger
            # than their difference
            size = x.double().abs() @ (w if transpose else w.t()).abs()
            if bias is not None:
                size = size + bias.abs()
            close(got, want, size * (k + 8) * 2.0 ** -22 + want.abs() * torch.finfo(dtype).eps, f"{code} {dtype} transpose={transpose}")


@pytest.mark.parametrize("a_code, a_block, b_code, b_block", [("e4m3", 0, "e4m3", 0), ("e5m2", 128, "e4m3", 128), ("e2m1", 16, "e2m1", 16),
                                                               ("int4_outlier", 64, "uint4", 64), ("fp32", 0, "int4_outlier", 64), ("bf16", 0, "bf16", 0)])
def test_matmul_scaled(place, a_code, a_block, b_code, b_block):
    def operand(rows, columns, code, block, seed):
        if not Format(code).blocked:
            return torch.randn(rows, columns).to(Format(code).code_dtype), None, None
        return quantised(rows, columns, code, block, seed)

    for transpose in (False, True):
        m, rows, columns = 19, 70, 136
        a, b = operand(m, rows if transpose else columns, a_code, a_block, 1), operand(rows, columns, b_code, b_block, 2)
        rest = (b_code, b_block, columns, transpose, None)
        want = reference_matmul.matmul_scaled(*a, a_code, a_block, *b, *rest, torch.float64)
        with place.context():
            got = ops.matmul_scaled(*map(place.put, a), a_code, a_block, *map(place.put, b), *rest, torch.float32)
        close(got, want, want.abs().max() * 2.0 ** -15, f"transpose={transpose}")  # k * 2^-24 of the sum of magnitudes


# --- grouped ----------------------------------------------------------------------------------------------
GROUPS = [[5, 0, 130, 1], [0], [70], [0, 0, 33], [1] * 9]


@pytest.mark.parametrize("code", ["int8", "int7", "e4m3", "e5m2"])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_quantize_grouped(place, code, sizes):
    offs = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for columns, block, dtype, key in ((37, 0, torch.float32, None), (70, 32, torch.bfloat16, KEY), (1, 0, torch.float16, KEY)):
        x = sample(sum(sizes) + 2, columns, columns, dtype)
        want = reference_grouped.quantize_grouped(x, offs, code, block, key, stream(3, "gradient"))
        for given in (None, torch.rand_like(want[1])):
            want = reference_grouped.quantize_grouped(x, offs, code, block, key, stream(3, "gradient"), given)
            with place.context():
                got = ops.quantize_grouped(place.put(x), place.put(offs), code, block, key, stream(3, "gradient"), place.put(given))
            for g, w, name in zip(got, want, ("codes", "scales")):
                same(g, w, f"{name} of {code} {columns} {block} given={given is not None}")


@pytest.mark.parametrize("code, block", [("int8", 0), ("int7", 0), ("e4m3", 0), ("e4m3", 32), ("e5m2", 0), ("fp32", 0), ("bf16", 0)])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_matmul_grouped(place, code, block, sizes):
    offs, tokens, format = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), sum(sizes) + 2, Format(code, block)
    exact = code in ("int8", "int7")

    def operand(*shape, over=False):
        x = torch.randn(shape)
        if not format.blocked:
            return x.to(format.code_dtype), None
        if over:
            return reference_grouped.quantize_grouped(x, offs, code, block)
        codes, scales, _ = reference_quant.quantize(x.flatten(0, -2), code, block)
        return codes.view(x.shape), scales.view(*shape[:-1], -1)

    k, n, m = 70, 133, 66
    bias = torch.randn(len(sizes), n)
    for a, b, ends, with_bias in ((operand(tokens, k), operand(len(sizes), n, k), offs, bias), (operand(len(sizes), 19, k), operand(len(sizes), n, k), None, bias),
                                  (operand(tokens, m, over=True), operand(tokens, n, over=True), offs, None)):
        arguments = (*a, code, block, *b, code, block, ends, with_bias, torch.float32)
        want = reference_grouped.matmul_grouped(*arguments)
        with place.context():
            got = ops.matmul_grouped(*(place.put(t) if isinstance(t, torch.Tensor) else t for t in arguments))
        if exact:
            same(got, want)
        else:
            close(got, want, (want.abs().max() + 1) * 2.0 ** -15 * torch.ones_like(want))


# --- optim ------------------------------------------------------------------------------------------------
def guarded(t, device):
    """A copy of t inside a larger buffer, and that buffer: stores outside t would show."""
    flat = t.contiguous().view(-1).view(torch.uint8) if t.numel() else t.contiguous().view(-1).to(torch.uint8)
    buffer = torch.full((flat.numel() + 128,), 0xA5, dtype=torch.uint8)
    buffer[64:64 + flat.numel()] = flat
    buffer = buffer.to(device)
    inside = buffer[64:64 + flat.numel()].view(t.dtype).view(t.shape)
    return inside, buffer, flat.numel()


def stored(shape, code, block, seed):
    """A tensor of ``shape`` in a format: (codes, scales, zeros)."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    if code.startswith("square"):
        x = x * x
    format = Format(code, block)
    if code in SPLIT:
        high, low = reference_quant.split_float(x, code)
        return high, torch.empty(0), low
    if not format.blocked:
        return x.to(format.code_dtype), torch.empty(0), torch.empty(0, dtype=torch.uint8)
    return reference_quant.quantize(reference_optim.as_matrix(x), code, block)


SMALL = [(5, 3), (1,), (70, 65), (3, 4, 5), (513,), (2, 2100)]
#        param code, block, state code, block, grad dtype, shapes
STEP_CASES = [
    ("fp32", 0, "fp32", 0, torch.float32, SMALL),
    ("bf16", 0, "fp32", 0, torch.bfloat16, SMALL),
    ("fp16", 0, "bf16", 0, torch.float16, SMALL),
    ("fp32", 0, "moment8", 256, torch.bfloat16, SMALL),
    ("delta", 0, "moment8", 256, torch.float32, SMALL),
    ("bf16", 0, "moment8", 64, torch.bfloat16, [(7, 65), (3, 4100)]),
    ("uint8", 256, "moment8", 256, torch.bfloat16, SMALL),
    ("uint8", 64, "fp32", 0, torch.float32, SMALL),
    ("int8", 0, "moment8", 32, torch.float32, SMALL),
    ("uint4", 128, "moment8", 64, torch.float32, [(3, 601), (70, 64)]),
    ("int4", 6, "moment8", 3, torch.float32, [(3, 601), (2, 2100)]),
    ("int4", 0, "moment8", 5, torch.float32, [(3, 2501), (2, 33)]),       # long blocks of 4-bit codes, odd short ones
    ("int4", 0, "moment8", 0, torch.float32, [(3, 5001), (2, 33)]),
    ("uint8", 1500, "moment8", 0, torch.bfloat16, [(2, 7001), (2, 33)]),  # two long lengths
    ("uint8", 1100, "moment8", 2200, torch.bfloat16, [(2, 7001)]),
    ("uint8", 2048, "moment8", 256, torch.float32, [(2, 5001)]),
    ("int8", 256, "moment8", 0, torch.float32, [(2, 5001)]),
    ("bf16", 0, "moment4", 128, torch.float32, SMALL),
    ("uint8", 256, "moment4", 128, torch.bfloat16, [(3, 601), (70, 64)]),
    ("fp32", 0, "moment4", 0, torch.float32, [(2, 2501), (3, 33)]),
    ("e4m3", 64, "e4m3", 256, torch.float32, [(3, 601), (70, 64)]),
    *((code, 0, "moment8", 256, torch.float32, [(3, 601), (70, 64), (513,)]) for code in SPLIT),
]


@pytest.mark.parametrize("rule, case", [(rule, case) for rule in RULES
                                        for case in (STEP_CASES if rule in ("adamw", "adamw_amsgrad", "lion") else STEP_CASES[1:7:5])],
                         ids=lambda x: x if isinstance(x, str) else f"{x[0]}.{x[1]}-{x[2]}.{x[3]}")
def test_fused_step(place, rule, case):
    """Every format under three rules, which have one to three states; the other rules with bf16 and uint8 weights."""
    param_code, param_block, state_code, state_block, grad_dtype, shapes = case
    if shapes is SMALL and rule == "adamw":
        shapes = SMALL * 4  # more tensors than one launch takes
    count = len(RULES[rule].states)
    kind = {"moment8": "int8", "e4m3": "fp8", "moment4": "int4"}.get(state_code)
    state_codes = [QUANTIZED[kind].get(c, Format(c)).code for c in RULES[rule].state_codes] if kind else [state_code] * count
    blocked = Format(param_code, param_block).blocked, [Format(c).blocked for c in state_codes]
    params = [stored(shape, param_code, param_block, i) for i, shape in enumerate(shapes)]
    states = [stored(shape, c, state_block, 50 + i * count + s) for i, shape in enumerate(shapes) for s, c in enumerate(state_codes)]
    if kind is None:
        states = [(t[0].abs(), *t[1:]) if RULES[rule].state_codes[i % count] == "square8" else t for i, t in enumerate(states)]
    want, got, guards = {}, {}, []
    for name, tensors in (("params", [p[0] for p in params]), ("param_scales", [p[1] for p in params] if blocked[0] else []),
                          ("param_zeros", [p[2] for p in params] if Format(param_code).has_zero_point or param_code in SPLIT else []),
                          ("states", [s[0] for s in states]), ("state_scales", [s[1] for s in states] if any(blocked[1]) else [])):
        want[name] = [t.clone() for t in tensors]
        copies = [guarded(t, place.device) for t in tensors]
        got[name] = [c[0] for c in copies]
        guards += copies
    # a row per tensor, each its own step size; every third without decay
    scalars = torch.cat([scalars_of(rule, lr=0.03 * (i + 1), weight_decay=0.0 if i % 3 == 1 else 0.1) for i in range(len(shapes))])
    ids = [7 * i + 1 for i in range(len(shapes))]
    offsets = [0, 4, 37, 1 << 33][len(rule) % 4] or None
    offsets = offsets and [offsets] * len(shapes)
    for step in range(3):
        key = torch.tensor([99 + (1 << 40), step])
        grads = [torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(grad_dtype) for i, shape in enumerate(shapes)]
        for i, g in enumerate(grads):
            if i % 3 == 1:  # a tensor that hardly moves: blocks without a change stay as they are
                g.zero_()
            elif g.numel() > 300 and step == 2:
                g.view(-1)[299] = torch.nan
        for_place = [place.put(g) for g in grads]
        reference_optim.fused_step(rule, want["params"], want["param_scales"], want["param_zeros"], grads, want["states"], want["state_scales"],
                                   scalars, key, ids, param_code, param_block, list(state_codes), state_block, offsets)
        with place.context():
            ops.fused_step(rule, got["params"], got["param_scales"], got["param_zeros"], for_place, got["states"], got["state_scales"],
                           scalars, key, ids, param_code, param_block, list(state_codes), state_block, offsets)
        for name in want:
            for i, (g, w) in enumerate(zip(got[name], want[name])):
                same(g, w, f"{name}[{i}] after step {step}")
    for _, buffer, size in guards:
        assert (buffer[:64] == 0xA5).all() and (buffer[64 + size:] == 0xA5).all(), "a store outside a tensor"


@pytest.mark.parametrize("rule, case", [("adamw", STEP_CASES[1]), ("lion", STEP_CASES[6]), ("sgd", STEP_CASES[1]), ("adam_amsgrad", STEP_CASES[6])],
                         ids=lambda x: x if isinstance(x, str) else f"{x[0]}.{x[1]}-{x[2]}.{x[3]}")
def test_scalars_and_steps_from_device_memory(place, rule, case):
    """The step with `counts` is the step with the same numbers in its arguments; a tensor whose count is below 0 stays. More tensors than a launch takes."""
    param_code, param_block, state_code, state_block, grad_dtype, _ = case
    shapes = [(3, 601), (70, 64), (5,), (513,), (2, 64)] * 5
    state_codes = [QUANTIZED["int8"].get(c, Format(c)).code if Format(state_code).blocked else state_code for c in RULES[rule].state_codes]
    params = [stored(shape, param_code, param_block, i) for i, shape in enumerate(shapes)]
    states = [stored(shape, c, state_block, 50 + i * len(state_codes) + s) for i, shape in enumerate(shapes) for s, c in enumerate(state_codes)]
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(grad_dtype) for i, shape in enumerate(shapes)]
    lists = [[p[0] for p in params], [p[1] for p in params] if Format(param_code, param_block).blocked else [],
             [p[2] for p in params] if Format(param_code).has_zero_point or param_code in SPLIT else [],
             [s[0] for s in states], [s[1] for s in states] if any(Format(c).blocked for c in state_codes) else []]
    got, ids = [[place.put(t.clone()) for t in ts] for ts in lists], [3 * i for i in range(len(shapes))]
    counts = torch.tensor([float([-1, 5, 1, 70000, 2, 1 << 20][i % 6]) for i in range(len(shapes))])
    scalars = torch.cat([scalars_of(rule, lr=0.03 * (i + 1), step=max(1, int(c))) for i, c in enumerate(counts.tolist())])
    with place.context():
        ops.fused_step(rule, *got[:3], [place.put(g) for g in grads], *got[3:], place.put(scalars), torch.tensor([99 + (1 << 40), 12345]), ids, param_code, param_block,
                       state_codes, state_block, None, place.put(counts))
    for i, count in enumerate(counts.tolist()):
        if count < 0:
            continue
        k = len(state_codes)
        one = [ts[i:i + 1] for ts in lists[:3]], [ts[i * k:(i + 1) * k] for ts in lists[3:]]
        reference_optim.fused_step(rule, *one[0], grads[i:i + 1], *one[1], scalars[i:i + 1], torch.tensor([99 + (1 << 40), int(count)]), ids[i:i + 1], param_code,
                                   param_block, state_codes, state_block)
    for name, mine, theirs in zip(("params", "param_scales", "param_zeros", "states", "state_scales"), got, lists):
        for i, (g, w) in enumerate(zip(mine, theirs)):
            same(g, w, f"{name}[{i}]")


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_optimizer_counts_on_the_device_and_repeats_its_step(place, name, monkeypatch):
    """capturable=True against the host's counts: bits, a skipped step, and steps that are repeated without their checks."""
    from gradmill import optim
    from gradmill.optim import _base
    options = dict(lr=0.01, states="int8", min_quantized_numel=1, seed=3, on_nonfinite="skip", max_grad_norm=3.0, **({"momentum": 0.9} if name == "SGD" else {}))
    sides, repeated = [], []
    for there in (False, True):
        g = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(place.put(torch.randn(s, generator=g).to(dtype))) for dtype in (torch.float32, torch.bfloat16) for s in ((9, 70), (33,))]
        monkeypatch.setattr(_base, "counts_on", lambda device, there=there: there)
        if place.emulated:
            monkeypatch.setattr(_base, "native_module", lambda: sys.modules["gradmill.ops.optim"].native_module())
        optimizer = getattr(optim, name)(params, capturable=there, **options)
        repeat = optimizer._repeat
        monkeypatch.setattr(optimizer, "_repeat", lambda *a, repeat=repeat: repeated.append(repeat(*a)) or repeated[-1])
        with place.context():
            for step in range(6):
                for p in params:
                    p.grad = place.put(torch.randn(p.shape, generator=g)).to(p.dtype)
                if step == 4:
                    params[1].grad[3] = torch.inf
                optimizer.step()
        assert float(optimizer.state[params[0]]["step"]) == 5
        sides.append([t for p in params for t in (p.detach(), *[v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)])])
    assert any(repeated[-4:]) or place.name == "triton"
    for i, (got, want) in enumerate(zip(*sides)):
        same(got, want, str(i))


def test_measure(place):
    for dtype in FLOATS:
        tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 0, 37, 4096, 4097, 140000, 5) + (3,) * 120]
        tensors[2][5], tensors[6][1] = torch.inf, torch.nan
        for limits in (None, torch.rand(len(tensors), 2)):
            want = reference_optim.measure(tensors, limits)
            with place.context():
                got = ops.measure([place.put(t) for t in tensors], limits)
            same(got, want, f"{dtype} {limits is None}")


# --- projection -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("m, n, rank, code, block", [(5, 70, 3, "uint4", 64), (70, 33, 17, "int8", 0), (1, 1, 1, "int4", 0), (9, 130, 66, "uint8", 10)])
def test_project(place, left, m, n, rank, code, block):
    d = m if left else n
    codes, scales, zeros = quantised(rank, d, code, block, 1)
    basis = reference_quant.dequantize(codes, scales, zeros, code, block, d, torch.float64)
    for dtype in FLOATS:
        grad = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(dtype)
        want = reference_projection.project(grad, codes, scales, zeros, code, block, left)
        with place.context():
            got = ops.project(*map(place.put, (grad, codes, scales, zeros)), code, block, left)
        size = basis.abs() @ grad.double().abs() if left else grad.double().abs() @ basis.abs().t()
        close(got, want, size * (d + 4) * 2.0 ** -24, str(dtype))


BACK_CASES = [("fp32", 0, 5, 70), ("bf16", 0, 33, 300), ("fp16", 0, 3, 5), ("uint8", 256, 35, 520), ("int8", 0, 3, 37), ("int8", 0, 34, 601),
              ("uint4", 64, 5, 333), ("int4", 0, 3, 301), ("uint8", 10, 4, 77), ("uint8", 300, 3, 700), ("int4", 6, 33, 261)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("weight_code, weight_block, rows, columns", BACK_CASES)
def test_project_back(place, left, weight_code, weight_block, rows, columns):
    """Small integers times powers of two: every sum is exact, so the result must be bit-equal."""
    rank, code, block = 19, "uint4", 64
    weight = stored((rows, columns), weight_code, weight_block, 4)
    d = rows if left else columns
    codes, scales, zeros = quantised(rank, d, code, block, 6, exact=True)
    update = torch.randint(-3, 4, (rank, columns) if left else (rows, rank), generator=torch.Generator().manual_seed(8)).float()
    update[:, 0] = 0
    if left:
        update[:, : min(64, columns // 2)] = 0  # whole blocks of the weight without a change
    elif rows > 2:
        update[1:3] = 0
    has = Format(weight_code).blocked, Format(weight_code).has_zero_point
    residual = torch.randn(rows, columns).to(torch.bfloat16), torch.randn(columns if left else rows)
    for decay, alpha, extra in ((1.0, 0.37, ()), (0.993, -0.2, residual)):
        scalars = torch.tensor([decay, alpha])
        want = [t.clone() for t in weight]
        copies = [guarded(t, place.device) for t in weight]
        got = [c[0] for c in copies]
        arguments = (weight_code, weight_block, columns)
        basis = (codes, scales, zeros)
        reference_projection.project_back(want[0], want[1] if has[0] else None, want[2] if has[1] else None, *arguments, update, *basis, code,
                                          block, left, scalars, KEY, stream(5, "weight"), *extra)
        with place.context():
            ops.project_back(got[0], got[1] if has[0] else None, got[2] if has[1] else None, *arguments, place.put(update),
                             *map(place.put, basis), code, block, left, scalars, KEY, stream(5, "weight"), *map(place.put, extra))
        for g, w, name in zip(got, want, ("codes", "scales", "zeros")):
            same(g, w, f"{name} decay={decay}")
        for _, buffer, size in copies:
            assert (buffer[:64] == 0xA5).all() and (buffer[64 + size:] == 0xA5).all(), "a store outside a tensor"


# --- binary -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 33), (5, 70), (130, 9)])
def test_pack_bits(place, rows, columns):
    for dtype in FLOATS:
        x = sample(rows, columns, rows + columns, dtype)
        for transpose in (False, True):
            cases = [(ops.pack_signs, reference_binary.pack_signs, (transpose, mean)) for mean in (False, True)]
            cases += [(ops.pack_planes, reference_binary.pack_planes, (bits, transpose, key, stream(3, "gradient"))) for bits in (1, 4) for key in (None, KEY)]
            for op, reference, rest in cases:
                with place.context():
                    got = op(place.put(x), *rest)
                for g, w in zip(got, reference(x, *rest)):
                    same(g, w, f"{op.name} {dtype} {rest}")


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 7, 300), (130, 33, 1031), (33, 130, 64), (2, 3, 0)])
def test_matmul_binary(place, m, n, k):
    a, b = (torch.randint(0, 256, (rows, -(-k // 8)), dtype=torch.uint8) for rows in (m, n))  # unused bits are set, too
    a_scales, b_scales, bias = torch.rand(m, 1), torch.rand(n, 1), torch.randn(n)
    a_scales[0] = torch.nan
    planes = torch.randint(0, 256, (3, *a.shape), dtype=torch.uint8)
    for dtype, bias in ((torch.float32, bias), (torch.bfloat16, None)):
        with place.context():
            got = ops.matmul_binary(*map(place.put, (a, b)), k, *map(place.put, (a_scales, b_scales, bias)), dtype)
            both = ops.matmul_planes(*map(place.put, (planes, b)), k, *map(place.put, (a_scales, a_scales, b_scales)), dtype)
        same(got, reference_binary.matmul_binary(a, b, k, a_scales, b_scales, bias, dtype), str(dtype))
        same(both, reference_binary.matmul_planes(planes, b, k, a_scales, a_scales, b_scales, dtype), f"planes {dtype}")


@pytest.mark.parametrize("m, rows, columns", [(1, 1, 1), (9, 21, 70), (3, 8, 64)])
def test_signs_times_floats(place, m, rows, columns):
    bits, alphas, tenants = torch.randint(0, 256, (2, rows, -(-columns // 8)), dtype=torch.uint8), torch.tensor([0.5, -2.0]), torch.randint(-1, 2, (m,))
    none, scales = torch.empty(0, dtype=torch.uint8), torch.rand(rows, 1)
    for dtype in FLOATS:
        x, base = torch.randn(m, columns).to(dtype), torch.randn(m, rows).to(dtype)
        with place.context():
            got = ops.matmul_tenants(*map(place.put, (x, base, bits, alphas)), tenants, columns)
            packed = ops.matmul_packed(*map(place.put, (x, bits[0], scales, none)), "sign", 0, columns, False, None, dtype)
            back = ops.matmul_packed(*map(place.put, (base, bits[0], scales, none)), "sign", 0, columns, True, None, dtype)
            values = ops.dequantize(*map(place.put, (bits[0], scales, none)), "sign", 0, columns, torch.float32)
        w = reference_quant.dequantize(bits[0], scales, none, "sign", 0, columns, torch.float32)
        same(values, w)
        size = x.double().abs().sum(1, keepdim=True)
        close(got, reference_binary.matmul_tenants(x, base.double(), bits, alphas, tenants, columns), (2 * size + base.abs()) * 2.0 ** -7 if dtype != torch.float32 else (2 * size + base.abs()) * (columns + 8) * 2.0 ** -23)
        for out, a, b in ((packed, x, w.t()), (back, base, w)):
            exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            close(out, exact, size * (a.shape[1] + 8) * 2.0 ** -22 + exact.abs() * torch.finfo(dtype).eps)


# --- codebook ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(1, 9))
def test_matmul_codebook(place, bits):
    for m, rows, columns in ((1, 1, 1), (4, 21, 70), (3, 70, 515), (9, 70, 21), (2, 3, 0)):
        indices = torch.randint(0, 256, (rows, -(-columns * bits // 8)), dtype=torch.uint8)
        books, groups, bias = torch.randn(3, 1 << bits), torch.randint(0, 3, (rows,)).to(torch.uint8), torch.randn(rows)
        dense = reference_codebook.values(indices, books.double(), groups, bits, columns)
        for dtype in FLOATS:
            for transpose in (False, True):
                x, w = torch.randn(m, rows if transpose else columns).to(dtype), dense if transpose else dense.t()
                with place.context():
                    got = ops.matmul_codebook(*map(place.put, (x, indices, books, groups)), bits, columns, transpose, None if transpose else place.put(bias), dtype)
                exact, size = x.double() @ w + (0 if transpose else bias), x.double().abs() @ w.abs() + (0 if transpose else bias.abs())
                rounded = 2.0 ** -8 if place.name == "triton" and dtype == torch.bfloat16 else 0  # the weight, to bf16
                close(got, exact, size * ((x.shape[1] + 8) * 2.0 ** -22 + rounded) + exact.abs() * torch.finfo(dtype).eps, f"{m} {rows} {columns} {dtype} {transpose}")


@pytest.mark.gpu
def test_codebooks_train_on_a_gpu():
    """codebook_sums and move_indices: torch there, the same indices as on the CPU."""
    gpu_place("native")  # skips without one
    indices, books, groups = torch.randint(0, 256, (9, 27), dtype=torch.uint8), torch.randn(3, 8).sort(1).values, torch.randint(0, 3, (9,)).to(torch.uint8)
    dw, rates = torch.randn(9, 70), torch.rand(9, 1)
    results = []
    for device in ("cpu", "cuda"):
        given = [t.to(device) for t in (indices, torch.zeros(9, 70, dtype=torch.int8), books, groups, dw, rates)]
        sums = ops.codebook_sums(given[4], given[0], given[3], 3, 3)
        ops.move_indices(*given, 3, KEY, 5, 0)
        results.append([t.cpu() for t in (*given[:2], sums)])
    for got, want in zip(results[1], results[0]):
        torch.testing.assert_close(got, want, rtol=1e-12 if got.is_floating_point() else 0, atol=1e-12 if got.is_floating_point() else 0)


# --- a GPU's own ------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_second_stream_and_graph():
    """A captured fused_step replays: its table of tensors is in the kernel's parameters."""
    place = gpu_place("native")
    p, g, m, v = (torch.randn(4096, device="cuda").abs() for _ in range(4))
    start = [t.clone() for t in (p, m, v)]
    scalars, key = scalars_of("adamw"), torch.tensor([1, 1])

    def step():
        ops.fused_step("adamw", [p], [], [], [g], [m, v], [], scalars, key, [0], "fp32", 0, ["fp32", "fp32"], 0)

    with place.context():
        step()
    want = [t.clone() for t in (p, m, v)]
    for t, s in zip((p, m, v), start):
        t.copy_(s)
    graph = torch.cuda.CUDAGraph()
    with gradmill.use_backend("native"), torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    for got, w in zip((p, m, v), want):
        same(got, w)


@pytest.mark.gpu
def test_wrong_device_names_the_reason():
    gpu_place("native")
    from gradmill import _C
    with pytest.raises(RuntimeError, match="cudaSetDevice for quantize failed"):
        _C.quantize(torch.cuda.device_count() + 5, 0, 16, 0, 4, (16, 16, 0, 3, 4, 4, 4), False, None, False)
    assert torch.ones(3, device="cuda").sum().item() == 3  # the error is not left behind
