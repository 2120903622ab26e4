#!/usr/bin/env bash
# LoRA training steps of SD1.5 at 512, or with FAMILY=sdxl of SDXL at 1024, on one GPU, lorarun and
# PyTorch one after the other in one run.
#
#   LORARUN=path/to/lorarun PYTHON=path/to/python benches/gpu/run.sh
#
# lorarun is the whole product: `lorarun train` on a full-size model with random weights, cached
# latents and text embeddings, from process start to the saved file; its step times are those of its
# own log (median, after the first tenth). PyTorch is `pytorch_gpu.py`, eager and compiled. Prints one
# line per variant with images/s, peak memory (of the process, as nvidia-smi sees it), the share of the
# card's measured matmul rate, the time from process start to the first step, and the ratios.
# BATCHES (default "1 4 8", of SDXL "1 4"), STEPS (default 60) and WORK (folder for files) can be set.
# With SDXL the profile for 8 GB is run at the end, under the enforced limit.
set -euo pipefail
cd "$(dirname "$0")/../.."
lorarun=${LORARUN:?set LORARUN to the binary}
python=${PYTHON:-python3}
work=${WORK:-$(mktemp -d)}
steps=${STEPS:-60}
family=${FAMILY:-sd1}
case $family in
    sd1) side=512 batches="1 4 8" ;;
    sdxl) side=1024 batches="1 4" ;;
    *) echo "FAMILY is sd1 or sdxl" >&2 && exit 64 ;;
esac
export lorarun family side
[ -d "$work/$family" ] || "$lorarun" selftest --write_model "$work/$family" --family "$family"
mkdir -p "$work/pictures/1_drawing"
"$python" - "$work/pictures/1_drawing" "$side" <<'P'
import pathlib, random, sys
from PIL import Image
random.seed(0)
for number in range(32):
    size = (int(sys.argv[2]), int(sys.argv[2]))
    image = Image.effect_noise(size, 60).convert("RGB")
    image.save(pathlib.Path(sys.argv[1]) / f"{number:02}.png")
    (pathlib.Path(sys.argv[1]) / f"{number:02}.txt").write_text(f"drawing number {number}")
P
train() { # NAME BATCH ARGS...
    local name=$1 batch=$2
    shift 2
    "$lorarun" train --pretrained_model_name_or_path "$work/$family" --train_data_dir "$work/pictures" \
        --resolution "$side" --caption_extension .txt --network_module networks.lora --network_dim 16 \
        --network_alpha 16 --network_train_unet_only --learning_rate 1e-4 --seed 1 --max_train_steps "$steps" \
        --train_batch_size "$batch" --cache_latents_to_disk --mixed_precision bf16 --device cuda \
        --output_dir "$work/out" --output_name "$name" --logging_dir "$work/logs/$name" "$@"
}
# Latents are cached and kernels compiled before anything is timed.
train warm 1 --max_train_steps 2 >&2
for batch in ${BATCHES:-$batches}; do
    for checkpointing in "" "--gradient_checkpointing"; do
        name="b$batch${checkpointing:+-checkpointed}"
        rm -rf "$work/logs/$name"
        "$python" benches/gpu/watch.py "$work/$name.json" -- \
            bash -c "$(declare -f train); work='$work' steps='$steps'; train '$name' '$batch' $checkpointing" >&2
        for compiled in "" "--compile"; do
            "$python" benches/gpu/pytorch_gpu.py --family "$family" --batch_size "$batch" $checkpointing $compiled \
                2>"$work/torch.err" >"$work/torch${compiled}.json" ||
                { tail -n 5 "$work/torch.err" >&2; echo '{}' >"$work/torch${compiled}.json"; }
        done
        "$python" benches/gpu/report.py "$name" "$batch" "$work/$name.json" "$work/logs/$name" \
            "$work/torch.json" "$work/torch--compile.json"
    done
done
if [ "$family" = sdxl ]; then
    name=8gb
    rm -rf "$work/logs/$name"
    "$python" benches/gpu/watch.py "$work/$name.json" -- \
        bash -c "$(declare -f train); work='$work' steps='$steps'; train $name 1 --vram_limit 8G" >&2
    "$python" - "$work/$name.json" <<'P'
import json, sys
peak = json.load(open(sys.argv[1]))["peak_gib"]
print(f"8gb                lorarun under an enforced limit of 8 GB: {peak:.2f} GiB")
P
fi
