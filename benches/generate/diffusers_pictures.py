#!/usr/bin/env python
"""Seconds per picture of diffusers' StableDiffusionPipeline on the CPU: what lorarun's pictures are measured against.

    python diffusers_pictures.py FOLDER fp32|bf16 SIDE STEPS PICTURES

The first picture is not counted. Prints one JSON object; progress goes to stderr.
"""

import json
import resource
import statistics
import sys
import time

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline


def main():
    folder, precision, side, steps, pictures = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    started = time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16 if precision == "bf16" else torch.float32, safety_checker=None,
        requires_safety_checker=False,
    )
    # As lorarun: the VAE stays in float32.
    pipeline.vae.to(torch.float32)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    load = time.perf_counter() - started
    seconds = []
    for index in range(pictures + 1):
        started = time.perf_counter()
        latents = pipeline(
            "a photo of a red house by the sea", negative_prompt="blurry", width=side, height=side,
            num_inference_steps=steps, guidance_scale=7.5, generator=torch.Generator("cpu").manual_seed(index),
            output_type="latent",
        ).images
        with torch.no_grad():
            picture = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
        picture = (picture / 2 + 0.5).clamp(0, 1)
        seconds.append(time.perf_counter() - started)
        print(f"picture {index}: {seconds[-1]:.2f} s, mean {float(picture.mean()):.4f}", file=sys.stderr)
    print(json.dumps({
        "engine": f"diffusers, PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
        "load_s": load,
        "median_picture_s": statistics.median(seconds[1:]),
        "picture_s": seconds[1:],
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }))


main()
