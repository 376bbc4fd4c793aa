"""Which tiles are fastest? Tries configurations of the Triton products on the GPU at hand and writes the table kernels/tiles.json.

    python bench/tiles.py                          this GPU's rows, measured, into the committed table
    python bench/tiles.py --minutes 9 --out FILE   at most so long, into another file
    python bench/tiles.py --dry-run --arch sm_90   without a GPU: compiles every configuration and says which fit

A configuration is rejected by counting (shared memory, accumulators), then by what the compiler made of it: shared memory or registers the
chip does not have, spills, no matrix instruction. What is left runs: its result is compared with torch's, its time is a median with L2
flushed, and the least product of times over the shapes of a class wins, by 2% against the row that stands. Then torch's own product
(_int_mm with gradmill's epilogue, _scaled_mm) is timed beside it and listed in the table where it is faster by as much. Every
finished class is written at once; one whose time runs out keeps the best it found.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import sys
import time

import torch

from gradmill._files import replacing
from gradmill.kernels import aot, tiles
from gradmill.kernels.tiles import Tile

#: shape class -> (m, n, k) that are timed
SHAPES = {"m16": ((16, 4096, 4096), (8, 28672, 8192)), "m64": ((64, 4096, 4096), (48, 8192, 8192)), "small": ((1024, 1024, 4096), (512, 4096, 1024)),
          "large": ((4096, 4096, 4096), (8192, 8192, 8192))}
#: shape class -> BM, BN
SIDES = {"m16": ((16,), (32, 64, 128)), "m64": ((64,), (64, 128, 256)), "small": ((64, 128), (64, 128)), "large": ((64, 128, 256), (128, 256))}
#: Accumulators for each element of a tile: FP8's sums of one step and the fp32 they are moved to, and a packed weight's partial sum.
ACCUMULATORS = {"int8": 1, "fp8": 2, "fp8_block": 2, "packed": 2}
GAIN = 0.98          # what a new time must be of the old one
PACKED_BLOCK = 128


# --- which there are, and which fit -----------------------------------------------------------------------
def candidates(arch: str, format: str, shape: str) -> list[Tile]:
    """The table's row first, then the others in an order that chance chose, always the same."""
    bms, bns = SIDES[shape]
    found = [Tile(*sizes, 8, warps, stages, 1) for *sizes, warps, stages in itertools.product(bms, bns, (64, 128), (4, 8), (2, 3, 4, 5))]
    random.Random(0).shuffle(found)
    return [Tile(*tiles.TABLE[arch][format][shape]), *found]


def counted(arch: str, format: str, tile: Tile) -> str:
    """Why a configuration cannot do well, or ""."""
    staged = tile.stages * tile.bk * (2 * tile.bm if format == "packed" else tile.bm + tile.bn)
    if staged > aot.SHARED[arch]:
        return "shared memory"
    sums = tile.bm * tile.bn // (32 * tile.warps)
    if sums * ACCUMULATORS[format] > (512 if arch == "sm_100" else 200):  # sm_100 sums in tensor memory
        return "accumulators"
    return "a thread has fewer than 4 sums" if sums < 4 else ""


def judged(job: tuple[str, str, Tile]) -> tuple[str, Tile, dict]:
    """Why the compiled kernel does not fit ("" if it does); the tile with as many programs as a core then holds, 4 at the most."""
    arch, format, tile = job
    variant = aot.PRODUCTS[format](f"{format} {tile}", arch, tile._replace(programs=1))
    try:
        reason, used = aot.misfit(variant, arch)
    except Exception as error:
        return f"does not compile: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}", tile, {}
    return reason, tile if reason else tile._replace(programs=min(4, aot.resident(used, tile.warps, arch))), used


