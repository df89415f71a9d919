#!/usr/bin/env bash
# Checks and measures, on a bare machine with PyTorch, what only a GPU shows, in at most eight minutes.
#
#   OUT=results benchmarks/gpu.sh                    results/: parts.jsonl, a log per part, benchmarks.json, a run with its report
#   DATA=photos.zip RECIPE=cifar10 benchmarks/gpu.sh trains on these images instead of the procedural ones
#   REHEARSE=1 benchmarks/gpu.sh                     the same on the CPU with tiny sizes
#
# A part that fails, or takes too long, is recorded, and the others run.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu}") PYTHON=${PYTHON:-python} RECIPE=${RECIPE:-shapes-demo} DATA=${DATA:-}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

part() { # NAME SECONDS COMMAND...: its log, and a line of parts.jsonl
  local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
  local code=$?
  echo "{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}" | tee -a "$OUT/parts.jsonl"
}

resume() { # the largest relative difference of weights between a run of 40 steps and one that was stopped after 20
  local steps common=("${RUN[@]}" train.decay=constant train.warmup=0 train.preview_every=0 --device "$DEVICE")
  for name in whole parts; do
    mkdir -p "$OUT/$name" && cp -r "$OUT/run/"{texture,semantic,compressor,latents,checked-images.json} "$OUT/$name/" 2>/dev/null
  done
  $PYTHON -m sfd train "$RECIPE" --out "$OUT/whole" "${common[@]}" train.steps=40 || return
  for steps in 20 40; do
    $PYTHON -m sfd train "$RECIPE" --out "$OUT/parts" "${common[@]}" train.steps=$steps || return
  done
  $PYTHON - "$OUT"/{whole,parts}/model/model.safetensors <<'PY'
import sys
from safetensors.torch import load_file
a, b = map(load_file, sys.argv[1:])
print("largest relative difference:", max(float((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-9)) for n in a))
PY
}

if [ -n "${REHEARSE:-}" ]; then
  DEVICE=cpu SLOWER=5 HOW=(--quick) GUIDED=tiny:4 TRAINING=tiny:4
  RUN=(data.count=1600 texture.train.steps=5 texture.train.warmup=0 semantic.train.steps=5 semantic.train.warmup=0
    compressor.train.steps=5 compressor.train.warmup=0 train.steps=5 train.warmup=0 train.decay=constant sample.steps=3
    texture.train.decay=constant semantic.train.decay=constant compressor.train.decay=constant
    evaluation.samples_per_class=2 evaluation.classifier=null)
else
  DEVICE=cuda SLOWER=1 HOW=(--publish) GUIDED=XL:64 TRAINING=B:64,L:64,XL:32,XXL:16 RUN=(train.steps=3000 train.decay_from=1500)
fi
[ -n "$DATA" ] && RUN+=("data.source=$(realpath "$DATA")")
export -f resume
export OUT PYTHON RECIPE DEVICE

part tests 90 $PYTHON -m pytest -q -p no:cacheprovider tests/test_device.py tests/test_gpu_sync.py tests/test_inference.py
part guided 90 $PYTHON -m benchmarks guided --sizes $GUIDED --device $DEVICE --out "$OUT/work" "${HOW[@]}"
part training 90 $PYTHON -m benchmarks training loader --sizes $TRAINING --device $DEVICE --out "$OUT/work" "${HOW[@]}"
part run 150 $PYTHON -m sfd run "$RECIPE" --out "$OUT/run" --device $DEVICE "${RUN[@]}"
part resume 50 bash -c "$(declare -p RUN); resume"
cp docs/results/benchmarks.json "$OUT/" 2>/dev/null
! grep -qv '"code": 0' "$OUT/parts.jsonl"
