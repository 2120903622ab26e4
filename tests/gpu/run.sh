#!/usr/bin/env bash
# Checks of a built binary on a machine with an NVIDIA GPU; needs no cargo and no Python.
#
#   tests/gpu/run.sh path/to/lorarun [folder for files, default a temporary one]
#
# Every operation forward and backward against the CPU, the parity set, ten training steps beside the
# CPU's, two ranks with NCCL on one card against one rank with twice the batch, a rank killed in the
# middle of a step, and full-size runs under 8 GB and 6 GB. Prints one line per check and a summary;
# ends with 1 if any failed. KEEP=1 keeps the files.
set -uo pipefail
lorarun=$(realpath "${1:?usage: tests/gpu/run.sh path/to/lorarun [folder]}")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${2:-$(mktemp -d)}
mkdir -p "$work"
[ -n "${KEEP:-}" ] || [ -n "${2:-}" ] || trap 'rm -rf "$work"' EXIT
export lorarun root work
passed=0 failed=()

# check NAME COMMAND...: runs the command, keeps its output in a file, notes how it ended.
check() {
    local name=$1 log="$work/$(echo "$1" | tr ' /' '--').log" started=$SECONDS
    shift
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name ($((SECONDS - started)) s)"
    else
        failed+=("$name")
        echo "FAILED  $name ($((SECONDS - started)) s); the end of $log:"
        tail -n 15 "$log" | sed 's/^/        /'
    fi
}

compare() { "$lorarun" selftest --compare "$1" "$2" --tolerance "$3"; }

mkdir -p "$work/drawings/4_drawing"
cp "$root"/tests/gpu/pictures/* "$work/drawings/4_drawing/"

# train NAME DEVICE ARGS...: ten steps on the small model and twelve drawings.
train() {
    local name=$1 device=$2
    shift 2
    "$lorarun" train --pretrained_model_name_or_path "$root/examples/tiny-sd" \
        --train_data_dir "$work/drawings" --resolution 192 --network_module networks.lora \
        --network_dim 8 --network_alpha 4 --learning_rate 1e-3 --cache_latents --seed 7 \
        --train_batch_size 2 --max_train_steps 10 --device "$device" \
        --output_dir "$work/out" --output_name "$name" "$@"
}

ten_steps() {
    train "cpu-$1" cpu && train "card-$1" cuda "${@:3}" &&
        compare "$work/out/cpu-$1.safetensors" "$work/out/card-$1.safetensors" "$2"
}

# The dataset of the full-size runs: the drawings in buckets around 512.
full_size() {
    local name=$1
    shift
    (cd "$root" && "$lorarun" train --pretrained_model_name_or_path "$work/sd15" \
        --train_data_dir "$work/pictures" --resolution 512 --network_module networks.lora \
        --network_dim 16 --network_alpha 8 --learning_rate 1e-4 --max_train_steps 12 --seed 3 \
        --cache_latents --mixed_precision bf16 --device cuda \
        --output_dir "$work/out" --output_name "$name" --logging_dir "$work/logs-$name" "$@")
}

"$lorarun" doctor || echo "(doctor found something amiss)"
check "operations" "$lorarun" selftest --device cuda --operations
check "parity embedded" "$lorarun" selftest --device cuda
for case in lierla c3lier; do
    check "parity $case" "$lorarun" selftest --device cuda \
        --reference "$root/tests/data/parity/$case" --base "$root/tests/data/parity"
done
check "parity lierla checkpointed" "$lorarun" selftest --device cuda --gradient_checkpointing \
    --reference "$root/tests/data/parity/lierla" --base "$root/tests/data/parity"
# Ten steps of AdamW amplify rounding: float32 agrees to 1e-3 of a tensor's largest weight, the
# half-precision types to a tenth.
check "ten steps float32" ten_steps float32 1e-3
check "ten steps float32, no graph" ten_steps eager 1e-3 --no_cuda_graph
check "ten steps bf16" ten_steps bf16 0.1 --mixed_precision bf16
check "ten steps fp16" ten_steps fp16 0.1 --mixed_precision fp16
if [ -x "$root/tests/gpu/two_ranks.sh" ]; then
    check "two ranks and a kill" "$root/tests/gpu/two_ranks.sh"
fi
check "write a full-size model" "$lorarun" selftest --write_model "$work/sd15"
mkdir -p "$work/pictures/2_drawing"
cp "$root"/tests/gpu/pictures/* "$work/pictures/2_drawing/"
check "full size" full_size free --train_batch_size 1
check "full size, batch 4 under 8 GB" full_size limit8 --train_batch_size 4 --vram_limit 8GB
check "full size with text encoder under 6 GB" full_size limit6 --train_batch_size 1 --vram_limit 6GB
check "full size fp16 under 6 GB" full_size fp16 --mixed_precision fp16 --vram_limit 6GB

echo "$passed passed, ${#failed[@]} failed"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
