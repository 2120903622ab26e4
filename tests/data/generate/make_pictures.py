"""Whole pictures of diffusers' pipeline with the small model of tests/data/parity.

    python make_pictures.py FOLDER_OF_CLIPS_TOKENIZER

Writes pictures.safetensors: for each case the picture [H,W,3] in 0..1, and in the file's metadata how
it was made. The initial noise is that of PyTorch's CPU generator for the seed.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

MODEL = Path(__file__).parent.parent / "parity" / "model"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "euler": lambda: EulerDiscreteScheduler(**TABLE),
    "euler_a": lambda: EulerAncestralDiscreteScheduler(**TABLE),
    "dpmsolver++": lambda: DPMSolverMultistepScheduler(**TABLE),
}
CASES = [
    {"sampler": "ddim", "steps": 8, "scale": 7.5, "seed": 42, "width": 192, "height": 128,
     "prompt": "a red circle on a white table", "negative": "blurry"},
    {"sampler": "euler", "steps": 6, "scale": 5.0, "seed": 7, "width": 128, "height": 128,
     "prompt": "two blue birds", "negative": ""},
    {"sampler": "euler_a", "steps": 6, "scale": 5.0, "seed": 8, "width": 128, "height": 192,
     "prompt": "two blue birds", "negative": ""},
    {"sampler": "dpmsolver++", "steps": 10, "scale": 1.0, "seed": 3, "width": 128, "height": 128,
     "prompt": "green", "negative": ""},
]


def main():
    parts = dict(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae").float(),
        unet=UNet2DConditionModel.from_pretrained(MODEL / "unet").float(),
        text_encoder=CLIPTextModel.from_pretrained(MODEL / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(sys.argv[1]),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pictures = {}
    for index, case in enumerate(CASES):
        pipeline = StableDiffusionPipeline(**parts, scheduler=SCHEDULERS[case["sampler"]]())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(case["seed"])
        picture = pipeline(
            case["prompt"], negative_prompt=case["negative"], width=case["width"], height=case["height"],
            num_inference_steps=case["steps"], guidance_scale=case["scale"], generator=generator,
            output_type="pt",
        ).images[0]
        pictures[f"picture.{index}"] = picture.permute(1, 2, 0).contiguous().float()
        print(case, tuple(picture.shape), float(picture.mean()), float(picture.std()))
    save_file(pictures, Path(__file__).parent / "pictures.safetensors", {"cases": json.dumps(CASES)})


main()
