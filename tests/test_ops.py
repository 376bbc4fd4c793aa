"""The registry: schemas, fake kernels, choice of backend, and the messages for bad arguments."""
import pytest
import torch
import gradmill
from gradmill import BackendError, use_backend
from gradmill.formats import FORMATS, Format
from gradmill.ops import OPS, dequantize, fake_quantize, fake_quantize_backward, fused_step, hadamard, matmul_int8, matmul_packed, pack_planes, pack_signs, project, project_back, quantize, quantize_grouped, subspace_basis
from gradmill.optim.rules import RULES
from gradmill.reference.optim import RULES as REFERENCE_RULES

from .conftest import BLOCKED, assert_same_bits, fit, key, threads

NONE = torch.empty(0, dtype=torch.uint8)


def step_arguments(param="fp32", state="fp32", rule="adamw", shape=(3, 70)):
    spec = RULES[rule]
    codes = spec.state_codes if state == "int8" else (state,) * len(spec.states)
    scalars = torch.zeros(1, 16)
    scalars[0, :8] = torch.tensor([1.0, 1, 0.1, 0.9, 0.1, 0.01, 1, 1e-8])
    blocked = Format(param).blocked
    packed = quantize(torch.randn(shape), param, 256) if blocked else None
    states, scales = [], []
    for c in codes:
        f = Format(c, 256 if Format(c).blocked else 0)
        states.append(torch.zeros(shape, dtype=f.code_dtype))
        scales.append(torch.zeros(shape[0], f.blocks(shape[1])) if f.blocked else torch.empty(0))
    return dict(rule=rule, params=[packed[0] if blocked else torch.randn(shape).to(Format(param).code_dtype)],
                param_scales=[packed[1]] if blocked else [], param_zeros=[packed[2]] if Format(param).has_zero_point else [],
                grads=[torch.randn(shape)], states=states, state_scales=scales if state == "int8" else [], scalars=scalars, key=key(1, 1), ids=[0],
                param_code=param, param_block=256 if blocked else 0, state_codes=list(codes), state_block=256)


def back_arguments(weight="fp32", left=False):
    w = quantize(torch.randn(10, 12), weight, 4) if Format(weight).blocked else (torch.randn(10, 12), None, None)
    return (*w, weight, 4 if Format(weight).blocked else 0, 12, torch.randn((3, 12) if left else (10, 3)),
            *quantize(torch.randn(3, 10 if left else 12), "uint4", 4), "uint4", 4, left, torch.ones(2), key(1, 1), 0)


