#!/usr/bin/env bash
# What `reproducible` costs: the time of a step with and without it, in turns on the same machine.
#
# Usage: benches/reproducible/run.sh [REPEATS]
#   LORARUN   the binary (default: target/release/lorarun)
#   STEPS     steps of a run (default: 12; the first two are left out)
# Trains the quickstart's model on its pictures. Prints per number of ranks and batch a rank the median
# step in ms without and with `reproducible`, and their ratio.
set -euo pipefail
cd "$(dirname "$0")/../.."
repeats=${1:-3}
lorarun=${LORARUN:-target/release/lorarun}
steps=${STEPS:-12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Times of the steps of one run, in ms.
measure() { # ranks batch [flag]
    rm -rf "$work/logs" "$work/out"
    sed "s/^batch_size = .*/batch_size = $2/" examples/quickstart/dataset.toml >"$work/dataset.toml"
    sed "s/^max_train_epochs = .*/max_train_steps = $steps/" examples/quickstart/config.toml \
        >"$work/config.toml"
    "$lorarun" --num_processes "$1" train "$work/config.toml" \
        --dataset_config "$work/dataset.toml" --output_dir "$work/out" \
        --logging_dir "$work/logs" --save_every_n_epochs 1000 "${@:3}" >/dev/null 2>"$work/said" ||
        { cat "$work/said" >&2; exit 1; }
    find "$work/logs" -name steps.jsonl -exec cat {} + |
        awk 'match($0, /"seconds": ?[0-9.e-]+/) {
            split(substr($0, RSTART, RLENGTH), part, ":"); if (NR > 2) print part[2] * 1000 }'
}

median() { sort -n | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'; }

echo "ranks  batch a rank   plain ms   reproducible ms   ratio"
for case in "1 1" "1 2" "1 4" "1 8" "2 1" "2 4" "4 2"; do
    read -r ranks batch <<<"$case"
    : >"$work/plain"
    : >"$work/tree"
    for _ in $(seq "$repeats"); do
        measure "$ranks" "$batch" >>"$work/plain"
        measure "$ranks" "$batch" --reproducible >>"$work/tree"
    done
    plain=$(median <"$work/plain")
    tree=$(median <"$work/tree")
    printf '%5s %13s %10.1f %17.1f %7s\n' "$ranks" "$batch" "$plain" "$tree" \
        "$(awk -v plain="$plain" -v tree="$tree" 'BEGIN { printf "%.2f", tree / plain }')"
done
