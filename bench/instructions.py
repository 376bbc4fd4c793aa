"""Evidence without noise: instructions per element of the CPU kernels, registers and matrix instructions of the GPU kernels.

    python bench/instructions.py                 measures, compares with bench/results/instructions.json, rewrites it (= make instructions)
    python bench/instructions.py cpu             one part: cpu, triton or cuda

cpu: callgrind counts what gradmill's ops execute on two sizes, held to AVX2 (Valgrind knows no AVX-512), one thread; the difference per
element of the larger one is the inner loop's, whatever a call costs. triton: every kernel of kernels/aot.py compiled for sm_90. cuda:
csrc/cuda compiled for sm_90a. None needs a GPU. A part whose tools are missing keeps its committed rows; rows of another compiler are
replaced and not compared. A kernel that jumped is named, and the exit status is 1.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from gradmill._files import replacing

HERE = pathlib.Path(__file__).resolve().parent
TABLE = HERE / "results" / "instructions.json"
ROWS, COLUMNS = (64, 128), 1024   # the two sizes that are counted
#: How much more a figure may become before it is called a jump: a fraction, and so much besides.
SLACK = {"instructions": (0.03, 0.0), "registers": (0.0, 8), "shared": (0.1, 256), "spills": (0.0, 0), "stack": (0.0, 0)}

# --- CPU --------------------------------------------------------------------------------------------------
_SHIM = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def kernels():
    """name -> (what an element is, function of the rows that gives a call)."""
    import torch

    import gradmill
    from gradmill import functional, ops
    from gradmill.optim.rules import RULES
    key, g = torch.tensor([1, 2], dtype=torch.int64), torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    found = {}

    def add(name, element, make):
        found[name] = element, make
    for code, block, transpose, k in (("int8", 0, False, None), ("int8", 0, False, key), ("int8", 0, True, None), ("uint4", 256, False, None), ("moment8", 256, False, None),
                                      ("square8", 256, False, None), ("e4m3", 0, False, None), ("e2m1", 16, False, None)):
        how = f"{code}{f', blocks of {block}' if block else ''}{', transposed' * transpose}{', stochastic' if k is not None else ''}"
        add(f"quantize {how}", "value", lambda n, a=(code, block, transpose, k): (lambda x: lambda: ops.quantize(x, *a))(randn(n, COLUMNS)))
    add("quantize_both int8", "value", lambda n: (lambda x: lambda: ops.quantize_both(x, "int8"))(randn(n, COLUMNS)))
    for code, block in (("int8", 0), ("uint4", 256), ("moment8", 256), ("e4m3", 0)):
        def back(n, code=code, block=block):
            stored = ops.quantize(randn(n, COLUMNS), code, block)
            return lambda: ops.dequantize(*stored, code, block, COLUMNS, torch.float32)
        add(f"dequantize {code}{f', blocks of {block}' if block else ''}", "value", back)
    add("hadamard, blocks of 16", "value", lambda n: (lambda x: lambda: ops.hadamard(x, 16, False, key))(randn(n, COLUMNS)))

    def fake(n):
        w = randn(n, COLUMNS)
        parameters = functional.fake_quantize_parameters(w, 4, 128)
        return lambda: functional.fake_quantize(w, *parameters, 4, 128)
    add("fake_quantize 4 bits, groups of 128", "value", fake)
    for code in ("int8", "int7"):
        def product(n, code=code):
            (a, s, _), (b, t, _) = (ops.quantize(randn(rows, COLUMNS), code) for rows in (n, 256))
            return lambda: ops.matmul_int8(a, b, s, t, None, torch.float32)
        add(f"matmul_int8, codes of {code}", "multiply-add", product)
    for batch in (1, 16):
        def packed(n, batch=batch):
            x, w = randn(batch, COLUMNS), ops.quantize(randn(n, COLUMNS), "uint4", 128)
            return lambda: ops.matmul_packed(x, *w, "uint4", 128, COLUMNS, False, None, torch.float32)
        add(f"matmul_packed uint4, batch {batch}", "weight", packed)

    def signs(n):
        (a, s), (b, t) = ops.pack_signs(randn(n, COLUMNS)), ops.pack_signs(randn(256, COLUMNS))
        return lambda: ops.matmul_binary(a, b, COLUMNS, s, t, None, torch.float32)
    add("matmul_binary", "product of signs", signs)
    add("pack_signs", "value", lambda n: (lambda x: lambda: ops.pack_signs(x))(randn(n, COLUMNS)))

    def project(n):
        grad, basis = randn(n, COLUMNS), ops.quantize(randn(128, COLUMNS), "uint4", 256)
        return lambda: ops.project(grad, *basis, "uint4", 256, False)
    add("project to rank 128, INT4 basis", "gradient element", project)

    def project_back(n):
        w, r, basis, scalars = randn(n, COLUMNS), randn(n, 128), ops.quantize(randn(128, COLUMNS), "uint4", 256), torch.tensor([0.999, -1e-4])
        return lambda: ops.project_back(w, None, None, "fp32", 0, COLUMNS, r, *basis, "uint4", 256, False, scalars, key, 0)
    add("project_back from rank 128, INT4 basis", "weight", project_back)
    add("dct of rows of 1024", "value", lambda n: (lambda x: lambda: ops.dct(x, False))(randn(n, COLUMNS)))
    optimizers = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD", "adagrad": "Adagrad", "adabelief": "AdaBelief", "diffgrad": "DiffGrad", "grams": "Grams", "sophia": "Sophia",
                  "classp": "CLASSP"}
    for rule in RULES:
        for states in ("fp32", "int8") if rule in optimizers else ():
            def step(n, rule=rule, states=states):
                p = torch.nn.Parameter(randn(n, COLUMNS))
                p.grad = randn(n, COLUMNS)
                optimizer = getattr(gradmill.optim, optimizers[rule])([p], lr=1e-3, states=states, **({"momentum": 0.9} if rule == "sgd" else {}))
                optimizer.step()
                return optimizer.step
            add(f"fused_step {rule}, {states} states", "parameter", step)
    return found


#: name's start -> elements per row
_PER_ROW = {"matmul_int8": COLUMNS * 256, "matmul_binary": COLUMNS * 256}


def count_here(shim: str):
    """In Valgrind: every kernel on both sizes, each call between a shim's begin and end."""
    import ctypes

    import torch
    torch.set_num_threads(1)
    library = ctypes.CDLL(shim)
    for name, (_, make) in kernels().items():
        for rows in ROWS:
            run = make(rows)
            run()
            library.begin()
            run()
            library.end(f"{name}@{rows}".encode())


