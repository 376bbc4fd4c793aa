"""Ahead-of-time compilation of every kernel, without a GPU: that it compiles, and to what.

    python -m gradmill.kernels.aot [name part]

prints for each kernel and target the registers, shared memory and spills (NVIDIA) and the matrix instructions found in
the assembly. tests/test_triton.py compiles the same variants and asserts the instruction each was written for.
A process with TRITON_INTERPRET=1 cannot compile.
"""
from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradmill.formats import CODES
from gradmill.kernels import matmul, optim, projection, quant
from gradmill.kernels._common import INTERPRETING, warps_for

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}

#: What a matrix instruction looks like in PTX or AMD assembly.
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma_", "fma": r"\bfma\.rn\.f32|v_(pk_)?fma|v_fmac"}


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
    exact: bool = True     # launched with enable_fp_fusion=False
    odd: tuple = ()        # i32 arguments not known to be divisible by 16


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
    yield from matmul.aot_variants(Variant)
    yield from projection.aot_variants(Variant)


def _quant():
    key = {n: "i32" for n in ("seed_low", "seed_high", "step", "stream")}
    packed = {"codes": "*u8", "scales": "*fp32", "zeros": "*u8"}
    for code, dtype, stochastic, across, loop, p2 in (("int8", "bf16", False, False, False, 4096), ("int8", "bf16", True, True, True, 256),
                                                      ("uint8", "fp32", True, False, False, 256), ("int4", "fp32", False, False, False, 128),
                                                      ("uint4", "fp16", True, False, True, 4096), ("moment8", "fp32", False, False, False, 256),
                                                      ("square8", "fp32", True, False, False, 256)):
        runs = quant.ACROSS if across else max(1, quant.TILE // p2)
        yield Variant(f"quantize {dtype} to {code}{' stochastic' * stochastic}{' transposed' * across}{' long' * loop}", quant.quantize_kernel,
                      {**key, **packed, "codes": "*i8" if code == "int8" else "*u8", "x": "*i16" if dtype == "bf16" else f"*{dtype}"},
                      {"CODE": CODES[code], "STOCHASTIC": stochastic, "ALIGNED": code != "uint4", "ACROSS_ROWS": across, "LOOP": loop,
                       "NB": runs, "P2": p2, ("stride_row" if across else "stride_column"): 1}, warps=warps_for(runs * p2))
    for code, out in (("int8", "bf16"), ("uint4", "fp32"), ("int4", "fp16"), ("moment8", "fp32"), ("square8", "bf16")):
        yield Variant(f"dequantize {code} to {out}", quant.dequantize_kernel,
                      {**packed, "codes": "*i8" if code == "int8" else "*u8", "out": f"*{out}"},
                      {"CODE": CODES[code], "OUT": CODES[out], "NB": 16, "P2": 256, "pieces": 1}, warps=8)


def _optim():
    for rule in optim.RULES:
        count = 3 if rule == "adamw_amsgrad" else 2
        for param, grad, states, p_split, s_split, loop in (
                ("fp32", "fp32", ("fp32",) * 3, False, False, False), ("bf16", "bf16", ("moment8", "square8", "square8"), False, False, False),
                ("uint8", "bf16", ("moment8", "square8", "square8"), False, False, False), ("int8", "fp32", ("bf16", "fp16", "fp32"), False, False, True),
                ("delta", "fp32", ("moment8", "square8", "square8"), False, False, False), ("int4", "fp16", ("moment8",) * 3, False, True, False)):
            codes = [CODES[c] for c in states[:count]] + [-1] * (3 - count)
            plain = param in ("fp32", "bf16", "delta") and not s_split and states[0] == "fp32"
            p2 = optim.TILE if plain or loop else 256
            yield Variant(f"fused_step {rule} {param} {'/'.join(states[:count])}{' long' * loop}{' split' * s_split}", optim.step_kernel,
                          {"table": "*i64"},
                          {"RULE": rule, "P": CODES[param], "G": CODES[grad], "S0": codes[0], "S1": codes[1], "S2": codes[2], "P_SPLIT": p_split,
                           "S_SPLIT": s_split, "LOOP": loop, "NB": 1 if loop else optim.TILE // p2, "P2": p2, "TILES": optim.TILES},
                          warps=8, odd=("tensors",))


def resources(compiled, target: str) -> str:
    """Registers, shared memory and spills, as far as this target's tools say."""
    shared = compiled.metadata.shared
    if target == "gfx942":
        text = assembly(compiled)
        take = lambda key: (re.search(rf"\.{key}:\s+(\d+)", text) or [None, "?"])[1]
        return f"vgpr {take('vgpr_count'):>4} spill {take('vgpr_spill_count'):>3} shared {shared:>6}"
    import subprocess
    import tempfile
    from pathlib import Path
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    return f"regs {registers[1] if registers else '?':>4} stack {stack[1] if stack else '?':>4} shared {shared:>6}"


def main(part: str = ""):
    for variant in variants():
        if part not in variant.name:
            continue
        print(variant.name, f"(warps {variant.warps})")
        for target in TARGETS:
            compiled = compile(variant, target)
            names = [n for n in found(compiled) if n != "fma"]
            want = variant.instruction.get(target)
            print(f"    {target:7} {resources(compiled, target)}  {', '.join(names) or '-'}{'' if want is None or want in names else f'  WANTED {want}'}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