def samples():
    """(op, arguments) for every op: each at least twice, with its options."""
    x, packed = torch.randn(5, 12), quantize(torch.randn(7, 12), "uint4", 4)
    for code in BLOCKED:
        yield "quantize", (x.abs(), code, 8)
        yield "dequantize", (*quantize(x.abs(), code, 8), code, 8, 12, torch.bfloat16)
    yield "quantize", (x, "e4m3", 0, False, None, 0, torch.ones(5, 1))
    (bits, means), (planes, scales, offsets) = pack_signs(x, mean=True), pack_planes(x, 3)
    yield "pack_signs", (x,)
    yield "pack_signs", (x, True, True)
    yield "pack_planes", (x, 3)
    yield "pack_planes", (x, 4, True, key(1, 2), 3)
    yield "matmul_binary", (bits, bits, 12, means, means, None, torch.float32)
    yield "matmul_binary", (bits, bits, 12, means, means, x[:, 0].contiguous(), torch.bfloat16)
    yield "matmul_binary", (bits, bits.repeat(2, 1), 12, means, means.repeat(2, 1), x[:, 0].contiguous(), torch.float32, 2)
    yield "matmul_planes", (planes, bits, 12, scales, offsets, means, torch.float32)
    yield "matmul_tenants", (x, torch.randn(5, 5), torch.stack([bits, bits]), torch.ones(2), torch.arange(5) % 2, 12)
    book = (torch.randint(0, 256, (7, 5), dtype=torch.uint8), torch.randn(2, 8), torch.arange(7, dtype=torch.uint8) % 2)
    yield "matmul_codebook", (x, *book, 3, 12, False, torch.randn(7), torch.float32)
    yield "matmul_codebook", (torch.randn(5, 7).bfloat16(), *book, 3, 12, True, None, torch.bfloat16)
    yield "codebook_sums", (torch.randn(7, 12), book[0], book[2], 2, 3)
    yield "codebook_sums", (torch.randn(7, 5), book[0], book[2], 4, 8)
    for rates in (torch.ones(7, 1), torch.zeros(7, 1)):
        yield "move_indices", (book[0], torch.zeros(7, 12, dtype=torch.int8), book[1].sort(1).values, book[2], torch.randn(7, 12), rates, 3, key(1, 2), 0, 0)
    yield "quantize", (x, "e2m1", 4, True, key(1, 2), 3, torch.ones(12, 2))
    fp8, fp4 = quantize(x, "e4m3"), quantize(torch.randn(7, 12), "e2m1", 8)
    yield "matmul_scaled", (*fp8[:2], None, "e4m3", 0, *fp4, "e2m1", 8, 12, False, torch.randn(7), torch.float32)
    yield "matmul_scaled", (torch.randn(5, 7).bfloat16(), None, None, "bf16", 0, *fp4[:2], None, "e2m1", 8, 12, True, None, torch.bfloat16)
    yield "quantize", (x, "int8", 0, True, key(1, 2), 3)
    yield "quantize_both", (x, "int8")
    yield "quantize_both", (x.bfloat16(), "e4m3", 4, key(1, 2), 3, 4)
    yield "hadamard", (x,)
    yield "hadamard", (x.bfloat16(), 8, True, key(1, 2), 3, torch.float32, True)
    steps, zeros = torch.rand(5, 3), 4 * torch.rand(5, 3)
    for dtype in (torch.float32, torch.bfloat16):
        yield "fake_quantize", (x.to(dtype), steps, zeros, 3, 4, torch.float16)
        yield "fake_quantize_backward", (torch.randn(5, 12), x.to(dtype), steps, zeros, 3, 4)
    a, sa, _ = quantize(x, "int8")
    b, sb, _ = quantize(torch.randn(7, 12), "int8")
    yield "matmul_int8", (a, b, sa, sb, None, torch.float32)
    yield "matmul_int8", (a, b, sa, sb, torch.randn(7), torch.float16)
    yield "linear_int8", (x, torch.randn(7, 12), None, "int8", True, torch.float32)
    yield "linear_int8", (x.bfloat16(), torch.randn(7, 12), torch.randn(7), "int7", False, torch.bfloat16)
    yield "linear_int8_backward", (torch.randn(5, 7), torch.randn(7, 12), *quantize(x, "int8", 0, True)[:2], "int8", key(1, 2), 3, 4, torch.float32, torch.bfloat16)
    yield "linear_int8_backward", (torch.randn(5, 7), torch.randn(7, 12), None, None, "int8", None, 0, 0, torch.float16, None)
    yield "linear_int8_backward", (torch.randn(5, 7), None, *quantize(x, "int7", 0, True)[:2], "int7", None, 0, 0, None, torch.float32)
    yield "matmul_packed", (x, *packed, "uint4", 4, 12, False, torch.randn(7), torch.float32)
    yield "matmul_packed", (torch.randn(5, 7).bfloat16(), *packed, "uint4", 4, 12, True, None, torch.bfloat16)
    image, geometry = torch.randn(2, 3, 6, 5), ([3, 2], [2, 1], [1, 0], [1, 2])
    for code in ("int8", "uint4", "bf16", "sign"):
        yield "quantize_patches", (image, *geometry, code, 4 if code == "uint4" else 0, code == "int8")
    yield "fold_patches", (torch.randn(2 * 3 * 3, 18), 2, 3, 6, 5, *geometry, torch.bfloat16)
    yield "fold_patches", (torch.randn(2 * 3 * 3, 18), 2, 3, 6, 5, *geometry, torch.float32)
    pixels = pack_signs(torch.randn(2 * 6 * 5, 3))[0]
    yield "pack_image", (image, *geometry)
    yield "pack_image", (image.bfloat16().to(memory_format=torch.channels_last), *geometry)
    yield "patch_bits", (pixels, 2, 3, 6, 5, *geometry)
    yield "patch_bits", (torch.randint(0, 256, (60, 2), dtype=torch.uint8), 2, 16, 6, 5, *geometry)
    yield "fold_kept", (torch.randn(2, 18), torch.tensor([1, 7]), pixels, 2, 3, 6, 5, *geometry, torch.bfloat16, True)
    yield "fold_kept", (torch.randn(2 * 3 * 3, 18), None, pixels, 2, 3, 6, 5, *geometry, torch.float32, False)
    yield "fold_kept", (torch.randn(2 * 3 * 3, 18), None, None, 2, 3, 6, 5, *geometry, torch.float32, True)
    yield "transpose_bits", (pixels, 3)
    yield "transpose_bits", (torch.randint(0, 256, (9, 2), dtype=torch.uint8), 11)
    dy, kept = torch.randn(2, 5, 3), torch.tensor([1, 4])
    yield "gradient_ranges", (dy, torch.rand(5))
    yield "gradient_ranges", (torch.randn(7, 5, 1), torch.rand(5))
    yield "pack_gradient", (dy, torch.rand(5), kept, 4, key(1, 2), 3)
    yield "pack_gradient", (dy, None, kept, 2)
    yield "sample_groups", (torch.rand(9), 4, torch.tensor(0.3, dtype=torch.float64))
    yield "sample_groups", (torch.zeros(3), 2, torch.tensor(0.3, dtype=torch.float64))
    offs, wide = torch.tensor([2, 2, 5], dtype=torch.int32), torch.randn(3, 7, 12)
    yield "quantize_grouped", (x, offs, "int8")
    yield "quantize_grouped", (x.bfloat16(), offs, "e4m3", 4, key(1, 2), 3, torch.ones(12, 4))
    for code in ("int8", "e4m3"):
        experts, over = [t.view(3, 7, -1) for t in quantize(wide.flatten(0, 1), code)[:2]], quantize_grouped(x, offs, code)
        yield "matmul_grouped", (*quantize(x, code)[:2], code, 0, *experts, code, 0, offs, torch.randn(3, 7), torch.bfloat16)
        yield "matmul_grouped", (*over, code, 0, *over, code, 0, offs, None, torch.float32)
    yield "matmul_grouped", (wide, None, "fp32", 0, wide, None, "fp32", 0, None, None, torch.float16)
    yield "matmul_grouped", (x, None, "fp32", 0, x, None, "fp32", 0, offs, None, torch.float32)
    yield "project", (torch.randn(9, 12), *packed, "uint4", 4, False)
    yield "project", (torch.randn(12, 9).half(), *packed, "uint4", 4, True)
    yield "project_back", back_arguments()
    yield "project_back", back_arguments("uint8", True)
    yield "project_back", (*back_arguments("uint8", True), torch.randn(10, 12), torch.randn(12), 24)
    for param, state, rule in (("fp32", "fp32", "adamw"), ("bf16", "int8", "adamw_amsgrad"), ("uint8", "int8", "lion"), ("int8", "bf16", "adamw"), ("bf16", "fp32", "sgd"), ("fp32", "int8", "diffgrad")):
        yield "fused_step", tuple(step_arguments(param, state, rule).values())
    step = step_arguments("fp32", "int8")
    yield "fused_step", tuple({**step, "params": [step["params"][0].bfloat16()], "param_zeros": [torch.zeros(3, 70, dtype=torch.uint8)], "param_code": "bf16+8",
                               "offsets": [140]}.values())
    for param, state, rule in (("fp32", "fp32", "lamb"), ("bf16", "int8", "lars")):
        yield "scaled_step", (*list(step_arguments(param, state, rule).values())[:14], 0.1, 10.0, 0.01, 1.0)
    yield "measure", ([torch.randn(3, 70), torch.randn(5)],)
    yield "measure", ([torch.randn(4100).bfloat16()], torch.ones(1, 2))
    yield "subspace_basis", (torch.randn(9, 12), None, 3, 2, False, key(1, 1), 0)
    yield "subspace_basis", (torch.randn(9, 12), torch.randn(3, 9), 3, 1, True, key(1, 1), 0)
    yield "dct", (torch.randn(9, 12), False)
    yield "dct", (torch.randn(12, 3).bfloat16(), True)


