#!/usr/bin/env bash
# The training step, ours and PyTorch's, one after the other in one run; prints times, peaks, ratios.
# Needs a Python with torch, diffusers and transformers: PYTHON=/path/to/python benches/step/run.sh
# STEPS (default 3) counts the timed steps; further arguments go to both sides.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-3}
cargo build --release --locked -p bench-step >&2
bin=${CARGO_TARGET_DIR:-target}/release/bench-step
for variant in "--precision fp32" "--precision fp32 --gradient_checkpointing" \
               "--precision bf16" "--precision bf16 --gradient_checkpointing"; do
    # shellcheck disable=SC2086  # the variants are lists of words
    ours=$("$bin" $variant --steps "$STEPS" "$@" 2>/dev/null)
    # shellcheck disable=SC2086
    theirs=$("$PYTHON" benches/step/pytorch_step.py $variant --steps "$STEPS" "$@" 2>/dev/null)
    "$PYTHON" - "$variant" "$ours" "$theirs" <<'P'
import json, sys
name, ours, theirs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
t, m = (ours["median_step_s"], theirs["median_step_s"]), (ours["peak_rss_gib"], theirs["peak_rss_gib"])
print(f"{name.replace('--', ''):45} step {t[0]:6.2f} s, PyTorch {t[1]:6.2f} s: {t[0]/t[1]:.2f}   "
      f"peak {m[0]:5.2f} GiB, PyTorch {m[1]:5.2f} GiB: {m[0]/m[1]:.2f}")
P
done
