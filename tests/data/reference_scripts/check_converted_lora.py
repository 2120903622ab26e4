"""usage: check_converted_lora.py MODEL_DIR KOHYA_FILE CONVERTED_FILE

Loads CONVERTED_FILE (`lorarun convert --to diffusers` of KOHYA_FILE) in diffusers and compares what every module adds to its
layer with alpha / rank * up @ down of KOHYA_FILE. Fails on any module that differs by more than 1e-6 or is not there. Also says
how many modules of KOHYA_FILE itself diffusers gives another strength. LoRA without DoRA; SD1, SD2 or SDXL by MODEL_DIR.
"""
import os, sys, warnings
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

warnings.simplefilter("ignore")
model, kohya, converted = sys.argv[1:4]
is_sdxl = os.path.exists(os.path.join(model, "text_encoder_2"))
Pipeline = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
parts = dict(tokenizer=None, **(dict(tokenizer_2=None) if is_sdxl else dict(safety_checker=None)))


def loaded(file):
    pipe = Pipeline.from_pretrained(model, torch_dtype=torch.float32, **parts)
    pipe.load_lora_weights(os.path.dirname(os.path.abspath(file)), weight_name=os.path.basename(file), adapter_name="x")
    deltas = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in getattr(pipe, component, torch.nn.Module()).named_modules():
            if isinstance(layer, LoraLayer) and "x" in layer.lora_A:
                a, b = layer.lora_A["x"].weight.flatten(1).double(), layer.lora_B["x"].weight.flatten(1).double()
                deltas[f"{component}.{name.removeprefix('text_model.')}"] = b @ a * layer.scaling["x"]
    return deltas


def difference(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


ours, theirs, tensors = loaded(converted), loaded(kohya), load_file(kohya)
worst, missing, mis_scaled = 0.0, [], 0
# SDXL's U-Net has other names in the file: its layers are found by their numbers.
by_numbers = {tuple(t.flatten()[:6].tolist()): t for t in ours.values()}
for name in sorted({key.split(".")[0] for key in tensors}):
    down, up = (tensors[f"{name}.lora_{half}.weight"].flatten(1).double() for half in ("down", "up"))
    delta = up @ down * (tensors[f"{name}.alpha"].double() / down.shape[0])
    got = by_numbers.get(tuple(delta.flatten()[:6].tolist()))
    if got is None or got.shape != delta.shape:
        close = [t for t in ours.values() if t.shape == delta.shape and difference(t, delta) < 1e-6]
        got = close[0] if close else None
    if got is None:
        missing.append(name)
    else:
        worst = max(worst, difference(got, delta))
mis_scaled = sum(difference(theirs[name], ours[name]) > 1e-6 for name in ours)
print(f"{len(ours)} modules in diffusers, largest relative difference {worst:.3g}, missing {missing[:3]}")
print(f"modules of the file before conversion with another strength in diffusers: {mis_scaled}")
sys.exit(1 if missing or worst > 1e-6 or ours.keys() != theirs.keys() else 0)
