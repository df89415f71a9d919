#!/usr/bin/env bash
# Checks and measures, on a bare machine with PyTorch, what only a GPU shows, in at most eight minutes.
#
#   OUT=results benchmarks/gpu.sh        results/: parts.jsonl, a log per part, results.json, a run, its samples, and
#                                        all but the run and its weights in results.tar.gz
#   LATENTS=runs/photos DATA=photos.zip benchmarks/gpu.sh
#                                        trains on the latents of this run and the images they were made from, carried
#                                        along, instead of the procedural ones
#   WHEELS=wheels benchmarks/gpu.sh      first installs the packages of this folder, without a network, into OUT
#   REHEARSE=1 benchmarks/gpu.sh         the same on the CPU with tiny sizes
#
# A part that fails, or takes too long, is recorded, and the others run. What is not timed runs during the training run:
# tests, images of both devices, resuming, graph breaks, and compiling for the parts that measure, which read the cache.
#
# Publish the results at home: python -m benchmarks --take results/results.json
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu}") PYTHON=${PYTHON:-python3} LATENTS=${LATENTS:+$(realpath "$LATENTS")}
RECIPE=${RECIPE:-${LATENTS:+$LATENTS/recipe.yaml}}
RECIPE=${RECIPE:-shapes-demo}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$OUT/compiled PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
rm -rf "$OUT"/{prepared,run,whole,parts,same,work,samples,results.*}
: >"$OUT/parts.jsonl"

if [ -n "${WHEELS:-}" ]; then
  $PYTHON -m pip install -q --no-index --no-deps --upgrade --target "$OUT/site" "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$OUT/site:$PYTHONPATH
fi

RUN=(train.decay=constant train.warmup=0 train.preview_every=0)
if [ -n "${REHEARSE:-}" ]; then
  DEVICE=cpu SLOWER=30 HOW=(--quick) GUIDED=tiny:4 TRAINING=tiny:4 TRAINED=60 STEPS=3 TESTS=(-m "not slow")
  RUN+=(train.batch_size=16)
  [ -n "$LATENTS" ] || RUN+=(data.count=600)
else
  DEVICE=cuda SLOWER=1 HOW=() GUIDED=XL:32 TRAINING=XL:32,B:64,L:32,XXL:16 TRAINED=165 STEPS=150 TESTS=()
  [ -n "$LATENTS" ] || TRAINED=105 RUN+=(data.count=4000)
fi
[ -z "${DATA:-}" ] || RUN+=(data.source="$(realpath "$DATA")")
if [ -z "$LATENTS" ]; then
  for name in texture semantic compressor; do
    RUN+=("$name".train.{steps=$STEPS,warmup=0,decay=constant})
  done
fi

# What else would fail only minutes later.
$PYTHON - "$DEVICE" <<'PY' || exit 2
import importlib.util, sys
needed = "accelerate click diffusers filelock hypothesis importlib_metadata jinja2 matplotlib numpy PIL pydantic pytest safetensors"
needed = [*needed.split(), "torch", "torchdiffeq", "tqdm", "transformers", "yaml"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"these packages are missing: {', '.join(missing)}; bring wheels of them along and name their folder in WHEELS")
import torch
from sfd.models.inference import cannot_compile
from sfd.utils.device import choose_device
from sfd.utils.errors import SFDError
try:
    device = choose_device(sys.argv[1])
except SFDError as error:
    sys.exit(str(error))
reason = cannot_compile(device)
print(f"PyTorch {torch.__version__} on {device.type}; {'nothing will be compiled: ' + reason if reason else 'with a compiler'}")
PY

part() { # NAME SECONDS COMMAND...: its log, and a line of parts.jsonl
  local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.txt" 2>&1
  local code=$?
  echo "{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}" | tee -a "$OUT/parts.jsonl"
}

measure() { # SECONDS SECTION OPTION...: a section of the benchmarks, in a folder of its own
  local limit=$1 name=$2
  shift 2
  part "$name" "$limit" $PYTHON -m benchmarks --device "$DEVICE" --out "$OUT/work/$name" ${HOW[@]+"${HOW[@]}"} "$name" "$@"
}

meanwhile() { # COMMAND...: beside what follows; rehearsals have no cores to spare
  "$@" &
  [ -z "${REHEARSE:-}" ] || wait
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
  for stage in train-texture train-semantic train-semvae prepare; do
    $PYTHON -m sfd $stage "$RECIPE" --out "$OUT/prepared" --device "$DEVICE" "${RUN[@]}" || return
  done
}

timed() { # train for TRAINED seconds, then make the model of the last checkpoint
  prepared "$OUT/run" && train "$OUT/run" train.steps=1000000 --max-hours "0.$(printf %04d $((TRAINED * 10000 / 3600)))"
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

same() { # the largest difference between pixels of the same seeds on the CPU and on the device
  local device
  for device in cpu "$DEVICE"; do
    $PYTHON -m sfd sample models/shapes --out "$OUT/same/$device" --seeds 0-3 --device "$device" || return
  done
  $PYTHON - "$OUT/same"/{cpu,"$DEVICE"}/grid.png <<'PY'
import sys
import numpy as np
from PIL import Image
a, b = (np.asarray(Image.open(name), dtype=int) for name in sys.argv[1:])
print("largest difference of 255 levels:", np.abs(a - b).max())
PY
}

export -f prepared train prepare timed resume same
export OUT PYTHON RECIPE DEVICE LATENTS TRAINED
DECLARED=$(declare -p RUN)

meanwhile part tests 200 $PYTHON -m pytest -q -p no:cacheprovider ${TESTS[@]+"${TESTS[@]}"} tests/test_device.py tests/test_gpu_sync.py tests/test_inference.py
meanwhile measure 200 graphs --sizes tiny:4
meanwhile measure 200 compiling_guided --sizes $GUIDED
meanwhile measure 200 compiling_training --sizes $TRAINING
meanwhile part same 60 bash -c same
[ -n "$LATENTS" ] || part prepare 60 bash -c "$DECLARED; prepare"
meanwhile part resume 80 bash -c "$DECLARED; resume"
part run $((TRAINED + 35)) bash -c "$DECLARED; timed"
part samples 20 $PYTHON -m sfd sample "$OUT/run" --out "$OUT/samples" --seeds 0-3 --device "$DEVICE"
wait
measure 95 guided --sizes $GUIDED
measure 100 training --sizes $TRAINING
measure 65 loader --sizes "${TRAINING%%,*}"

$PYTHON - "$OUT"/work/*/results.json >"$OUT/results.json" <<'PY'
import json, pathlib, sys
merged = {}
for name in sys.argv[1:]:
    for device, sections in json.loads(pathlib.Path(name).read_text()).items():
        merged.setdefault(device, {}).update(sections)
print(json.dumps(merged, indent=1))
PY
(cd "$OUT" && tar czf results.tar.gz ./*.txt parts.jsonl results.json samples)
! grep -qv '"code": 0' "$OUT/parts.jsonl"
