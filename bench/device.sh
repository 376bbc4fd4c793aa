#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: build, GPU tests, compute-sanitizer, benchmarks, LLaMA-7B in 16 GB.
#
#   bash bench/device.sh                       all parts, one after the other
#   bash bench/device.sh build tests           only these: build tests memcheck racecheck synccheck bench llama
#
# Needs no network: Python with torch, triton, pybind11, ninja, setuptools and pytest, and nvcc. Logs go to $OUT (default
# ./device_out). Every part stops after $LIMIT seconds (default 570) and a failure does not stop the next. The last lines
# are the summary; the exit status is the number of parts that failed. Parts that need the build start with it where the
# native module is missing.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/device_out}
LIMIT=${LIMIT:-570}
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONSAFEPATH=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
[ -d /usr/local/cuda/bin ] && export PATH="$PATH:/usr/local/cuda/bin"
summary=()
failed=0

part() {  # part <name> <command...>
  local name=$1 start=$SECONDS status
  shift
  echo "== $name: $*"
  timeout --kill-after=20 "$LIMIT" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 5 "$OUT/$name.log"
  local note=""
  [ $status -eq 124 ] && note=" (out of time)"
  [ $status -ne 0 ] && failed=$((failed + 1))
  summary+=("$(printf '%-10s exit %3d  %4d s%s' "$name" "$status" "$((SECONDS - start))" "$note")")
}

sanitizer() {  # one tool over the smallest cases: a sanitizer costs a factor of ten to a hundred
  local tool=$1
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed" >"$OUT/$tool.log"
    summary+=("$(printf '%-10s not run: compute-sanitizer is not installed' "$tool")")
    return
  fi
  part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
    "$PYTHON" -m pytest tests/test_cuda.py -m gpu -q -x -p no:cacheprovider \
    -k "native and not long_sums and not graph and not 4128 and not wrong_device"
}

parts=("$@")
[ ${#parts[@]} -eq 0 ] && parts=(build tests memcheck racecheck synccheck bench llama)
{
  date -u
  nvidia-smi || true
  nvcc --version || true
  "$PYTHON" -c "import torch; print('torch', torch.__version__, torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())"
  "$PYTHON" -c "import triton; print('triton', triton.__version__)"
} >"$OUT/machine.log" 2>&1
tail -n 2 "$OUT/machine.log"

if [[ " ${parts[*]} " != *" build "* ]] && ! "$PYTHON" -c "import gradmill; from gradmill import _C; assert _C.has_cuda" 2>/dev/null; then
  parts=(build "${parts[@]}")
fi
for p in "${parts[@]}"; do
  case $p in
    build) part build env GRADMILL_CUDA=1 "$PYTHON" -m pip install --no-build-isolation --no-deps -v -e . ;;
    tests) part tests "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --durations=10 ;;
    memcheck | racecheck | synccheck) sanitizer "$p" ;;
    bench) part bench "$PYTHON" bench/run.py --device cuda --json "$OUT/bench.json" ;;
    llama) part llama "$PYTHON" bench/llama.py --device cuda --plain --json "$OUT/llama.json" ;;
    *) echo "no part is called $p; they are build, tests, memcheck, racecheck, synccheck, bench and llama" >&2; failed=$((failed + 1)) ;;
  esac
done

echo
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
exit $failed
