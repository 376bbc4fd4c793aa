"""Ahead-of-time compilation of every kernel, without a GPU: that it compiles, and to what.

    python -m gradmill.kernels.aot [name part]

prints for each kernel and target the registers, shared memory and spills (NVIDIA) and the matrix instructions found in
the assembly. tests/test_triton.py compiles the same variants and asserts the instruction each was written for.
A process with TRITON_INTERPRET=1 cannot compile.
"""
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradmill.formats import CODES
from gradmill.kernels import binary, codebook, grouped, matmul, optim, projection, quant, tiles
from gradmill.kernels._common import INTERPRETING, warps_for
from gradmill.optim.rules import RULES

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_89": GPUTarget("cuda", 89, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}

#: Shared memory a program may have, in bytes. A core has 1 KiB more on NVIDIA, and takes 1 KiB of it for each program.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

#: What a matrix instruction looks like in PTX or AMD assembly.
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma_", "fma": r"\bfma\.rn\.f32|v_(pk_)?fma|v_fmac"}

#: The one a 16-bit or FP8 dot becomes.
MATRIX = {"sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@dataclass(frozen=True)
class Variant:
    """One kernel with the types and constants of one representative call."""

    name: str
    kernel: object
    types: dict            # argument -> Triton type, for those that are not i32
    constants: dict        # constexpr arguments, and arguments specialised to a value
    instruction: dict = field(default_factory=dict)  # target -> key of INSTRUCTIONS, or absent: no matrix instruction
    warps: int = 4
    stages: int = 3
    programs: int = 1      # that a core is to hold at a time
    row: bool = False      # of kernels/tiles.json: must not spill, and that many programs must fit
    exact: bool = True     # launched with enable_fp_fusion=False
    odd: tuple = ()        # arguments not known to be divisible by 16
    only: str = ""         # the one target it is for; "" for all
    everywhere: bool = True    # the tests compile it for every target, else for sm_90 only
    elementwise: bool = False  # bit-equal arithmetic only: no fma, no flushed denormals, IEEE division and root


def compile(variant: Variant, target: str):
    """The compiled kernel: .asm["ptx"] or .asm["amdgcn"], .metadata."""
    if INTERPRETING:
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET=1")
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types.get(n, "i32") for n in names}
    unspecialised = set(getattr(variant.kernel, "do_not_specialize", None) or ()) | set(variant.odd)
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr" and n not in unspecialised}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": 2 if target == "gfx942" and variant.stages > 2 else variant.stages,
               "enable_fp_fusion": not variant.exact}
    return triton.compile(source, target=TARGETS[target], options=options)


def assembly(compiled) -> str:
    return compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]


def found(compiled) -> list[str]:
    """Keys of INSTRUCTIONS that occur in the assembly."""
    text = assembly(compiled)
    return [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, text)]


def variants():
    """Every kernel, with signatures and constants as the host functions launch them."""
    yield from _quant()
    yield from _optim()
    yield from _table()
    yield from _matmul_int8()
    yield from _matmul_fp8()
    yield from _matmul_packed()
    yield from _grouped()
    yield from _projection()
    yield from _binary()
    yield from _codebook()