def cpu() -> tuple[str, dict]:
    valgrind, compiler = shutil.which("valgrind"), shutil.which(os.environ.get("CC", "cc"))
    if not (valgrind and compiler):
        raise FileNotFoundError("valgrind or a C compiler is not installed")
    from gradmill import _C
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "shim.c").write_text(_SHIM)
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c")], check=True)
        subprocess.run([valgrind, "--tool=callgrind", "--instr-atstart=no", "--separate-threads=no", f"--callgrind-out-file={folder}/out", sys.executable,
                        str(HERE / "instructions.py"), "--count", str(folder / "shim.so")], check=True, stdout=sys.stderr,
                       env={**os.environ, "GRADMILL_ISA": "avx2", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"})
        totals = {}
        for file in folder.glob("out.*"):
            text = file.read_text()
            name, total = re.search(r"Client Request: (.*)", text), re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if name and total:
                totals[name[1]] = int(total[1])
    rows = {}
    for name, (element, _) in kernels().items():
        small, large = (totals[f"{name}@{n}"] for n in ROWS)
        per_row = next((n for start, n in _PER_ROW.items() if name.startswith(start)), COLUMNS)
        rows[name] = {"instructions": float(f"{(large - small) / ((ROWS[1] - ROWS[0]) * per_row):.4g}"), "per": element}
    return f"{_C.compiler}, avx2", rows


# --- GPU --------------------------------------------------------------------------------------------------
def cuobjdump() -> str:
    """triton's, or the toolkit's."""
    try:
        import triton
        tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if tool.exists():
            return str(tool)
    except ImportError:
        pass
    if tool := shutil.which("cuobjdump"):
        return tool
    raise FileNotFoundError("cuobjdump is not installed (triton has one)")


#: Matrix instructions in SASS.
MATRIX = r"\b([HIQB]MMA|[HIQ]GMMA|UTC[HIQ]MMA)\b"


def dissect(cubin: pathlib.Path) -> dict[str, dict]:
    """kernel -> registers, stack, spills (local loads and stores), shared memory that it declares, matrix instructions."""
    tool = cuobjdump()
    run = lambda flag: subprocess.run([tool, flag, str(cubin)], capture_output=True, text=True, check=True).stdout
    rows = {}
    for name, said in re.findall(r"Function (\S+):\n\s*(.*)", run("--dump-resource-usage")):
        take = lambda key: int((re.search(rf"\b{key}:(\d+)", said) or [0, 0])[1])
        rows[name] = {"registers": take("REG"), "stack": take("STACK"), "shared": take("SHARED")}
    for part in re.split(r"^\s*Function : ", run("--dump-sass"), flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        rows.setdefault(name.strip(), {}).update(spills=len(re.findall(r"\b(?:LDL|STL)\b", body)), matrix=len(re.findall(MATRIX, body)))
    return rows


def triton() -> tuple[str, dict]:
    import triton as package

    from gradmill.kernels import aot
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in aot.variants():
            if variant.only in ("", "sm_90"):
                compiled, file = aot.compile(variant, "sm_90"), pathlib.Path(folder) / "kernel.cubin"
                file.write_bytes(compiled.asm["cubin"])
                (row,) = dissect(file).values()
                rows[variant.name] = {**row, "shared": compiled.metadata.shared}
    return f"triton {package.__version__}, sm_90", rows


def cuda() -> tuple[str, dict]:
    sources = sorted((HERE.parent / "csrc/cuda").glob("*.cu"))
    nvcc = os.environ.get("GRADMILL_NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not (nvcc and sources):
        raise FileNotFoundError("nvcc is not installed" if sources else "the sources are in the checkout only")
    version = re.search(r"release \S+ V(\S+)|V(\d\S+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)[0]
    rows, folder = {}, HERE.parent / "build" / "instructions"   # kept: a file is minutes of work, and most do not change
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(f.stat().st_mtime for part in ("common", "cuda") for f in (HERE.parent / "csrc" / part).glob("*.*h"))
    for source in sources:
        cubin = folder / f"{source.stem}.cubin"
        if not cubin.exists() or cubin.stat().st_mtime < max(newest, source.stat().st_mtime):
            partial = cubin.with_suffix(".partial")
            subprocess.run([nvcc, "-std=c++17", "-O3", "-fmad=false", "-cubin", "-arch=sm_90a", f"-I{HERE.parent / 'csrc'}", "-o", str(partial), str(source)], check=True)
            os.replace(partial, cubin)
        found = dissect(cubin)
        names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout.splitlines()
        for name, row in zip(names, found.values()):
            short = re.sub(r"\(anonymous namespace\)::|gradmill::|\bcuda::|^void ", "", name)
            rows[f"{source.stem}: {re.sub(r'[(]([^()]|[(][^()]*[)])*[)]$', '', short)}"] = row
    return f"nvcc {version}, sm_90a", rows


PARTS = {"cpu": cpu, "triton": triton, "cuda": cuda}


# --- the table --------------------------------------------------------------------------------------------
def jumps(part: str, before: dict, after: dict) -> list[str]:
    """What became worse by more than SLACK, kernel by kernel; matrix instructions that went away."""
    said = []
    for name, row in after.items():
        for what, value in row.items():
            old = before.get(name, {}).get(what)
            if old is None or isinstance(value, str):
                continue
            share, besides = SLACK.get(what, (0.0, 0))
            if what == "matrix" and old and not value:
                said.append(f"{part}: {name}: no matrix instruction is left of {old}")
            elif what != "matrix" and value > old * (1 + share) + besides:
                said.append(f"{part}: {name}: {what} {old:g} -> {value:g}")
    return said


def dumps(table: dict) -> str:
    """One line a kernel, so that a diff is read as a table."""
    parts = []
    for part, data in table.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(data["kernels"].items()))
        parts.append(f'"{part}": {{"compiler": {json.dumps(data["compiler"])}, "kernels": {{\n{rows}\n}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/instructions.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--table", type=pathlib.Path, default=TABLE, help="the committed table (default: bench/results/instructions.json)")
    parser.add_argument("--count", metavar="SHIM", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.count:
        count_here(args.count)
        return 0
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    table, worse = json.loads(args.table.read_text()) if args.table.exists() else {}, []
    for part in args.parts or PARTS:
        before = table.get(part)
        try:
            compiler, rows = PARTS[part]()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            print(f"{part}: left as it was: {error}")
            continue
        same = before is not None and before["compiler"] == compiler
        print(f"{part}: {len(rows)} kernels, {compiler}; {'compared' if same else 'not compared: ' + (before['compiler'] if before else 'nothing')+ ' was there before'}")
        worse += jumps(part, before["kernels"], rows) if same else []
        table[part] = {"compiler": compiler, "kernels": rows}
    args.table.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.table) as temporary:
        temporary.write_text(dumps(table))
    print("\n".join(f"! {line}" for line in worse) or "no kernel jumped")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
