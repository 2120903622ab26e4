"""Whether a model with a LoRA merged into it predicts the same noise in diffusers as the model with the LoRA.

    check_merged.py LORARUN MODEL LORA [--ratio R] [--sdxl]

MODEL is a diffusers directory (no tokenizer needed). `lorarun merge` writes a merged directory; both are run in
float on the same random latents, tokens and timesteps. Prints the largest difference over the largest value,
and the distance to the model without the LoRA; fails above 1e-4.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lorarun")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("lora", type=pathlib.Path)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--sdxl", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        merged = pathlib.Path(folder) / "merged"
        subprocess.run([options.lorarun, "merge", "--sd_model", options.model, "--models", options.lora,
                        "--ratios", str(options.ratio), "--save_to", merged], check=True)
        ours = predict(load(merged, options.sdxl), options.sdxl)
    pipe = load(options.model, options.sdxl)
    plain = predict(pipe, options.sdxl)
    pipe.load_lora_weights(str(options.lora.parent.absolute()), weight_name=options.lora.name, adapter_name="x")
    pipe.set_adapters(["x"], [options.ratio])
    theirs = predict(pipe, options.sdxl)
    largest = theirs.abs().max()
    error = ((ours - theirs).abs().max() / largest).item()
    print(f"merged against LoRA beside the model: {error:.1e}")
    print(f"model without the LoRA against with it: {((plain - theirs).abs().max() / largest).item():.1e}")
    sys.exit(0 if error <= 1e-4 else 1)


main()