def _quant():
    key = {n: "i32" for n in ("seed_low", "seed_high", "step", "stream")}
    packed = {"codes": "*u8", "scales": "*fp32", "zeros": "*u8"}
    for code, dtype, stochastic, across, loop, p2, given in (
            ("int8", "bf16", False, False, False, 4096, False), ("int8", "bf16", True, True, True, 256, False),
            ("uint8", "fp32", True, False, False, 256, False), ("int4", "fp32", False, False, False, 128, False),
            ("uint4", "fp16", True, False, True, 4096, False), ("moment8", "fp32", False, False, False, 256, False),
            ("square8", "fp32", True, False, False, 256, False), ("e4m3", "bf16", False, False, True, 4096, True),
            ("e5m2", "bf16", True, True, True, 128, False), ("e2m1", "bf16", True, False, False, 16, True),
            ("int7", "fp16", False, False, False, 4096, False), ("uint2", "fp32", False, False, False, 64, False),
            ("int2", "fp32", True, False, False, 64, False)):
        runs = quant.ACROSS if across else max(1, quant.TILE // p2)
        yield Variant(f"quantize {dtype} to {code}{' stochastic' * stochastic}{' transposed' * across}{' long' * loop}{' given scales' * given}", quant.quantize_kernel,
                      {**key, **packed, "codes": "*i8" if code in ("int8", "int7") else "*u8", "x": "*i16" if dtype == "bf16" else f"*{dtype}"},
                      {"CODE": CODES[code], "GIVEN": given, "STOCHASTIC": stochastic, "ALIGNED": code != "uint4", "ACROSS_ROWS": across, "LOOP": loop,
                       "NB": runs, "P2": p2, ("stride_row" if across else "stride_column"): 1}, warps=warps_for(runs * p2),
                      everywhere=code in ("uint8", "e4m3"), elementwise=True)
    for code, dtype, block, stochastic, contiguous in (("int8", "bf16", 0, False, "stride_column"), ("e4m3", "bf16", 128, True, "stride_column"), ("int8", "fp32", 32, True, "stride_row")):
        side, x = max(quant.SQUARE, block // 2), "*i16" if dtype == "bf16" else f"*{dtype}"
        yield Variant(f"quantize_both {dtype} to {code}, {f'blocks of {block}' if block else 'whole rows'}{' stochastic' * stochastic}", quant.both_kernel,
                      {**key, "turned_stream": "i32", "x": x, "most": "*i32", "scales": "*fp32", "turned_scales": "*fp32", **dict.fromkeys(("codes", "turned"), "*i8" if code == "int8" else "*u8")},
                      {"CODE": CODES[code], "BLOCK": block, "STOCHASTIC": stochastic, "ALIGNED": True, "TURNED_ALIGNED": block != 32, "SIDE": side, contiguous: 1},
                      warps=warps_for(side * side), everywhere=block == 128, elementwise=True)
        if not block:
            yield Variant(f"quantize_both {dtype}, magnitudes", quant.most_kernel, {"x": x, "most": "*i32"}, {"SIDE": side, contiguous: 1}, warps=warps_for(side * side),
                          everywhere=False, elementwise=True)
    for code, out in (("int8", "bf16"), ("uint4", "fp32"), ("int4", "fp16"), ("moment8", "fp32"), ("square8", "bf16"), ("e4m3", "bf16"),
                      ("e5m2", "fp32"), ("e2m1", "bf16"), ("int7", "fp32"), ("uint2", "bf16"), ("int2", "fp16")):
        yield Variant(f"dequantize {code} to {out}", quant.dequantize_kernel,
                      {**packed, "codes": "*i8" if code in ("int8", "int7") else "*u8", "out": f"*{out}"},
                      {"CODE": CODES[code], "OUT": CODES[out], "NB": 16, "P2": 256, "pieces": 1}, warps=8, everywhere=code in ("uint4", "e2m1"), elementwise=True)
    for weight, grad, out, backward, bits in (("fp32", "fp32", "bf16", False, 4), ("bf16", "bf16", "fp16", False, 2), ("fp32", "bf16", "fp32", True, 3),
                                              ("fp16", "fp32", "fp16", True, 2)):
        yield Variant(f"fake_quantize{'_backward' * backward} {weight} {grad} {out}", quant.fake_kernel,
                      {"weight": f"*{weight}", "grad": f"*{grad}", "out": f"*{out}", **dict.fromkeys(("steps", "zeros", "dsteps", "dzeros"), "*fp32")},
                      {"TOP": 2.0 ** bits - 1, "W": CODES[weight], "G": CODES[grad], "OUT": CODES[out], "BACKWARD": backward, "NB": quant.GROUPS},
                      everywhere=weight == "fp32", elementwise=True)

    for x, out, block, random, inverse, tail, across in (("fp32", "fp32", 16, True, False, False, False), ("bf16", "bf16", 16, True, False, True, True),
                                                         ("fp16", "fp32", 1024, False, False, True, False), ("fp32", "fp16", 1024, True, True, False, True),
                                                         ("bf16", "fp32", 2, True, True, False, False)):
        runs, p2 = quant.hadamard_tile(4096, 4096, block, across)
        yield Variant(f"hadamard {block} {x} to {out}{' random' * random}{' inverse' * inverse}{' tail' * tail}{' transposed' * across}",
                      quant.hadamard_kernel, {**key, "x": "*i16" if x == "bf16" else f"*{x}", "out": f"*{out}"},
                      {"BLOCK": block, "LOG": block.bit_length() - 1, "OUT": CODES[out], "RANDOM": random, "INVERSE": inverse, "TAIL": tail,
                       "ACROSS_ROWS": across, "NB": runs, "P2": p2, ("stride_row" if across else "stride_column"): 1},
                      warps=warps_for(runs * p2), everywhere=block == 16, elementwise=True)


def _optim():
    for rule in optim.RULES:
        count = len(RULES[rule].states)
        for param, grad, states, p_split, s_split, loop in (
                ("fp32", "fp32", ("fp32",) * 3, False, False, False), ("bf16", "bf16", ("moment8", "square8", "square8"), False, False, False),
                ("uint8", "bf16", ("moment8", "square8", "square8"), False, False, False), ("int8", "fp32", ("bf16", "fp16", "fp32"), False, False, True),
                ("delta", "fp32", ("moment8", "square8", "square8"), False, False, False), ("int4", "fp16", ("moment8",) * 3, False, True, False),
                ("e4m3", "bf16", ("e4m3", "square8", "square8"), False, False, False),
                ("bf16+8", "bf16", ("moment4", "square4", "square4"), False, False, False), ("fp16+16", "fp16", ("e4m3", "square8", "square8"), False, False, True),
                ("fp16+8", "fp32", ("fp32",) * 3, False, False, False), ("bf16+16", "fp32", ("fp32",) * 3, False, False, False)):
            if rule != "adamw" and param not in ("bf16", "uint8"):
                continue  # formats and rules do not meet: all formats once, all rules twice
            states = RULES[rule].state_codes if states[0] == "moment8" and param != "int4" else states[:count]
            codes = [CODES[c] for c in states] + [-1] * (3 - count)
            plain = param in ("fp32", "bf16", "delta") and not s_split and not {"moment8", "square8"} & set(states)
            p2 = optim.TILE if plain or loop else 256
            yield Variant(f"fused_step {rule} {param} {'/'.join(states) or 'no states'}{' long' * loop}{' split' * s_split}", optim.step_kernel,
                          {"table": "*i64"},
                          {"RULE": rule, "P": CODES[param], "G": CODES[grad], "S0": codes[0], "S1": codes[1], "S2": codes[2], "P_SPLIT": p_split,
                           "S_SPLIT": s_split, "LOOP": loop, "ALIGNED": True, "NB": 1 if loop else optim.TILE // p2, "P2": p2, "TILES": optim.TILES},
                          warps=8, odd=("tensors",), everywhere=rule == "adamw" and param in ("fp32", "uint8"), elementwise=True)
    for dtype in ("fp32", "bf16", "fp16"):
        yield Variant(f"measure {dtype}", optim.measure_kernel, {"table": "*i64", "partials": "*fp64"}, {"CODE": CODES[dtype], "NB": optim.CHUNKS},
                      odd=("tensors",), everywhere=dtype == "bf16", elementwise=True)
    yield Variant("measure totals", optim.measure_total_kernel, {"table": "*i64", "partials": "*fp64", "out": "*fp64"}, {}, warps=1, elementwise=True)


#: Where an int8 dot becomes a matrix instruction; on sm_100 Triton 3.6 takes mma.sync.
INT8_MATRIX = MATRIX if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else {t: i for t, i in MATRIX.items() if t != "sm_100"}


def _of(tile) -> tuple[dict, dict]:
    """The constants and the other arguments that a Variant has from its tile."""
    return {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group}, {"warps": tile.warps, "stages": tile.stages, "programs": tile.programs}


def int8_product(name, target, tile, out="bf16", bias=False, even=True, long=False, everywhere=True) -> Variant:
    constants, rest = _of(tile._replace(bm=64, bn=64, warps=4) if long else tile)
    return Variant(name, matmul.int8_kernel, {"a": "*i8", "b": "*i8", "a_scales": "*fp32", "b_scales": "*fp32", "bias": "*fp32", "out": f"*{out}"},
                   {"OUT": CODES[out], "HAS_BIAS": bias, "EVEN_K": even, "LONG": long, "EXACT": matmul.EXACT_K, **constants},
                   {t: i for t, i in INT8_MATRIX.items() if t == target}, only=target, everywhere=everywhere, **rest)


def fp8_product(name, target, tile, a="e4m3", b="e4m3", out="bf16", bias=False, even=True, blocked=False, everywhere=True) -> Variant:
    constants, rest = _of(tile)
    return Variant(name, matmul.fp8_kernel, {"a": "*u8", "b": "*u8", "a_scales": "*fp32", "b_scales": "*fp32", "bias": "*fp32", "out": f"*{out}"},
                   {"A": CODES[a], "B": CODES[b], "OUT": CODES[out], "HAS_BIAS": bias, "EVEN_K": even, "BLOCKED": blocked, "NATIVE": target != "sm_80", **constants},
                   {target: MATRIX[target]}, exact=False, only=target, everywhere=everywhere, **rest)


def packed_product(name, target, tile, x="bf16", code="uint4", transpose=False, per_row=True, everywhere=True) -> Variant:
    constants, rest = _of(tile)
    return Variant(name, matmul.packed_kernel,
                   {"x": f"*{x}", "codes": "*i8" if code in ("int8", "int7") else "*u8", "scales": "*fp32", "zeros": "*u8", "bias": "*fp32", "out": f"*{x}"},
                   {"CODE": CODES[code], "X": CODES[x], "OUT": CODES[x], "HAS_BIAS": False, "TRANSPOSE": transpose, "PER_ROW": per_row,
                    "FACTOR": per_row and not transpose, "stride_xk": 1, "stride_on": 1, **constants},
                   {} if x == "fp32" else {target: MATRIX[target]}, only=target, everywhere=everywhere, **rest)


#: format of the table -> the variant that bench/tiles.py tries a tile with.
PRODUCTS = {"int8": int8_product, "fp8": fp8_product, "fp8_block": lambda name, target, tile: fp8_product(name, target, tile, blocked=True), "packed": packed_product}


def _table():
    """What kernels/tiles.json has for each shape class, in the commonest types."""
    for target in TARGETS:
        for format, product in PRODUCTS.items():
            for shape, row in tiles.TABLE[target][format].items():
                yield replace(product(f"tiles {format} {shape}", target, tiles.Tile(*row)), row=target != "gfx942", everywhere=shape == "large")


def _matmul_int8():
    for m, out, bias, even, long in ((4096, "bf16", True, True, False), (64, "fp32", False, False, False), (4096, "fp16", False, False, True)):
        for target in TARGETS:
            yield int8_product(f"matmul_int8 m {m} {out}{' long' * long}", target, tiles.choose("int8", target, m, 4096), out, bias, even, long, m == 4096 and not long)
    yield Variant("matmul_int8 epilogue", matmul.epilogue_kernel, {"sums": "*i32", "a_scales": "*fp32", "b_scales": "*fp32", "bias": "*fp32", "out": "*bf16"},
                  {"OUT": CODES["bf16"], "HAS_BIAS": True, "BM": 16, "BN": 256}, warps=8, everywhere=False, elementwise=True)


def _matmul_fp8():
    for a, b, m, out, bias, even, blocked in (("e4m3", "e4m3", 4096, "bf16", True, True, False), ("e5m2", "e4m3", 64, "fp32", False, False, False),
                                              ("e4m3", "e4m3", 4096, "bf16", False, True, True), ("e4m3", "e5m2", 4096, "fp32", False, False, True)):
        for target in TARGETS:
            yield fp8_product(f"matmul_scaled {a} x {b} m {m} {out}{' blocked' * blocked}", target,
                              tiles.choose("fp8_block" if blocked else "fp8", target, m, 4096), a, b, out, bias, even, blocked, a == b)


def _matmul_packed():
    for code, x, m, transpose, per_row in (("int8", "bf16", 4096, False, True), ("uint4", "bf16", 16, False, True), ("uint8", "bf16", 4096, True, True),
                                           ("int4", "fp16", 4096, False, True), ("uint4", "fp16", 4096, True, True), ("uint8", "fp32", 4096, False, True),
                                           ("uint4", "bf16", 64, False, False), ("e4m3", "bf16", 4096, False, True), ("uint2", "bf16", 16, False, True)):
        for target in TARGETS:
            yield packed_product(f"matmul_packed {x} x {code}{' transposed' * transpose} m {m}{'' if per_row else ' gathered scales'}", target,
                                 tiles.choose("fp32" if x == "fp32" else "packed" if per_row else "gather", target, m, 4096), x, code, transpose, per_row,
                                 x == "bf16" and m != 4096 or transpose)


def _grouped():
    key = {n: "i32" for n in ("seed_low", "seed_high", "step", "stream")}
    for code, x, whole, given, stochastic in (("int8", "bf16", True, False, False), ("e4m3", "bf16", False, False, True), ("e5m2", "fp32", True, True, False)):
        yield Variant(f"quantize_grouped {x} to {code}{' stochastic' * stochastic}{' given scales' * given}", grouped.quantize_kernel,
                      {**key, "x": "*i16" if x == "bf16" else f"*{x}", "offs": "*i32", "codes": "*i8" if code == "int8" else "*u8", "scales": "*fp32"},
                      {"CODE": CODES[code], "WHOLE": whole, "GIVEN": given, "STOCHASTIC": stochastic, "NB": quant.ACROSS, "P2": 128, "E2": 16, "stride_row": 1},
                      warps=warps_for(quant.ACROSS * 128), odd=("experts", "tokens"), everywhere=code == "int8", elementwise=True)
    for code, form, blocked in (("int8", "ROWS", False), ("int8", "SUMMED", False), ("e4m3", "ROWS", False), ("e4m3", "SUMMED", True), ("e4m3", "EQUAL", False)):
        for target in TARGETS:
            int8 = code == "int8"
            bm, bn, bk, _, warps, stages, _ = tiles.choose("int8" if int8 else "fp8_block" if blocked else "fp8", target, 4096, 4096)
            bn = grouped.grouped_width(bn, form == "SUMMED", blocked)
            yield Variant(f"matmul_grouped {code} {form.lower()}{' blocked' * blocked}", grouped.matmul_kernel,
                          {"a": "*i8" if int8 else "*u8", "b": "*i8" if int8 else "*u8", "a_scales": "*fp32", "b_scales": "*fp32", "bias": "*fp32", "out": "*i16",
                           "offs": "*i32"},
                          {"A": CODES[code], "B": CODES[code], "FORM": getattr(grouped, form).value, "INT8": int8, "OUT": CODES["bf16"], "HAS_BIAS": form == "ROWS",
                           "EVEN_K": form != "SUMMED", "LONG": False, "EXACT": matmul.EXACT_K, "BLOCKED": blocked, "NATIVE": not int8 and target != "sm_80",
                           "BM": bm, "BN": bn, "BK": bk, "E2": 16},
                          {target: MATRIX[target]} if not int8 or target in INT8_MATRIX else {}, warps=warps, stages=stages, exact=int8, odd=("experts", "tokens"),
                          only=target, everywhere=form == "ROWS")


def _projection():
    for weight, code, left, loop, residual in (("uint8", "uint4", False, False, None), ("bf16", "uint4", True, False, "bf16"),
                                               ("int8", "int8", False, True, "fp32"), ("uint4", "uint4", True, False, None)):
        for target in TARGETS:
            plain = weight in ("fp32", "bf16", "fp16")
            p2 = projection.WIDEST // 2 if plain else projection.WIDEST
            precision = "ieee" if target == "gfx942" else "tf32x3"
            yield Variant(f"project_back {weight} from {code}{' left' * left}{' long' * loop}{' + residual' if residual else ''}", projection.back_kernel,
                          {"weight": "*i16" if plain else "*i8" if weight == "int8" else "*u8", "weight_scales": "*fp32", "weight_zeros": "*u8", "update": "*fp32",
                           "codes": "*i8" if code in ("int8", "int7") else "*u8", "scales": "*fp32", "zeros": "*u8",
                           "residual": "*i16" if residual == "bf16" else "*fp32", "residual_scales": "*fp32", "decay": "fp32", "alpha": "fp32"},
                          {"W": CODES[weight], "CODE": CODES[code], "R": CODES[residual] if residual else -1, "LEFT": left, "PER_ROW": True, "LOOP": loop, "ALIGNED": True, "PRECISION": precision,
                           "BM": projection.ROWS, "KB": 1, "P2": p2, "BK": projection.DEPTH},
                          {target: "mfma" if target == "gfx942" else "mma.sync"}, warps=8 if p2 > 128 else 4, stages=2, odd=("decay", "alpha"), only=target, everywhere=weight == "uint8")


def _binary():
    for planes, mean, random, x in ((0, True, False, "fp32"), (0, False, False, "bf16"), (4, False, True, "fp32"), (2, False, False, "fp16")):
        yield Variant(f"pack_bits {x} {planes or 'signs'}{' mean' * mean}{' stochastic' * random}", binary.pack_kernel,
                      {"x": "*i16" if x == "bf16" else f"*{x}", "out": "*u8", "scales": "*fp32", "offsets": "*fp32"},
                      {"PLANES": planes, "MEAN": mean, "RANDOM": random, "WIDTH": binary.WIDTH}, everywhere=random, elementwise=True)
    for planes, m, out, bias in ((0, 4096, "bf16", True), (4, 4096, "fp32", False), (0, 64, "fp32", False)):
        for target in TARGETS:
            constants, rest = _of(tiles.choose("binary", target, m, 4096))
            yield Variant(f"matmul_binary m {m} {planes or 'signs'}", binary.binary_kernel,
                          {"a": "*u8", "b": "*u8", "a_scales": "*fp32", "offsets": "*fp32", "b_scales": "*fp32", "bias": "*fp32", "out": f"*{out}"},
                          {"PLANES": planes, "OUT": CODES[out], "HAS_BIAS": bias, **constants},
                          {target: MATRIX[target]} if target != "sm_100" else {}, **rest, only=target, everywhere=m == 4096)

    for x in ("fp32", "bf16"):
        yield Variant(f"matmul_tenants {x}", binary.tenants_kernel, {"x": f"*{'i16' if x == 'bf16' else x}", "base": f"*{'i16' if x == 'bf16' else x}", "bits": "*u8",
                                                                      "alphas": "*fp32", "tenants": "*i64", "out": f"*{x}"},
                      {"OUT": CODES[x], "BN": 64, "BK": 16}, everywhere=x == "fp32")


def _codebook():
    for bits, x, m, transpose in ((4, "bf16", 16, False), (3, "fp32", 4096, False), (8, "fp16", 4096, True), (5, "bf16", 4096, True), (1, "fp32", 16, False)):
        for target in TARGETS:
            constants, rest = _of(tiles.choose("fp32" if x == "fp32" else "gather", target, m, 4096))
            yield Variant(f"matmul_codebook {x} {bits} bits{' transposed' * transpose} m {m}", codebook.codebook_kernel,
                          {"x": f"*{x}", "indices": "*u8", "codebooks": "*fp32", "row_groups": "*u8", "bias": "*fp32", "out": f"*{x}"},
                          {"BITS": bits, "X": CODES[x], "OUT": CODES[x], "HAS_BIAS": m == 16, "TRANSPOSE": transpose, "stride_xk": 1, **constants},
                          {} if x == "fp32" else {target: MATRIX[target]}, **rest, odd=("bytes",), only=target, everywhere=x == "bf16")


def usage(compiled, target: str) -> dict[str, int]:
    """registers of a thread, stack (spilled bytes of a thread; gfx942: spilled registers) and shared memory; -1 for what the target's tools do not say."""
    if target == "gfx942":
        text, patterns = assembly(compiled), {"registers": r"\.vgpr_count:\s+(\d+)", "stack": r"\.vgpr_spill_count:\s+(\d+)"}
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        patterns = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)"}
    said = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {**{name: int(match[1]) if match else -1 for name, match in said.items()}, "shared": compiled.metadata.shared}


def resident(used: dict[str, int], warps: int, target: str) -> int:
    """Programs that a core holds at a time, by registers (64 K), threads and shared memory."""
    if target == "gfx942":
        return max(1, min(512 // max(used["registers"], 1) * 4 // warps, SHARED[target] // max(used["shared"], 1)))
    threads, registers = 32 * warps, -(-max(used["registers"], 1) // 8) * 8
    return min((1 << 16) // (registers * threads), (1536 if target == "sm_89" else 2048) // threads, (SHARED[target] + 1024) // (used["shared"] + 1024))


def misfit(variant: Variant, target: str) -> tuple[str, dict[str, int]]:
    """Why a tile of the table must not be launched there, or "", and what it uses."""
    compiled = compile(variant, target)
    used, want = usage(compiled, target), variant.instruction.get(target)
    if used["shared"] > SHARED[target]:
        return f"{used['shared']} bytes of shared memory, more than {SHARED[target]}", used
    if used["stack"] > 0:
        return f"spills: {used['stack']} {'registers' if target == 'gfx942' else 'bytes'}", used
    if want is not None and want not in found(compiled):
        return f"no {want}", used
    if resident(used, variant.warps, target) < variant.programs:
        return f"a core holds {resident(used, variant.warps, target)} programs, not {variant.programs}", used
    return "", used


def main(part: str = ""):
    for variant in variants():
        if part not in variant.name:
            continue
        for target in TARGETS:
            if variant.only not in ("", target):
                continue
            compiled = compile(variant, target)
            names = [n for n in found(compiled) if n != "fma"]
            want = variant.instruction.get(target)
            used = " ".join(f"{name} {count:>6}" for name, count in usage(compiled, target).items())
            print(f"{variant.name:58} {target:7} warps {variant.warps:2} {used}  {', '.join(names) or '-'}{'' if want is None or want in names else f'  WANTED {want}'}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