def fitting(arch: str, format: str, shape: str, pool, limit: int = 0) -> tuple[list[Tile], collections.Counter]:
    """Configurations that fit, in candidates' order, and how many were rejected for what. limit: compile no more than so many."""
    why, jobs = collections.Counter(), []
    for tile in dict.fromkeys(candidates(arch, format, shape)):
        if reason := counted(arch, format, tile):
            why[reason] += 1
        else:
            jobs.append((arch, format, tile))
    kept = []
    for reason, tile, _ in pool.map(judged, jobs[:limit or None]):
        if reason:
            why[reason.split(":")[0]] += 1
        elif tile not in kept:
            kept.append(tile)
    return kept, why


# --- timing -----------------------------------------------------------------------------------------------
def problem(format: str, m: int, n: int, k: int):
    """run(i) of the op as users reach it, in the table's tile, and a check of what it returned."""
    from gradmill import ops
    from gradmill.kernels import matmul

    x, w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    if format == "int8":
        (a, sa, _), (b, sb, _) = ops.quantize(x, "int8"), ops.quantize(w, "int8")
        run = lambda i=0: matmul.matmul_int8(a, b, sa, sb, None, torch.bfloat16)
        values = a.to(torch.bfloat16) * sa.to(torch.bfloat16), b.to(torch.bfloat16) * sb.to(torch.bfloat16)
    elif format == "packed":
        packed = ops.quantize(w, "uint4", PACKED_BLOCK)
        run = lambda i=0: matmul.matmul_packed(x, *packed, "uint4", PACKED_BLOCK, k, False, None, torch.bfloat16)
        values = x, ops.dequantize(*packed, "uint4", PACKED_BLOCK, k, torch.bfloat16)
    else:
        block = 128 if format == "fp8_block" else 0
        a, b = ops.quantize(x, "e4m3", block), ops.quantize(w, "e4m3", block)
        run = lambda i=0: matmul.matmul_scaled(*a, "e4m3", block, *b, "e4m3", block, k, False, None, torch.bfloat16)
        values = (ops.dequantize(*o, "e4m3", block, k, torch.bfloat16) for o in (a, b))
    left, right = values
    want = left @ right.t()
    # Operands rounded to bf16 for torch's product: 2^-8 each, over sums of k products of random signs; far from any wrong tile.
    bound = 0.05 * want.float().std()

    def check(got):
        worst = (got.float() - want.float()).abs().max()
        if not worst <= bound + 0.02 * want.float().abs().max():
            raise AssertionError(f"{format} {m} x {n} x {k}: wrong by {worst:.3g}")
    return run, check


def search(arch: str, format: str, shape: str, kept: list[Tile], timer, until: float, say) -> None:
    """Times what fits until the clock says ``until`` and puts the best into the table."""
    table, pair = tiles.TABLE[arch], f"{format} {shape}"
    problems, old, times = [problem(format, *s) for s in SHAPES[shape]], Tile(*table[format][shape]), {}
    table["torch"] = [p for p in table["torch"] if p != pair]

    def timed(samples=9):
        for run, check in problems:
            check(run())
        return math.exp(math.fsum(math.log(timer.sample(run, 0, samples)) for run, _ in problems) / len(problems))

    for tile in dict.fromkeys([old, *kept]):
        if times and time.monotonic() > until:
            say(f"  out of time after {len(times)} of {len(kept) + 1}")
            break
        table[format][shape] = list(tile)
        try:
            times[tile] = timed()
        except Exception as error:  # out of resources, a wrong result: another tile
            say(f"  {tuple(tile)}: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")
    finalists = [Tile(*f[:3], group, *f[4:]) for f in sorted(times, key=times.get)[:3] for group in dict.fromkeys((f.group, 4, 16))]
    finals = {tile: [] for tile in ([old] if old in times else []) + [f for f in finalists if f != old]}
    for _ in range(3):  # interleaved
        for tile in finals:
            table[format][shape] = list(tile)
            finals[tile].append(timed())
    finals = {tile: min(t) for tile, t in finals.items()}
    best = min(finals, key=finals.get, default=old)
    if old in finals and finals[best] > GAIN * finals[old]:
        best = old
    table[format][shape] = list(best)
    if best not in finals:
        say(f"{pair}: nothing ran; the row stays")
        return
    note = ""
    if format in ("int8", "fp8"):
        table["torch"].append(pair)
        try:
            theirs = min(timed() for _ in range(3))
            note = f", torch {theirs * 1e6:.1f} us"
        except Exception as error:
            theirs, note = math.inf, f", torch: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"
        if theirs > GAIN * finals[best]:
            table["torch"].remove(pair)
    table["from"][format] = f"{torch.cuda.get_device_name()}, triton {aot.triton.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    operations = math.exp(math.fsum(math.log(2.0 * m * n * k) for m, n, k in SHAPES[shape]) / len(SHAPES[shape]))
    was = f", was {finals[old] * 1e6:.1f}" if old in finals else ""
    say(f"{pair}: {tuple(best)} {finals[best] * 1e6:.1f} us{was}{note}; {operations / finals[best] / 1e12:.0f} T operations/s; {len(times)} tried")


