#!/usr/bin/env bash
# All-reduce over local ranks: ours beside torch gloo, in turns on the same machine, as ratios.
#
# Usage: benches/allreduce/run.sh [REPEATS]
#   PYTHON    a Python with torch (default: python3)
#   LORARUN   the binary (default: target/release/lorarun)
#   ROUNDS    rounds per size and repeat (default: 15)
# Prints per world size and size: our median, gloo's median (each the median over the repeats, in
# ms) and gloo / ours: above 1 ours is faster.
set -euo pipefail
cd "$(dirname "$0")/../.."
repeats=${1:-3}
python=${PYTHON:-python3}
lorarun=${LORARUN:-target/release/lorarun}
rounds=${ROUNDS:-15}
sizes=(1000000 10000000 100000000)
results=$(mktemp)
trap 'rm -f "$results"' EXIT

for world in 2 4; do
    for _ in $(seq "$repeats"); do
        "$lorarun" --num_processes "$world" check-ranks --rounds "$rounds" \
            --sizes "$(IFS=,; echo "${sizes[*]}")" |
            awk -v world="$world" '/^all_reduce/ { print "ours", world, $2, $5 }' >>"$results"
        "$python" benches/allreduce/gloo.py "$world" "$rounds" "${sizes[@]}" |
            awk -v world="$world" '{ print "gloo", world, $1, $2 }' >>"$results"
    done
done

echo "ranks      bytes    ours ms    gloo ms   gloo / ours"
for world in 2 4; do
    for size in "${sizes[@]}"; do
        median() {
            awk -v who="$1" -v world="$world" -v size="$size" \
                '$1 == who && $2 == world && $3 == size { print $4 }' "$results" | sort -n |
                awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'
        }
        printf '%5s %10s %10s %10s %13s\n' "$world" "$size" "$(median ours)" "$(median gloo)" \
            "$(awk -v ours="$(median ours)" -v gloo="$(median gloo)" 'BEGIN { printf "%.1f", gloo / ours }')"
    done
done
