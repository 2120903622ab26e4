#!/usr/bin/env bash
# Two ranks with NCCL on one card: the same LoRA as one rank with twice the batch, and what happens
# when one of them is killed or hangs in the middle of a step. Needs no cargo and no Python.
#
#   lorarun=path/to/lorarun tests/gpu/two_ranks.sh [cuda|cpu] [folder for files]
#
# With `cpu` the same script runs on the host alone, which tests the script. Ends with 1 at the first
# thing that is wrong; what was seen is on standard output.
set -uo pipefail
lorarun=$(realpath "${lorarun:?the binary to test}")
device=${1:-cuda}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=${2:-${work:-$(mktemp -d)}}/two-ranks
rm -rf "$work"
mkdir -p "$work/pictures/4_drawing" "$work/out"
cp "$root"/tests/gpu/pictures/* "$work/pictures/4_drawing/"

# NCCL takes two ranks of one card for two hosts (the launcher names them, as the variable below asks)
# and reaches them over the loopback interface.
export LORARUN_NCCL_ON_SHARED_CARD=1 NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_DEBUG=WARN
two=(--num_processes 2)
[ "$device" = cpu ] || two+=(--gpu_ids 0,0)

fail() {
    echo "WRONG: $1"
    exit 1
}

# run NAME BATCH STEPS LAUNCHER-OPTIONS... -- TRAIN-OPTIONS...
run() {
    local name=$1 batch=$2 steps=$3 launch=()
    shift 3
    while [ "$1" != -- ]; do
        launch+=("$1")
        shift
    done
    shift
    exec "$lorarun" "${launch[@]}" train \
        --pretrained_model_name_or_path "$root/examples/tiny-sd" \
        --train_data_dir "$work/pictures" --resolution 192 --network_module networks.lora \
        --network_dim 8 --network_alpha 4 --learning_rate 1e-3 --seed 7 --cache_latents \
        --max_data_loader_n_workers 1 --mixed_precision no --device "$device" \
        --train_batch_size "$batch" --max_train_steps "$steps" \
        --output_dir "$work/out" --output_name "$name" "$@"
}

same() {
    "$lorarun" selftest --compare "$work/out/$1.safetensors" "$work/out/$2.safetensors" \
        --tolerance "$3" || fail "$1 and $2 differ"
}

# processes MARK: the processes of a run; with a rank, that rank's.
processes() {
    local folder
    for folder in /proc/[0-9]*; do
        grep -zqx "TWO_RANKS=$1" "$folder/environ" 2>/dev/null || continue
        [ -z "${2:-}" ] || grep -zqx "RANK=$2" "$folder/environ" 2>/dev/null || continue
        echo "${folder#/proc/}"
    done
}

# interrupt NAME SIGNAL LIMIT: starts a long run, sends rank 1 the signal once two files are written,
# and leaves in `code` and `took` how and after how many seconds the run ended.
interrupt() {
    local name=$1 signal=$2 limit=$3 launcher victim started
    echo "== $name: rank 1 gets SIG$signal"
    TWO_RANKS="$name-$$" run "$name" 2 1000000 "${two[@]}" --collective_timeout 10 -- \
        --save_every_n_steps 5 >"$work/$name.log" 2>&1 &
    launcher=$!
    started=$SECONDS
    until [ "$(find "$work/out" -name "$name-*.safetensors" | wc -l)" -ge 2 ]; do
        kill -0 "$launcher" 2>/dev/null || { cat "$work/$name.log"; fail "$name ended by itself"; }
        [ $((SECONDS - started)) -lt 300 ] || fail "$name writes no files"
        sleep 0.2
    done
    victim=$(processes "$name-$$" 1)
    [ -n "$victim" ] || fail "rank 1 of $name was not found"
    # Somewhere within a step.
    sleep "0.$((RANDOM % 90 + 10))"
    started=$SECONDS
    kill "-$signal" $victim
    while kill -0 "$launcher" 2>/dev/null; do
        if [ $((SECONDS - started)) -gt "$limit" ]; then
            kill -KILL "$launcher" $(processes "$name-$$")
            cat "$work/$name.log"
            fail "$name did not end within $limit s"
        fi
        sleep 0.1
    done
    wait "$launcher"
    code=$?
    took=$((SECONDS - started))
    sleep 0.5
    [ -z "$(processes "$name-$$")" ] || fail "processes of $name are left: $(processes "$name-$$")"
    echo "ended with code $code after $took s; its last lines:"
    tail -n 12 "$work/$name.log" | sed 's/^/    /'
    # Every file that was written is whole, the last one above all.
    local file
    for file in "$work/out/$name"-*.safetensors; do
        "$lorarun" selftest --compare "$file" "$file" --tolerance 0 >/dev/null ||
            fail "$file is damaged"
    done
}

echo "== one rank with batch 4, two ranks with batch 2"
(run one 4 8 --num_processes 1 --) || fail "one rank"
if [ "$device" = cpu ]; then
    (run both 2 8 "${two[@]}" --) || fail "two ranks"
    same one both 1e-2
else
    # Sums over the host, by NCCL piece by piece, and by NCCL as part of the captured step.
    (LORARUN_REDUCE=staged run staged 2 8 "${two[@]}" --) || fail "two ranks over the host"
    same one staged 1e-2
    export LORARUN_REDUCE=nccl
    (run eager 2 8 "${two[@]}" -- --no_cuda_graph) || fail "two ranks with NCCL, not captured"
    same one eager 1e-2
    (run captured 2 8 "${two[@]}" --) || fail "two ranks with NCCL, captured"
    same one captured 1e-2
fi

interrupt killed KILL 30
[ "$code" -eq 137 ] || fail "the run of a killed rank ended with code $code"
grep -q "rank 1 of 2 was killed by signal 9" "$work/killed.log" || fail "the killed rank is not named"

# The deadline of ten seconds, and some for the end of the processes.
interrupt frozen STOP 60
[ "$code" -ne 0 ] || fail "the run of a frozen rank ended with code 0"
grep -Eq "waiting for rank 1|all ranks have called it|rank 1 was still busy" "$work/frozen.log" ||
    fail "the frozen rank is not named"
echo "two ranks: all right"
