#!/usr/bin/env python
"""The small reference inside the program (`lorarun selftest` without arguments): model, inputs and results from PyTorch.

usage: make_embedded.py FOLDER      writes FOLDER (trainer/data/selftest), of the shape of tests/data/parity

A Stable Diffusion 1.x in miniature: two U-Net levels of 32 channels in 16 groups, two text layers, 64 tokens. One case
folder, `c3lier`, with LoRA on every layer that can have one.
"""

import json
import pathlib
import sys

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import make_c3lier
from objective import run_case

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "scaling_factor": 0.18215,
    "sample_size": 32,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
}
CASES = [
    ("clip_skip_none", None, {}),
    ("clip_skip_2", 2, {}),
    ("v_param_step0", None, {"v_parameterization": True}),
    ("min_snr5_step0", None, {"min_snr_gamma": 5.0}),
    ("ztsnr_v_step0", None, {"zero_terminal_snr": True, "v_parameterization": True}),
    ("huber_snr_step0", None, {"loss_type": "huber", "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0}),
]


def randomize(model, generator):
    """Weights with which activations neither vanish nor blow up, rounded to float16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.half().eval()


def write_model(folder, generator):
    model = folder / "model"
    unet = randomize(UNet2DConditionModel(**UNET), generator)
    vae = randomize(AutoencoderKL(**VAE), generator)
    text = randomize(CLIPTextModel(CLIPTextConfig(**TEXT)), generator)
    unet.save_pretrained(model / "unet")
    vae.save_pretrained(model / "vae")
    text.save_pretrained(model / "text_encoder")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(model / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (model / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return unet.float(), vae.float(), text.float()


def write_inputs(folder, generator):
    normal = lambda *shape: torch.randn(shape, generator=generator)
    inputs = {
        "latents_raw": 4 * normal(2, 4, 8, 12),
        "noise": normal(5, 2, 4, 8, 12),
        "timesteps": torch.randint(0, 1000, (5, 2), generator=generator),
        "input_ids": torch.randint(0, 64, (2, 77), generator=generator),
        "offset_randn": normal(2, 4, 1, 1),
        "image": normal(1, 3, 32, 24).clamp(-1, 1),
        "vae_noise": normal(1, 4, 16, 12),
    }
    save_file(inputs, folder / "inputs.safetensors")
    return inputs


@torch.no_grad()
def write_base(folder, inputs, unet, vae, text):
    batch = {
        "latents": inputs["latents_raw"] * 0.18215,
        "noise": inputs["noise"][0],
        "offset_randn": inputs["offset_randn"],
        "timesteps": inputs["timesteps"][0],
        "input_ids": inputs["input_ids"],
        "loss_weights": torch.ones(2),
    }
    base = {}
    for clip_skip, name in ((None, "none"), (1, "1"), (2, "2")):
        out = run_case((unet, text), batch, {}, clip_skip)
        base[f"te_clip_skip_{name}"] = out["te_out"]
        if clip_skip != 1:
            base["noise_pred" + ("_clip_skip_2" if clip_skip else "")] = out["noise_pred"]
    posterior = vae.encode(inputs["image"]).latent_dist
    base["vae_mean"] = posterior.mean
    base["vae_logvar"] = posterior.logvar
    base["vae_sample_scaled"] = (posterior.mean + posterior.std * inputs["vae_noise"]) * 0.18215
    base["vae_decode_of_mean"] = vae.decode(posterior.mean).sample
    save_file({key: value.contiguous() for key, value in base.items()}, folder / "base.safetensors")


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(11)
    unet, vae, text = write_model(folder, generator)
    write_base(folder, write_inputs(folder, generator), unet, vae, text)
    spec = {
        "network": {
            "network_module": "networks.lora",
            "network_dim": 4,
            "network_alpha": 1.0,
            "network_args": ["conv_dim=4", "conv_alpha=1"],
        },
        "loss_weights": [1, 1],
        "cases": [{"name": n, "clip_skip": skip, "step": 0, "options": options} for n, skip, options in CASES],
        "adamw": {
            "groups": ["textencoder", "unet"],
            "lr": [0.0005, 0.001],
            "betas": [0.9, 0.999],
            "eps": 1e-08,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
        },
    }
    make_c3lier.write_folder(folder, spec, None)


if __name__ == "__main__":
    main()
