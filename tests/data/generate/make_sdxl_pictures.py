"""Whole pictures of diffusers' SDXL pipeline with the small model of tests/data/parity-sdxl.

    python make_sdxl_pictures.py FOLDER_OF_CLIPS_TOKENIZER

Writes sdxl_pictures.safetensors: for each case the picture [H,W,3] in 0..1, and in the file's metadata how
it was made. The second text encoder's tokenizer pads with `!` (0). `sizes`: original height and width, top
and left of the crop, and original height and width for the negative prompt; without it those of the picture.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MODEL = Path(__file__).parent.parent / "parity-sdxl" / "model"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {"euler": EulerDiscreteScheduler, "euler_a": EulerAncestralDiscreteScheduler}
CASES = [
    {"sampler": "euler", "steps": 6, "scale": 5.0, "seed": 7, "width": 128, "height": 96,
     "prompt": "two blue birds", "negative": "", "sizes": None},
    {"sampler": "euler_a", "steps": 5, "scale": 3.0, "seed": 8, "width": 96, "height": 128,
     "prompt": "a red circle on a white table", "negative": "blurry", "sizes": [512, 384, 16, 0, 64, 80]},
]


def main():
    parts = dict(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae").float(),
        unet=UNet2DConditionModel.from_pretrained(MODEL / "unet").float(),
        text_encoder=CLIPTextModel.from_pretrained(MODEL / "text_encoder").float(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(MODEL / "text_encoder_2").float(),
        tokenizer=CLIPTokenizer.from_pretrained(sys.argv[1], model_max_length=77),
        tokenizer_2=CLIPTokenizer.from_pretrained(sys.argv[1], model_max_length=77, pad_token="!"),
    )
    print("the second tokenizer pads with", parts["tokenizer_2"].pad_token_id)
    pictures = {}
    for index, case in enumerate(CASES):
        pipeline = StableDiffusionXLPipeline(
            **parts, scheduler=SCHEDULERS[case["sampler"]](**TABLE), force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        size = (case["height"], case["width"])
        more = {"original_size": size, "target_size": size}
        if case["sizes"]:
            height, width, top, left, negative_height, negative_width = case["sizes"]
            more |= {
                "original_size": (height, width), "crops_coords_top_left": (top, left),
                "negative_original_size": (negative_height, negative_width),
                "negative_crops_coords_top_left": (top, left), "negative_target_size": size,
            }
        picture = pipeline(
            case["prompt"], negative_prompt=case["negative"], width=case["width"], height=case["height"],
            num_inference_steps=case["steps"], guidance_scale=case["scale"], output_type="pt",
            generator=torch.Generator("cpu").manual_seed(case["seed"]), **more,
        ).images[0]
        pictures[f"picture.{index}"] = picture.permute(1, 2, 0).contiguous().float()
        print(case, tuple(picture.shape), float(picture.mean()), float(picture.std()))
    save_file(pictures, Path(__file__).parent / "sdxl_pictures.safetensors", {"cases": json.dumps(CASES)})


main()
