#!/usr/bin/env bash
# Checks and measures, on a bare machine with PyTorch, what only a GPU shows, in at most eight minutes.
#
#   OUT=results benchmarks/gpu.sh        results/: parts.jsonl, a log per part, results.json, a run, its samples
#   LATENTS=runs/photos DATA=photos.zip benchmarks/gpu.sh
#                                        trains on the latents of this run and the images they were made from, carried
#                                        along, instead of the procedural ones
#   REHEARSE=1 benchmarks/gpu.sh         the same on the CPU with tiny sizes
#
# A part that fails, or takes too long, is recorded, and the others run.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu}") PYTHON=${PYTHON:-python} LATENTS=${LATENTS:+$(realpath "$LATENTS")}
RECIPE=${RECIPE:-${LATENTS:+$LATENTS/recipe.yaml}}
RECIPE=${RECIPE:-shapes-demo}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
: >"$OUT/parts.jsonl"

part() { # NAME SECONDS COMMAND...: its log, and a line of parts.jsonl
  local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.txt" 2>&1
  local code=$?
  echo "{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}" | tee -a "$OUT/parts.jsonl"
}

prepared() { # FOLDER: the tokenizers and latents to train on, carried along or made
  mkdir -p "$1"
  local from=${LATENTS:-$OUT/prepared} each
  for each in recipe.yaml checked-images.json texture semantic compressor latents; do
    [ ! -e "$from/$each" ] || cp -r "$from/$each" "$1/"
  done
}

train() { # FOLDER OVERRIDE...
  local folder=$1
  shift
  $PYTHON -m sfd train "$RECIPE" --out "$folder" --device "$DEVICE" "${RUN[@]}" "$@"
}

prepare() { # what is not carried along
  local stage
  [ -z "$LATENTS" ] || return 0
  for stage in train-texture train-semantic train-semvae prepare; do
    $PYTHON -m sfd $stage "$RECIPE" --out "$OUT/prepared" --device "$DEVICE" "${RUN[@]}" || return
  done
}

timed() { # train for MINUTES, then make the model of the last checkpoint
  prepared "$OUT/run" && train "$OUT/run" --max-hours "$(awk "BEGIN { print $MINUTES / 60 }")"
  local code=$? step
  [ $code = 75 ] || return $code
  step=$(find "$OUT/run/training" -name 'step-*' | sed 's/.*step-0*//; s/\..*//' | sort -n | tail -1)
  [ -n "$step" ] && train "$OUT/run" train.steps="$step"
}

resume() { # the largest relative difference of weights between a run of 40 steps and one that was stopped after 20
  local name steps
  for name in whole parts; do prepared "$OUT/$name"; done
  train "$OUT/whole" train.steps=40 || return
  for steps in 20 40; do train "$OUT/parts" train.steps=$steps || return; done
  $PYTHON - "$OUT"/{whole,parts}/model/model.safetensors <<'PY'
import sys
from safetensors.torch import load_file
a, b = map(load_file, sys.argv[1:])
print("largest relative difference:", max(float((a[n].float() - b[n].float()).norm() / a[n].float().norm().clamp(min=1e-9)) for n in a))
PY
}

RUN=(train.decay=constant train.warmup=0 train.preview_every=0)
if [ -n "${REHEARSE:-}" ]; then
  DEVICE=cpu SLOWER=10 HOW=(--quick) GUIDED=tiny:4 TRAINING=tiny:4 MINUTES=0.5 STEPS=5
  RUN+=(train.batch_size=16)
else
  DEVICE=cuda SLOWER=1 HOW=(--publish) GUIDED=XL:64 TRAINING=XL:32,B:64,L:64,XXL:16 MINUTES=3 STEPS=200
  [ -n "$LATENTS" ] || MINUTES=2.4
fi
[ -z "${DATA:-}" ] || RUN+=(data.source="$(realpath "$DATA")")
if [ -z "$LATENTS" ]; then
  RUN+=(data.count=8000)
  for name in texture semantic compressor; do
    RUN+=("$name".train.{steps=$STEPS,warmup=0,decay=constant})
  done
fi
export -f prepared train prepare timed resume
export OUT PYTHON RECIPE DEVICE LATENTS MINUTES

BENCHMARK=($PYTHON -m benchmarks --device "$DEVICE" --out "$OUT/work" "${HOW[@]}")
DECLARED=$(declare -p RUN)
part tests 25 $PYTHON -m pytest -q -p no:cacheprovider tests/test_device.py tests/test_gpu_sync.py tests/test_inference.py
[ -n "$LATENTS" ] || part prepare 35 bash -c "$DECLARED; prepare"
part run "$(awk "BEGIN { print int($MINUTES * 60 + 20) }")" bash -c "$DECLARED; timed"
part samples 10 $PYTHON -m sfd sample "$OUT/run" --out "$OUT/samples" --seeds 0-3 --device "$DEVICE"
part resume 30 bash -c "$DECLARED; resume"
part graphs 30 "${BENCHMARK[@]}" graphs --sizes tiny:4
part guided 75 "${BENCHMARK[@]}" guided --sizes $GUIDED
part training 90 "${BENCHMARK[@]}" training --sizes $TRAINING
part loader 20 "${BENCHMARK[@]}" loader --sizes "${TRAINING%%,*}"
cp "$OUT/work/results.json" "$OUT/" 2>/dev/null
! grep -qv '"code": 0' "$OUT/parts.jsonl"