# --- the table --------------------------------------------------------------------------------------------
def dumps(table: dict) -> str:
    """A line a format, so that a diff shows which rows changed."""
    def architecture(rows):
        return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}"
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {architecture(rows)}" for name, rows in table.items() if name != "interpreter") + "\n}\n"


def write(file: pathlib.Path) -> None:
    with replacing(file) as temporary:
        temporary.write_text(dumps(tiles.TABLE))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/tiles.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--arch", choices=[t for t in aot.TARGETS if t != "gfx942"], help="dry run: the architecture (default: all)")
    parser.add_argument("--format", default="int8,fp8,fp8_block,packed", help="comma-separated (default: %(default)s)")
    parser.add_argument("--shape", default="large,small,m64,m16", help="comma-separated shape classes, the first ones first (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="compile at most so many configurations a class (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to be done, compiling included")
    parser.add_argument("--out", type=pathlib.Path, default=tiles.TABLE_FILE, help="where the table goes (default: the committed one)")
    args = parser.parse_args(argv)
    formats, shapes = args.format.split(","), args.shape.split(",")
    for kind, given, known in (("format", formats, aot.PRODUCTS), ("shape", shapes, SHAPES)):
        if unknown := set(given) - set(known):
            parser.error(f"--{kind} {','.join(unknown)}: there are {', '.join(known)}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run needs none")
    end = time.monotonic() + 60 * args.minutes
    pairs = [(format, shape) for shape in shapes for format in formats]
    say, bad = lambda line: print(line, flush=True), 0
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        if args.dry_run:
            for arch in [args.arch] if args.arch else [t for t in aot.TARGETS if t != "gfx942"]:
                for format, shape in [(f, s) for f, s in pairs if s in tiles.TABLE[arch][f]]:
                    kept, why = fitting(arch, format, shape, pool, args.limit)
                    row = Tile(*tiles.TABLE[arch][format][shape])
                    stands = any(k[:6] == row[:6] and k.programs >= row.programs for k in kept)
                    bad += not stands
                    say(f"{arch} {format} {shape}: {len(kept)} fit; rejected: {', '.join(f'{n} {r}' for r, n in why.most_common()) or 'none'}"
                        f"{'' if stands else f'. ! The row of the table does not fit: {tuple(row)}'}")
                    for tile in kept:
                        say(f"  {' '.join(f'{name} {value}' for name, value in tile._asdict().items())}")
            return 1 if bad else 0
        from gradmill.bench.runner import CudaTimer

        arch, timer = tiles.architecture(torch.device("cuda")), CudaTimer()
        pairs = [(f, s) for f, s in pairs if s in tiles.TABLE[arch][f]]
        for i, (format, shape) in enumerate(pairs):
            if time.monotonic() > end:
                say(f"out of time: {', '.join(' '.join(p) for p in pairs[i:])} keep their rows")
                break
            until = time.monotonic() + (end - time.monotonic()) / (len(pairs) - i) * 0.8  # the finals take the rest
            try:
                kept, _ = fitting(arch, format, shape, pool, args.limit)
                search(arch, format, shape, kept, timer, until, say)
            except Exception as error:
                say(f"{format} {shape}: {error}")
                bad += 1
            write(args.out)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
