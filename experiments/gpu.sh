#!/usr/bin/env bash
# What only a GPU can show, in stages of under ten minutes each: experiments/gpu.sh STAGE OUTPUT_FOLDER
#   check    facts; pytest -m gpu; the default run: repeated, killed and resumed, exact, compiled
#   kernels  our depthwise kernels and CUDA graphs against what they replace, after their tests
#   ladder   where a ConvNeXt step's time goes: eager, compiled, with our depthwise kernels
#   large    the ladder's fastest rungs at batch 1024; a step by class of kernel, and the share of it that is idle
#   data     the loaders' race at 28 and 224 px
#   recipes  three seeds of the default and of the speedrun, ConvNeXt-Tiny from scratch at 128 and 224 px
#   wide     the wide residual network
# Outputs are packed into OUTPUT_FOLDER/STAGE.tgz after every command, so that what a limit cuts off is the rest alone. A
# command that fails is said, and the next one runs. Begin with kernels where Triton's cache is empty: it compiles many at
# once, which training does one after another (ConvNeXt-Tiny: eight of about ten seconds for each image size).
# DRY=1 runs the same commands on a CPU, made tiny: to see that they are right before a GPU is at hand.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit
stage=${1:?check, kernels, ladder, large, data, recipes or wide} out=$(realpath -m "${2:?a folder for the results}")
python=${PYTHON:-python3} work=$(mktemp -d)
mkdir -p "$out"
export PYTHONUNBUFFERED=1
tiny=() cpu=() race=() tiles=() interpreted=() small=() narrow=() dry=()
rungs=("compiled" "our depthwise kernel") model=(--models cnn@28 convnext_tiny@224 --variants eager compiled --loaders synthetic ours-triton --rounds 3 --seconds 1)
if [ "${DRY:-}" ]; then
  export ACCELERATE_USE_CPU=true
  tiny=(--data.limit 300 --data.val_size 500 --batch.global_batch_size 50 --schedule.epochs 2 --augment.size 32 --evaluation.test false)
  rungs=("eager") model=(--models cnn@28 --variants eager --loaders synthetic ours-eager --rounds 1 --seconds 0.05)
  cpu=(--device cpu --only eager --rounds 1 --steps 1) race=(--sizes 28 --loaders ours-eager --rounds 2 --seconds 0.05) tiles=(--tiny) interpreted=(env TRITON_INTERPRET=1)
  dry=(--dry) small=(--model.name convnext_atto --model.compile false) narrow=(--model.options '{depth: 10, width: 1}')
fi

# run NAME SECONDS COMMAND...: the command's output in NAME.txt, its end shown, with the time and the exit status
run() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout -k 10 "$limit" "$@" >"$work/$name.txt" 2>&1
  echo "=== $name: exit status $?, $((SECONDS - begin)) s: $*"
  tail -n "${LINES_SHOWN:-6}" "$work/$name.txt" | cut -c1-200
  tar -C "$work" -czf "$out/$stage.tgz" --exclude "*.safetensors" --exclude checkpoints . 2>/dev/null
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
  sleep 0.05
  pkill -KILL -f "output_dir $work/$name " && wait $shell
  train "$name" 200 "$@"
  grep -q "resuming at step" "$work/$name.txt" || echo "$name: NOT RESUMED: it was finished when it was killed"
}
digest() { sed -n 's/.*"weights_sha256": "\(.\{16\}\).*/\1/p' "$work/$1/summary.json"; }
same() { # same "ONE TWO": whether two runs have the same weights
  local one two
  one=$(digest "${1% *}") two=$(digest "${1#* }")
  echo "$1: $one $two $([ "$one" ] && [ "$one" = "$two" ] && echo equal || echo DIFFERENT)"
}

check() {
  local tests=(-n 4)
  "$python" -c "import xdist" 2>/dev/null || tests=()
  run facts 60 bash -c "nvidia-smi; df -h /dev/shm; nproc; $python -m pip list 2>/dev/null | grep -iE '^(torch|triton|timm|accelerate|numpy) '"
  LINES_SHOWN=40 run pytest 240 "$python" -m pytest -q -m gpu ${tests[@]+"${tests[@]}"} -p no:cacheprovider &
  short=(--schedule.epochs 2 --augment.size 28)
  train once 200 "${short[@]}"
  train again 200 "${short[@]}" --model.cuda_graph never
  killed resumed "${short[@]}"
  train exact 200 "${short[@]}" --exact 2
  killed exact_resumed "${short[@]}" --exact 2
  wait
  for pair in "once again" "once resumed" "exact exact_resumed"; do same "$pair"; done | tee "$work/same.txt"
  LINES_SHOWN=14 train cnn 120
  train cnn_compiled 200 --model.compile true
}

kernels() {
  LINES_SHOWN=24 run depthwise 120 ${interpreted[@]+"${interpreted[@]}"} "$python" -m experiments.depthwise_gpu --table --seconds 90 --output "$out/depthwise_gpu.json" ${tiles[@]+"${tiles[@]}"}
  LINES_SHOWN=12 run graphs 120 "$python" -m experiments.capture_speed --rounds 3 --output "$out/capture_speed.json" ${dry[@]+"${dry[@]}"}
  LINES_SHOWN=20 run pytest 240 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_depthwise_triton.py tests/test_captured_step.py tests/test_residual.py
}

ladder() {
  LINES_SHOWN=60 run ladder 570 "$python" -m experiments.convnext_ladder --output "$out/ladder.json" ${cpu[@]+"${cpu[@]}"}
}

large() {
  LINES_SHOWN=20 run ladder_1024 330 "$python" -m experiments.convnext_ladder --output "$out/ladder_1024.json" --batch 1024 --steps 8 --seconds 250 --only "${rungs[@]}" ${cpu[@]+"${cpu[@]}"}
  LINES_SHOWN=40 run profile 240 "$python" -m fmnist benchmark train --profile --output "$out/profile" "${model[@]}"
}

data() {
  LINES_SHOWN=60 run data 400 "$python" -m fmnist benchmark data --output "$out/benchmark" ${race[@]+"${race[@]}"}
}

recipes() {
  for seed in 0 1 2; do train "cnn_$seed" 60 --seed "$seed"; done
  for seed in 0 1 2; do train "speedrun_$seed" 60 --config experiments/recipes/speedrun.yaml --seed "$seed"; done
  train convnext_tiny 400 --config configs/convnext_tiny.yaml --model.pretrained false --model.depthwise triton --optim.lr 0.002 --optim.layer_decay null --optim.head_lr_scale 1 ${small[@]+"${small[@]}"}
}

wide() {
  train wide_resnet 570 --config experiments/recipes/wide_resnet.yaml ${narrow[@]+"${narrow[@]}"}
}

case $stage in
  check | kernels | ladder | large | data | recipes | wide) "$stage" ;;
  *) echo "$stage is no stage: check, kernels, ladder, large, data, recipes or wide" >&2 && exit 2 ;;
esac
