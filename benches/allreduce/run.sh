#!/usr/bin/env bash
# All-reduce of 1, 10 and 100 MB beside torch gloo, in turns on the same machine, as ratios: 2 and 4
# ranks of one host, then 1 and 2 ranks on each of two hosts, which are network namespaces (root needed,
# skipped with a word otherwise), at full speed and at 1 Gbit/s. Takes four to five minutes.
#
# Usage: benches/allreduce/run.sh [--rounds N] [--repeats N] [--only local|hosts]
#   PYTHON    a Python with torch (default: python3)
#   LORARUN   the binary (default: target/release/lorarun)
# Prints per group and size: our median, gloo's median (each the median over the turns, in ms) and
# gloo / ours: above 1 ours is faster.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
exec "$python" benches/allreduce/beside_gloo.py --python "$python" \
    --lorarun "${LORARUN:-target/release/lorarun}" "$@"
