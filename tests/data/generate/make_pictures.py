"""Whole pictures of diffusers' pipeline with the small model of tests/data/parity.

    python make_pictures.py FOLDER_OF_CLIPS_TOKENIZER

Writes pictures.safetensors: for each case the picture [H,W,3] in 0..1, and in the file's metadata how
it was made. The initial noise is that of PyTorch's CPU generator for the seed. changed_pictures.safetensors
has pictures that were made from the picture `image`, of the whole and where `mask` [H,W] is white.

The inpainting pipeline thresholds masks and takes every eighth pixel of them; here it is given the soft
mask that gen_img makes of a picture, by Pillow's bilinear filter.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

MODEL = Path(__file__).parent.parent / "parity" / "model"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=True, steps_offset=1),
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
CHANGES = [
    {"sampler": "ddim", "steps": 8, "strength": 0.6, "scale": 5.0, "seed": 5, "masked": False},
    {"sampler": "euler_a", "steps": 7, "strength": 0.8, "scale": 3.0, "seed": 6, "masked": False},
    {"sampler": "ddim", "steps": 8, "strength": 0.75, "scale": 3.0, "seed": 8, "masked": True},
]
WIDTH, HEIGHT = 96, 64


class SoftInpaint(StableDiffusionInpaintPipeline):
    """Blends by the mask that it is told, in latents."""

    def prepare_mask_latents(self, mask, *args, **kwargs):
        _, masked = super().prepare_mask_latents(mask, *args, **kwargs)
        soft = torch.from_numpy(np.array(self.soft_mask))[None, None]
        return torch.cat([soft] * 2), masked


def given():
    """A picture of soft colours, and a mask of eight bits."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    picture = np.stack([x / WIDTH, y / HEIGHT, 0.5 + 0.5 * np.sin(x / 9) * np.cos(y / 7)], axis=-1)
    mask = np.where((x > 37) & (y > 11), 255, 0).astype(np.uint8)
    return (picture * 255).round().astype(np.uint8), mask


def changed(parts):
    picture, mask = given()
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    tensors = {"image": torch.from_numpy(picture), "mask": torch.from_numpy(mask)}
    soft = Image.fromarray(mask.astype(np.float32) / 255).resize((WIDTH // 8, HEIGHT // 8), Image.BILINEAR)
    for index, case in enumerate(CHANGES):
        kind = SoftInpaint if case["masked"] else StableDiffusionImg2ImgPipeline
        pipeline = kind(**parts, scheduler=SCHEDULERS[case["sampler"]]())
        pipeline.set_progress_bar_config(disable=True)
        more = {}
        if case["masked"]:
            pipeline.soft_mask = soft
            more = {"mask_image": torch.from_numpy(mask)[None, None].float() / 255, "width": WIDTH, "height": HEIGHT}
        result = pipeline(
            "a green tree", negative_prompt="blurry", image=image, strength=case["strength"],
            num_inference_steps=case["steps"], guidance_scale=case["scale"],
            generator=torch.Generator("cpu").manual_seed(case["seed"]), output_type="pt", **more,
        ).images[0]
        tensors[f"picture.{index}"] = result.permute(1, 2, 0).contiguous().float()
        print(case, tuple(result.shape), float((result - image[0]).abs().mean()))
    save_file(tensors, Path(__file__).parent / "changed_pictures.safetensors", {"cases": json.dumps(CHANGES)})


def main():
    parts = dict(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae").float(),
        unet=UNet2DConditionModel.from_pretrained(MODEL / "unet").float(),
        text_encoder=CLIPTextModel.from_pretrained(MODEL / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(sys.argv[1], model_max_length=77),
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
    changed(parts)


main()