def test_there_is_a_sample_of_every_op():
    assert {name for name, _ in samples()} == set(OPS)


@pytest.mark.parametrize("index, name", [(i, name) for i, (name, _) in enumerate(samples())])
def test_opcheck(index, name):
    arguments = list(samples())[index][1]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(x, torch.Tensor) and x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for x in arguments):
        tests.remove("test_schema")  # torch's own comparison has no float8
    torch.library.opcheck(getattr(torch.ops.gradmill, name).default, arguments, test_utils=tests)


@pytest.mark.parametrize("index, name", [(i, name) for i, (name, _) in enumerate(samples())])
def test_meta_tensors_give_the_shapes_of_real_ones(index, name):
    arguments = list(samples())[index][1]
    real = OPS[name](*arguments)

    def meta(x):
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        return [meta(t) for t in x] if isinstance(x, list) else x
    fake = OPS[name](*(meta(a) for a in arguments))
    for r, f in zip(*((o if isinstance(o, tuple) else (o,)) for o in (real, fake))):
        assert r is f is None or (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_every_backend_of_every_op_gives_the_same_shapes_and_types():
    for name, arguments in samples():
        op, seen = OPS[name], []
        for backend in op.order["cpu"]:
            if op.status("cpu")[backend]:
                continue
            with use_backend(backend):
                out = op(*arguments)
            seen.append([(t.shape, t.dtype, t.is_contiguous()) for t in (out if isinstance(out, tuple) else (out,)) if t is not None])
        assert len(seen) >= 2 and all(s == seen[0] for s in seen), name


def test_ops_run_under_torch_compile_without_a_graph_break():
    def f(x, w):
        codes, scales, zeros = quantize(x, "int8")
        a, sa, _ = quantize(w, "int8")
        return matmul_int8(codes, a, scales, sa, None, torch.float32) + dequantize(codes, scales, zeros, "int8", 0, 12, torch.float32).sum()
    x, w = torch.randn(5, 12), torch.randn(7, 12)
    assert_same_bits(torch.compile(f, fullgraph=True, backend="aot_eager")(x, w), f(x, w))


# --- choice of backend ------------------------------------------------------------------------------------
def test_calls_that_torch_wants_to_see_go_through_its_dispatcher(recwarn):
    """Plain calls run the kernel directly; a mode, a transform, a trace, a profiler, a subclass or a gradient must still find the op."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    x, seen = torch.randn(4, 16), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watching():
        quantize(x, "int8")
    assert seen == ["gradmill.quantize.default"]
    with torch.profiler.profile() as profile:
        quantize(x, "int8")
    assert "gradmill::quantize" in [e.key for e in profile.key_averages()]
    assert "gradmill.hadamard.default" in [str(node.target) for node in make_fx(lambda x: hadamard(x, 16))(x).graph.nodes]
    assert "gradmill::hadamard" in str(torch.jit.trace(lambda x: hadamard(x, 16), x).graph)
    batch = torch.randn(3, 4, 16)
    assert_same_bits(torch.vmap(lambda x: hadamard(x, 16))(batch), torch.stack([hadamard(x, 16) for x in batch]))
    leaf = x.clone().requires_grad_()
    assert hadamard(leaf, 16).grad_fn is not None
    with torch.no_grad():
        assert not hadamard(leaf, 16).requires_grad
    negative = torch.randn(4, 16, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert_same_bits(hadamard(negative, 16), hadamard(negative.resolve_neg(), 16))
    assert_same_bits(hadamard(torch._efficientzerotensor(4, 16), 16), torch.zeros(4, 16))
    with pytest.raises(TypeError, match="dense"):
        hadamard(x.to_sparse(), 16)


def test_what_the_schema_does_not_allow_is_refused_by_name_and_leaves_nothing_behind():
    """Plain calls convert nothing: a block of 32.0 would be equal to 32 in every cache."""
    x = torch.randn(2, 96)
    for call, word in ((lambda: quantize(x, "int8", 24.0), "block"), (lambda: quantize(x, "int8", "24"), "block"),
                       (lambda: dequantize(None, x, x, "int8", 24, 96, torch.float32), "codes"), (lambda: quantize(x, "int8", group=24), "group"),
                       (lambda: quantize(x), "code"), (lambda: quantize(x, "int8", 24, False, None, 0, None, 1), "8")):
        with pytest.raises((RuntimeError, TypeError), match=word):
            call()
    codes, scales, zeros = quantize(x, "int8", 24)
    assert codes.shape == x.shape and scales.shape == (2, 4)
    assert_same_bits(dequantize(codes, scales, zeros, code="int8", dtype=torch.float32, block=24, columns=96), dequantize(codes, scales, zeros, "int8", 24, 96, torch.float32))


def test_native_is_the_usual_choice_on_cpu_and_use_backend_nests_and_ends():
    assert quantize.backend("cpu") == "native"
    with use_backend("reference"):
        assert quantize.backend("cpu") == "reference"
        with use_backend(None):
            assert quantize.backend("cpu") == "native"
        with pytest.raises(RuntimeError, match="boom"), use_backend("native"):
            raise RuntimeError("boom")
        assert quantize.backend("cpu") == "reference"
    assert quantize.backend("cpu") == "native"


def test_use_backend_refuses_unknown_names_and_ops_refuse_backends_they_lack():
    with pytest.raises(ValueError, match="backend is 'cudnn'.*native"):
        with use_backend("cudnn"):
            pass
    with use_backend("torch"), pytest.raises(BackendError, match="quantize has no torch backend on cpu; it has native"):
        quantize(torch.ones(1, 1), "int8")
    with use_backend("native"), pytest.raises(BackendError, match="subspace_basis has no native"):
        subspace_basis(torch.randn(4, 4), None, 2, 1, False, key(), 0)
    assert issubclass(BackendError, RuntimeError)


def test_a_forced_backend_runs_also_after_another_was_used():
    calls = []
    op, original = OPS["quantize"], OPS["quantize"].backends["reference"]
    try:
        op.backends["reference"] = lambda *a, **k: calls.append(1) or original(*a, **k)
        op._chosen.clear()
        quantize(torch.ones(1, 1), "int8")
        assert not calls
        with use_backend("reference"):
            quantize(torch.ones(1, 1), "int8")
        assert calls
    finally:
        op.backends["reference"] = original
        op._chosen.clear()


def test_use_backend_is_local_to_a_thread():
    import threading
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(quantize.backend("cpu")))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_concurrent_calls_from_python_threads_agree():
    from concurrent.futures import ThreadPoolExecutor
    xs = [torch.randn(40, 300) for _ in range(8)]
    want = [quantize(x, "uint4", 64, False, key(1, 1)) for x in xs]
    with ThreadPoolExecutor(4) as pool, threads(2):
        for _ in range(5):
            for got, w in zip(pool.map(lambda x: quantize(x, "uint4", 64, False, key(1, 1)), xs), want):
                assert_same_bits(got, w)


def test_set_isa_refuses_unknown_names_and_never_exceeds_the_processor():
    with pytest.raises(ValueError, match="portable, avx2"):
        gradmill._C.set_isa("sse9")
    assert gradmill._C.set_isa("avx512_vnni") == gradmill._C.detected_isa()


def test_rules_are_the_same_in_every_room():
    assert list(RULES) == list(REFERENCE_RULES)
    assert [(name, gradmill._C.rules[name][1]) for name in RULES] == [(name, len(rule.states)) for name, rule in RULES.items()]
    assert all(len(rule.states) == len(rule.state_codes) for rule in RULES.values())


# --- messages ---------------------------------------------------------------------------------------------
X = torch.ones(4, 6)
Q = quantize(X, "uint4", 4)
STEPS = torch.ones(4, 2)
I8, S8 = torch.ones(4, 6, dtype=torch.int8), torch.ones(4, 1)
BAD = {  # what is wrong: (op, arguments, error, what the message must say)
    "dtype": (quantize, (X.double(), "int8"), TypeError, r"gradmill.quantize: x is float64 of shape \(4, 6\) on cpu; it must be float32 or bfloat16 or float16"),
    "complex": (quantize, (X.cfloat(), "int8"), TypeError, "x is complex64"),
    "integers": (quantize, (X.int(), "int8"), TypeError, "x is int32"),
    "sparse": (quantize, (X.to_sparse(), "int8"), (TypeError, NotImplementedError), "sparse|Sparse"),
    "3-D": (quantize, (X[None], "int8"), ValueError, "x is .*it must be 2-D"),
    "1-D": (quantize, (X[0], "int8"), ValueError, "x is .*it must be 2-D"),
    "code": (quantize, (X, "int5"), ValueError, "code is 'int5'; it must be one of int8, uint8"),
    "float code": (quantize, (X, "bf16"), ValueError, "code is 'bf16'"),
    "odd block of nibbles": (quantize, (X, "int4", 3), ValueError, "block is 3.*multiple of 2 for int4"),
    "negative block": (quantize, (X, "int8", -2), ValueError, "block is -2"),
    "key dtype": (quantize, (X, "int8", 0, False, torch.zeros(2)), ValueError, r"key is float32.*int64 CPU tensor \[seed, step\]"),
    "key shape": (quantize, (X, "int8", 0, False, torch.zeros(3, dtype=torch.int64)), ValueError, "key is"),
    "codes dtype": (dequantize, (Q[0].char(), Q[1], Q[2], "uint4", 4, 6, torch.float32), TypeError, "codes is int8"),
    "codes shape": (dequantize, (Q[0], Q[1], Q[2], "uint4", 4, 8, torch.float32), ValueError, r"codes is .*of shape \(any, 4\)"),
    "scales shape": (dequantize, (Q[0], Q[1][:, :1], Q[2], "uint4", 4, 6, torch.float32), ValueError, r"scales is .*of shape \(4, 2\)"),
    "zeros missing": (dequantize, (Q[0], Q[1], NONE, "uint4", 4, 6, torch.float32), ValueError, "zeros is"),
    "out dtype": (dequantize, (*Q, "uint4", 4, 6, torch.float64), TypeError, "dtype is torch.float64"),
    "negative columns": (dequantize, (*Q, "uint4", 4, -1, torch.float32), ValueError, "columns is -1"),
    "codes not contiguous": (dequantize, (torch.ones(6, 4, dtype=torch.int8).t(), torch.ones(4, 1), NONE, "int8", 0, 6, torch.float32), ValueError, "contiguous"),
    "hadamard dtype": (hadamard, (X.double(),), TypeError, "gradmill.hadamard: x is float64"),
    "hadamard 3-D": (hadamard, (X[None],), ValueError, "hadamard: x is .*it must be 2-D"),
    "hadamard block of 1": (hadamard, (X, 1), ValueError, "block is 1; it must be a power of two from 2 to 1024"),
    "hadamard block of 24": (hadamard, (X, 24), ValueError, "block is 24"),
    "hadamard block of 2048": (hadamard, (X, 2048), ValueError, "block is 2048"),
    "hadamard negative block": (hadamard, (X, -16), ValueError, "block is -16"),
    "hadamard key": (hadamard, (X, 16, False, torch.zeros(2)), ValueError, "hadamard: key is float32"),
    "hadamard out dtype": (hadamard, (X, 16, False, None, 0, torch.int8), TypeError, "dtype is torch.int8; it must be float32, bfloat16, float16 or None"),
    "fake bits": (fake_quantize, (X, STEPS, STEPS, 1, 4, torch.float32), ValueError, "fake_quantize: bits is 1; it must be 2 to 8"),
    "fake odd block": (fake_quantize, (X, STEPS, STEPS, 4, 3, torch.float32), ValueError, "block is 3"),
    "fake dtype": (fake_quantize, (X, STEPS, STEPS, 4, 4, torch.float64), TypeError, "dtype is torch.float64"),
    "fake weight": (fake_quantize, (X.double(), STEPS, STEPS, 4, 4, torch.float32), TypeError, "weight is float64"),
    "fake steps": (fake_quantize, (X, STEPS[:, :1], STEPS, 4, 4, torch.float32), ValueError, r"steps is .*of shape \(4, 2\)"),
    "fake zeros": (fake_quantize, (X, STEPS, STEPS.half(), 4, 4, torch.float32), TypeError, "zeros is float16"),
    "fake grad": (fake_quantize_backward, (X[:2], X, STEPS, STEPS, 4, 4), ValueError, r"fake_quantize_backward: grad is .*of shape \(4, 6\)"),
    "inner size": (matmul_int8, (I8, I8[:, :4].contiguous(), S8, S8, None, torch.float32), ValueError, r"matmul_int8: b is .*of shape \(any, 6\)"),
    "a dtype": (matmul_int8, (X, I8, S8, S8, None, torch.float32), TypeError, "a is float32.*it must be int8"),
    "a scales": (matmul_int8, (I8, I8, S8[:2], S8, None, torch.float32), ValueError, "a_scales is"),
    "b scales dtype": (matmul_int8, (I8, I8, S8, S8.half(), None, torch.float32), TypeError, "b_scales is float16"),
    "bias length": (matmul_int8, (I8, I8, S8, S8, torch.ones(3), torch.float32), ValueError, r"bias is .*of shape \(4,\)"),
    "bias dtype": (matmul_int8, (I8, I8, S8, S8, torch.ones(4, dtype=torch.float64), torch.float32), TypeError, "bias is float64"),
    "transposed a": (matmul_int8, (torch.ones(6, 4, dtype=torch.int8).t(), I8, S8, S8, None, torch.float32), ValueError, "a is .*contiguous"),
    "x columns": (matmul_packed, (X[:, :5], *Q, "uint4", 4, 6, False, None, torch.float32), ValueError, r"x is .*of shape \(any, 6\)"),
    "x rows": (matmul_packed, (X, *Q, "uint4", 4, 6, True, None, torch.float32), ValueError, r"x is .*of shape \(any, 4\)"),
    "grad side": (project, (X, *Q, "uint4", 4, True), ValueError, "basis codes is"),
    "grad dtype": (project, (X.double(), *Q, "uint4", 4, False), TypeError, "grad is float64"),
    "rank": (subspace_basis, (X, None, 5, 1, False, key(), 0), ValueError, "rank is 5; it must be 1 to 4"),
    "rank zero": (subspace_basis, (X, None, 0, 1, False, key(), 0), ValueError, "rank is 0"),
    "iterations": (subspace_basis, (X, None, 2, 0, False, key(), 0), ValueError, "iterations is 0"),
    "previous": (subspace_basis, (X, torch.ones(2, 4), 2, 1, False, key(), 0), ValueError, r"previous is .*of shape \(2, 6\)"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_arguments_are_refused_by_name(wrong):
    op, arguments, error, message = BAD[wrong]
    with pytest.raises(error, match=message):
        op(*arguments)


def changed_step(**changes):
    arguments = step_arguments("uint8", "int8")
    arguments.update({k: v(arguments) if callable(v) else v for k, v in changes.items()})
    return arguments


@pytest.mark.parametrize("changes, error, message", [
    (dict(rule="sgdx"), ValueError, "rule is 'sgdx'; it must be one of adamw"),
    (dict(param_code="int3"), ValueError, "int3"),
    (dict(grads=[]), ValueError, r"len\(grads\) is 0"),
    (dict(ids=[0, 1]), ValueError, r"len\(ids\) is 2"),
    (dict(states=lambda a: a["states"][:1]), ValueError, r"len\(states\) is 1"),
    (dict(state_scales=[]), ValueError, r"len\(state_scales\) is 0"),
    (dict(scalars=torch.zeros(16)), ValueError, "scalars is"),
    (dict(scalars=torch.zeros(2, 16)), ValueError, "scalars is"),
    (dict(scalars=torch.zeros(1, 16, dtype=torch.float64)), ValueError, "scalars is"),
    (dict(key=torch.zeros(2)), ValueError, "key is"),
    (dict(grads=[torch.ones(3, 70, dtype=torch.float64)]), TypeError, r"grads\[0\] is float64"),
    (dict(grads=[torch.ones(3, 71)]), ValueError, r"params\[0\]"),
    (dict(params=lambda a: [a["params"][0].char()]), TypeError, r"params\[0\] is int8"),
    (dict(param_scales=lambda a: [a["param_scales"][0][:2]]), ValueError, r"params_scales\[0\]|param_scales\[0\]"),
    (dict(param_zeros=lambda a: [a["param_zeros"][0].int()]), ValueError, r"zeros\[0\]"),
    (dict(states=lambda a: [a["states"][0], a["states"][1][:, :69]]), ValueError, r"states\[1\]"),
    (dict(states=lambda a: [a["states"][0].float(), a["states"][1]]), TypeError, r"states\[0\]"),
    (dict(state_block=96), ValueError, "blocks"),
    (dict(offsets=[0, 0]), ValueError, r"len\(offsets\) is 2"),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_a_step_refuses_bad_arguments_by_name(changes, error, message):
    arguments = changed_step(**changes)
    before = [t.clone() for t in arguments["params"]]
    with pytest.raises(error, match=message):
        fused_step(**arguments)
    assert_same_bits(arguments["params"], before)


@pytest.mark.parametrize("position, value, error, message", [
    (3, "square8", ValueError, "weight_code is 'square8'"), (3, "nonsense", ValueError, "nonsense"), (6, torch.ones(10, 4), ValueError, "basis|update"),
    (6, torch.ones(9, 3), ValueError, "update"), (6, torch.ones(10, 3).double(), TypeError, "update is float64"), (13, torch.ones(3), ValueError, "scalars"),
    (13, torch.ones(2).double(), ValueError, "scalars"), (14, torch.ones(2), ValueError, "key"), (0, torch.ones(12, 10).t(), ValueError, "weight is .*contiguous"),
    (0, torch.ones(10, 12).double(), TypeError, "weight"), (16, torch.ones(10, 12), ValueError, "residual_scales"),
    (17, torch.ones(12), ValueError, "residual_scales"), (slice(16, 18), (torch.ones(10, 11), torch.ones(10)), ValueError, "residual is .*10, 11"),
    (slice(16, 18), (torch.ones(10, 12), torch.ones(12)), ValueError, "residual_scales is .*12"),
    (slice(16, 18), (torch.ones(10, 12).int(), torch.ones(10)), TypeError, "residual"),
])
def test_project_back_refuses_bad_arguments_by_name(position, value, error, message):
    arguments = [*back_arguments(), None, None]
    arguments[position] = value
    with pytest.raises(error, match=message):
        project_back(*arguments)


# --- formats ----------------------------------------------------------------------------------------------
def test_formats_say_what_they_store():
    assert Format("uint4", 256).bits == 4 and Format("bf16").bits == 16 and not Format("fp32").blocked
    assert Format("int4").code_columns(7) == 4 and Format("int8", 4).blocks(9) == 3 and Format("int8").blocks(9) == 1
    assert Format("int8").blocks(0) == 1 and Format("int8", 4).blocks(0) == 0  # an empty row keeps its one whole-row scale
    for bad in (("int5", 0), ("int8", -1), ("uint4", 5), ("uint3", 12), ("int2", 6), ("int4_outlier", 258)):
        with pytest.raises(ValueError, match="code is|block is"):
            Format(*bad)
    with pytest.raises(ValueError, match="format is 'int9'.*int8_row"):
        gradmill.formats.get("int9")
    assert gradmill.formats.get("int4") is FORMATS["int4"]


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 256), (2, 257), (0, 4), (4, 0)])
def test_nbytes_counts_what_quantize_returns(rows, columns):
    for code in BLOCKED:
        for block in {fit(code, b) for b in (0, 4, 256)}:
            stored = quantize(torch.ones(rows, columns), code, block)
            assert Format(code, block).nbytes(rows, columns) == sum(t.nbytes for t in stored), f"{code} {block}"
