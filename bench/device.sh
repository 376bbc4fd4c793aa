#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: build, GPU tests, memory checks, benchmarks, the search for tiles, LLaMA-7B in 16 GB.
#
#   bash bench/device.sh                       all parts, one after the other, what is worth most first
#   bash bench/device.sh build tests           only these: build tests memcheck bench tiles llama racecheck synccheck memcheck_triton
#   BUDGET=1500 bash bench/device.sh           no part begins or goes on after so many seconds
#
# Needs no network: Python with torch, triton, numpy, pybind11, ninja, setuptools, rich, safetensors, pytest and hypothesis, and nvcc. What
# is missing there, and peers to compare with, may lie as wheels in $WHEELS (default ./wheels): they are installed first, torch and triton
# never. Logs go to $OUT (default ./device_out). Every part stops after $LIMIT seconds (default 570), keeps what it has by then, and a
# failure does not stop the next. The last lines are the summary; the exit status is the number of parts that failed. Parts that need
# the build start with it where the native module is missing. The tables that tiles writes, $OUT/tiles.json, are kernels/tiles.json's next version.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/device_out}
LIMIT=${LIMIT:-570}
BUDGET=${BUDGET:-0}
WHEELS=${WHEELS:-$PWD/wheels}
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
# A system Python that forbids pip (PEP 668) may have our own editable install all the same.
export PYTHONSAFEPATH=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
[ -d /usr/local/cuda/bin ] && export PATH="$PATH:/usr/local/cuda/bin"
summary=()
failed=0

seconds_left() {  # for the next part
  local left=$((BUDGET - SECONDS))
  if [ "$BUDGET" -gt 0 ] && [ "$left" -lt "$LIMIT" ]; then echo "$left"; else echo "$LIMIT"; fi
}

part() {  # part <name> <command...>
  local name=$1 start=$SECONDS limit status note=""
  shift
  limit=$(seconds_left)
  if [ "$limit" -lt 30 ]; then
    summary+=("$(printf '%-15s not run: %d s of BUDGET=%d are over' "$name" "$SECONDS" "$BUDGET")")
    failed=$((failed + 1))
    return
  fi
  echo "== $name: $*"
  # An interrupt lets Python write what it has; what goes on after 20 s is killed.
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 5 "$OUT/$name.log"
  { [ $status -eq 124 ] || [ $status -eq 137 ]; } && note=" (out of time after $limit s)"
  [ $status -ne 0 ] && failed=$((failed + 1))
  summary+=("$(printf '%-15s exit %3d  %4d s%s' "$name" "$status" "$((SECONDS - start))" "$note")")
  printf '%s\n' "${summary[@]}" >"$OUT/summary.txt"  # what ends this script leaves what was done
}

sanitizer() {  # sanitizer <part> <tool> <backend>, over the smallest cases: it costs a factor of ten to a hundred
  local name=$1 tool=$2 backend=$3
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed" >"$OUT/$name.log"
    summary+=("$(printf '%-15s not run: compute-sanitizer is not installed' "$name")")
    return
  fi
  # Without torch's cache of memory every tensor is an allocation of its own, whose ends memcheck sees.
  part "$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all --print-limit 20 \
    "$PYTHON" -m pytest tests/test_cuda.py -m gpu -q --maxfail=5 -p no:cacheprovider -o timeout=0 \
    -k "$backend and not long_sums and not graph and not 4128 and not wrong_device"
}

native_is_there() { "$PYTHON" -c "import gradmill; from gradmill import _C; assert _C.has_cuda" >/dev/null 2>&1; }

parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(build tests memcheck bench tiles llama racecheck synccheck memcheck_triton)
{
  date -u
  nvidia-smi || true
  nvcc --version || true
  "$PYTHON" -c "import torch; print('torch', torch.__version__, torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())"
  "$PYTHON" -c "import triton; print('triton', triton.__version__)"
  for wheel in "$WHEELS"/*.whl; do  # one by one: a wheel of another Python leaves the others
    case ${wheel##*/} in torch-* | triton-* | "*.whl") continue ;; esac
    "$PYTHON" -m pip install -q --no-deps "$wheel" || echo "not installed: $wheel"
  done
} >"$OUT/machine.log" 2>&1
grep -E "^(torch|triton) " "$OUT/machine.log"

# This GPU's architecture alone: each further one costs minutes of compiling. compute_80's PTX is always built.
if [ -z "${GRADMILL_CUDA_ARCHS:-}" ]; then
  GRADMILL_CUDA_ARCHS=$("$PYTHON" -c "import torch; major, minor = torch.cuda.get_device_capability(); print(f\"{major}{minor}{'a' * (major in (9, 10))}\")" 2>/dev/null)
  if [ -n "$GRADMILL_CUDA_ARCHS" ]; then export GRADMILL_CUDA_ARCHS; else unset GRADMILL_CUDA_ARCHS; fi
fi
if [[ " ${parts[*]} " != *" build "* ]] && ! native_is_there; then
  parts=(build "${parts[@]}")
fi
for p in "${parts[@]}"; do
  case $p in
    build)
      part build env GRADMILL_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -v -e .
      # Triton's kernels do not need nvcc: with the CPU part alone the other parts still say something.
      native_is_there || part build_cpu env GRADMILL_CUDA=0 "$PYTHON" -m pip install --no-build-isolation --no-deps -v -e . ;;
    tests) part tests "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors --durations=10 ;;
    memcheck | racecheck | synccheck) sanitizer "$p" "$p" native ;;
    memcheck_triton) sanitizer "$p" memcheck triton ;;
    bench) part bench "$PYTHON" bench/run.py --device cuda --json "$OUT/bench.json" ;;
    tiles) part tiles "$PYTHON" bench/tiles.py --minutes "$(awk "BEGIN { print ($(seconds_left) - 30) / 60 }")" --out "$OUT/tiles.json" ;;
    llama) part llama "$PYTHON" bench/llama.py --device cuda --plain --json "$OUT/llama.json" ;;
    *) echo "no part is called $p; they are build, tests, memcheck, bench, tiles, llama, racecheck, synccheck and memcheck_triton" >&2; failed=$((failed + 1)) ;;
  esac
done

echo
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
exit $failed
