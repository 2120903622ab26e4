#!/usr/bin/env bash
# Seconds per picture, ours and diffusers', one after the other in one run; prints times, peaks, ratios.
# Needs a Python with torch, diffusers and transformers: PYTHON=/path/to/python benches/generate/run.sh
# STEPS, PICTURES and SIDE say what is made, FOLDER where the model of random weights is kept (9 GB).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-10} PICTURES=${PICTURES:-3} SIDE=${SIDE:-512}
target=${CARGO_TARGET_DIR:-target}
FOLDER=${FOLDER:-$target/bench-generate}
cargo build --release --locked -p models --example seconds_per_picture >&2
mkdir -p "$FOLDER"
if [ ! -e "$FOLDER/sd15.safetensors" ]; then
    cargo run --release --locked -p bench-model -- "$FOLDER/sd15.safetensors" >&2
fi
if [ ! -e "$FOLDER/sd15/model_index.json" ]; then
    cargo run --release --locked -p launcher -- convert --model "$FOLDER/sd15.safetensors" --save_to "$FOLDER/sd15" >&2
fi
for precision in fp32 bf16; do
    ours=$("$target/release/examples/seconds_per_picture" "$FOLDER/sd15.safetensors" "$precision" "$SIDE" "$STEPS" "$PICTURES")
    theirs=$("$PYTHON" benches/generate/diffusers_pictures.py "$FOLDER/sd15" "$precision" "$SIDE" "$STEPS" "$PICTURES")
    "$PYTHON" - "$precision ${SIDE}x${SIDE}, $STEPS steps" "$ours" "$theirs" <<'P'
import json, sys
name, ours, theirs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
t, m = (ours["median_picture_s"], theirs["median_picture_s"]), (ours["peak_rss_gib"], theirs["peak_rss_gib"])
print(f"{name:25} picture {t[0]:7.2f} s, diffusers {t[1]:7.2f} s: {t[0]/t[1]:.2f}   "
      f"peak {m[0]:5.2f} GiB, diffusers {m[1]:5.2f} GiB: {m[0]/m[1]:.2f}   "
      f"load {ours['load_s']:.1f} s, diffusers {theirs['load_s']:.1f} s")
P
done
