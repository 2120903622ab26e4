"""Whether a merged model, and a LoRA extracted from it, predict in diffusers what model and LoRA predict.

    check_merged.py LORARUN MODEL LORA [--ratio R] [--rank N] [--sdxl]

MODEL is a diffusers directory (no tokenizer needed). `lorarun merge` writes a merged directory, `lorarun extract`
takes a LoRA of rank N (at least that of LORA, convolutions too) from it; all are run in float on the same
random latents, tokens and timesteps. Prints the largest difference over the largest value, and the distance
to the model without the LoRA; fails above 1e-4.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline


def load(model, sdxl):
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    parts = {"tokenizer": None} | ({"tokenizer_2": None} if sdxl else {"safety_checker": None})
    return kind.from_pretrained(model, torch_dtype=torch.float32, **parts)


@torch.no_grad()
def predict(pipe, sdxl):
    generator = torch.Generator().manual_seed(5)
    size = 16
    latents = torch.randn(2, pipe.unet.config.in_channels, size, size, generator=generator)
    words = pipe.text_encoder.config.vocab_size
    tokens = torch.randint(0, words, (2, 77), generator=generator)
    timesteps = torch.tensor([31, 761])
    if not sdxl:
        text = pipe.text_encoder(tokens)[0]
        return pipe.unet(latents, timesteps, text).sample
    first = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    second = pipe.text_encoder_2(tokens, output_hidden_states=True)
    text = torch.cat([first, second.hidden_states[-2]], -1)
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * 2)
    added = {"text_embeds": second.text_embeds, "time_ids": sizes}
    return pipe.unet(latents, timesteps, text, added_cond_kwargs=added).sample


def predict_with(model, lora, ratio, sdxl):
    pipe = load(model, sdxl)
    pipe.load_lora_weights(str(lora.parent.absolute()), weight_name=lora.name, adapter_name="x")
    pipe.set_adapters(["x"], [ratio])
    return predict(pipe, sdxl)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lorarun")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("lora", type=pathlib.Path)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sdxl", action="store_true")
    options = parser.parse_args()
    sdxl = options.sdxl
    with tempfile.TemporaryDirectory() as folder:
        merged, extracted = pathlib.Path(folder) / "merged", pathlib.Path(folder) / "extracted.safetensors"
        subprocess.run([options.lorarun, "merge", "--sd_model", options.model, "--models", options.lora,
                        "--ratios", str(options.ratio), "--save_to", merged], check=True)
        subprocess.run([options.lorarun, "extract", "--model_org", options.model, "--model_tuned", merged,
                        "--dim", str(options.rank), "--conv_dim", str(options.rank), "--min_diff", "0",
                        "--clamp_quantile", "1", "--save_to", extracted], check=True)
        ours = {"merged": predict(load(merged, sdxl), sdxl),
                "extracted": predict_with(options.model, extracted, 1.0, sdxl)}
    theirs = predict_with(options.model, options.lora, options.ratio, sdxl)
    plain = predict(load(options.model, sdxl), sdxl)
    largest = theirs.abs().max()
    errors = {name: ((noise - theirs).abs().max() / largest).item() for name, noise in ours.items()}
    for name, error in errors.items():
        print(f"{name} against the LoRA beside the model: {error:.1e}")
    print(f"model without the LoRA against with it: {((plain - theirs).abs().max() / largest).item():.1e}")
    sys.exit(0 if max(errors.values()) <= 1e-4 else 1)


main()
