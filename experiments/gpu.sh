#!/usr/bin/env bash
# What only a GPU can show, in stages of under ten minutes each: experiments/gpu.sh STAGE OUTPUT_FOLDER
#   check    facts; pytest -m gpu; the default run: repeated, killed and resumed, exact, compiled
#   ladder   where a ConvNeXt step's time goes: eager, lean, compiled, captured
#   data     the loaders' race at 28 and 224 px, in grey and in colour; the training step with each
#   recipes  ConvNeXt-Tiny at 224 px, EfficientNet-Lite0, three seeds of the default
# Every command's output is kept in OUTPUT_FOLDER/STAGE.tgz; a command that fails is said, and the next one runs.
# DRY=1 runs the same commands on a CPU, made tiny: to see that they are right before a GPU is at hand.
set -u -o pipefail
cd "$(dirname "$0")/.."
stage=${1:?check, ladder, data or recipes} out=$(realpath -m "${2:?a folder for the results}")
python=${PYTHON:-python3} work=$(mktemp -d)
mkdir -p "$out"
trap 'tar -C "$work" -czf "$out/$stage.tgz" --exclude "*.safetensors" --exclude checkpoints --exclude "*.pth" .' EXIT
export PYTHONUNBUFFERED=1
tiny=() cpu=()
if [ "${DRY:-}" ]; then
  export ACCELERATE_USE_CPU=true
  tiny=(--data.limit 1000 --schedule.epochs 2 --augment.size 28) cpu=(--device cpu)
fi

# do NAME SECONDS COMMAND...: the command's output in NAME.txt, its end shown, with the time and the exit status
run() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$work/$name.txt" 2>&1
  echo "=== $name: exit status $?, $((SECONDS - begin)) s: $*"
  tail -n "${LINES_SHOWN:-6}" "$work/$name.txt" | cut -c1-200
}
train() { # train NAME SECONDS OPTIONS...
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" "$python" train.py --log.wandb disabled --output_dir "$work/$name" "$@" ${tiny[@]+"${tiny[@]}"}
}
killed() { # killed NAME OPTIONS...: ended by SIGKILL when its first checkpoint lies there, and started again
  local name=$1
  shift
  train "$name" 200 "$@" >/dev/null &
  local shell=$!
  until compgen -G "$work/$name/checkpoints/step_*" >/dev/null || ! kill -0 $shell 2>/dev/null; do sleep 0.05; done
  sleep 0.5
  pkill -KILL -f "output_dir $work/$name " && wait $shell
  train "$name" 200 "$@"
}
digest() { sed -n 's/.*"weights_sha256": "\(.\{16\}\).*/\1/p' "$work/$1/summary.json"; }
same() { echo "$1 and $2: $(digest "$1") $(digest "$2") $([ "$(digest "$1")" = "$(digest "$2")" ] && echo equal || echo DIFFERENT)"; }

check() {
  run facts 60 bash -c "nvidia-smi; df -h /dev/shm; nproc; $python -m pip list 2>/dev/null | grep -iE '^(torch|triton|timm|accelerate|numpy)'"
  LINES_SHOWN=40 run pytest 240 "$python" -m pytest -q -m gpu -n 4 -p no:cacheprovider &
  short=(--schedule.epochs 2 --augment.size 28)
  train once 200 "${short[@]}"
  train again 200 "${short[@]}"
  killed resumed "${short[@]}"
  train exact 200 "${short[@]}" --exact 2
  killed exact_resumed "${short[@]}" --exact 2
  wait
  for pair in "once again" "once resumed" "exact exact_resumed"; do same $pair; done | tee "$work/same.txt"
  train mlp 120 --config configs/mlp.yaml --schedule.epochs 3
  LINES_SHOWN=14 train cnn 120
  train cnn_compiled 200 --model.compile true
}

ladder() {
  LINES_SHOWN=60 run ladder 570 "$python" -m experiments.convnext_ladder --output "$out/ladder.json" "${cpu[@]}"
}

"$stage"
