"""What changes pictures of SDXL, on the small model of tests/data/parity-sdxl: LoRAs, second prompts, clip_skip, img2img.

    python make_sdxl_changes.py FOLDER_OF_CLIPS_TOKENIZER [FOLDER_FOR_THE_LORA]

Writes sdxl_changes.safetensors: for each case the mean colours [8,8,3] of 8x8 squares of the picture, and in the file's
metadata how it was made. LoRAs are added to the weights here, by their definition; then diffusers loads the same files,
and its pictures are compared. `c3lier` has numbers of a simple generator for each key, so that the test can make it too.
`clip_skip` is sd-scripts' (diffusers counts from the layer before the last, and leaves the negative prompt as it is).
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DATA = Path(__file__).parent.parent
sys.path.insert(0, str(DATA / "reference_scripts"))
from check_diffusers_load import both  # noqa: E402

MODEL = DATA / "parity-sdxl" / "model"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SIDE, CELL = 64, 8
PLAIN = {"lora": None, "prompt_2": None, "negative_2": None, "clip_skip": None, "strength": None, "scale": 3.0}
CASES = [
    {**PLAIN},
    {**PLAIN, "lora": "lierla"},
    {**PLAIN, "lora": "c3lier"},
    {**PLAIN, "prompt_2": "night", "negative_2": "a pale drawing"},
    {**PLAIN, "clip_skip": 3, "scale": 1.0},
    {**PLAIN, "strength": 0.75},
]
MASK = (1 << 64) - 1


def numbers(key, count):
    """Numbers in -1..1 that depend on the key alone."""
    state = 0xCBF29CE484222325
    for byte in key.encode():
        state = ((state ^ byte) * 0x100000001B3) & MASK
    state |= 1
    found = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1) & MASK
        found.append(np.float32(state >> 40) / np.float32(1 << 23) - np.float32(1))
    return torch.tensor(np.array(found, dtype=np.float32))


def load(tokenizers):
    return dict(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae").float(),
        unet=UNet2DConditionModel.from_pretrained(MODEL / "unet").float(),
        text_encoder=CLIPTextModel.from_pretrained(MODEL / "text_encoder").float(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(MODEL / "text_encoder_2").float(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers, model_max_length=77),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizers, model_max_length=77, pad_token="!"),
    )


def pipeline(parts, kind=StableDiffusionXLPipeline):
    pipe = kind(
        **parts, scheduler=EulerDiscreteScheduler(**TABLE), force_zeros_for_empty_prompt=False, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(pipe):
    """What sd-scripts' C3Lier has modules for."""
    for name, module in both(pipe, (torch.nn.Linear, torch.nn.Conv2d)).items():
        outer = name.endswith(("_conv_in", "_conv_out")) or "_embedding_" in name or "text_projection" in name
        if not outer:
            yield name, module


def c3lier(pipe, path):
    rank, tensors = 2, {}
    for name, module in layers(pipe):
        out, columns, *window = module.weight.shape
        down, up = (rank, columns, *window), (out, rank, *[1 for _ in window])
        tensors[f"{name}.lora_down.weight"] = 0.3 * numbers(f"{name}.lora_down.weight", int(np.prod(down))).reshape(down)
        tensors[f"{name}.lora_up.weight"] = 0.3 * numbers(f"{name}.lora_up.weight", int(np.prod(up))).reshape(up)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    print(path, len(tensors) // 3, "modules")


def add(pipe, path):
    """up @ down * alpha / rank on every layer; all of the file must have a place."""
    tensors = load_file(path)
    known = dict(layers(pipe))
    names = {key.split(".")[0] for key in tensors}
    assert names <= set(known), sorted(names - set(known))[:3]
    for name in names:
        weight = known[name].weight
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
        with torch.no_grad():
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def given():
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    picture = np.stack([x / SIDE, y / SIDE, np.full_like(x, 0.5)], axis=-1)
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def picture(pipe, case):
    more = {"image": given(), "strength": case["strength"]} if case["strength"] else {"width": SIDE, "height": SIDE}
    made = pipe(
        "a red circle", negative_prompt="blurry", prompt_2=case["prompt_2"], negative_prompt_2=case["negative_2"],
        clip_skip=case["clip_skip"] and case["clip_skip"] - 2, original_size=(SIDE, SIDE), target_size=(SIDE, SIDE),
        num_inference_steps=4, guidance_scale=case["scale"], generator=torch.Generator("cpu").manual_seed(3), output_type="pt", **more,
    ).images[0]
    return made.float()


def cells(made):
    return made.reshape(3, SIDE // CELL, CELL, SIDE // CELL, CELL).mean(dim=(2, 4)).permute(1, 2, 0).contiguous()


def main():
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    files = {"lierla": DATA / "parity-sdxl" / "lierla" / "init.safetensors", "c3lier": folder / "c3lier.safetensors"}
    c3lier(pipeline(load(sys.argv[1])), files["c3lier"])
    tensors = {}
    for index, case in enumerate(CASES):
        kind = StableDiffusionXLImg2ImgPipeline if case["strength"] else StableDiffusionXLPipeline
        pipe = pipeline(load(sys.argv[1]), kind)
        if case["lora"]:
            add(pipe, files[case["lora"]])
        made = picture(pipe, case)
        tensors[f"cells.{index}"] = cells(made)
        change = float((tensors[f"cells.{index}"] - tensors["cells.0"]).abs().mean())
        print(case, f"mean {float(made.mean()):.3f}, from the first {change:.2e}")
        if case["lora"]:
            pipe = pipeline(load(sys.argv[1]))
            pipe.load_lora_weights(str(files[case["lora"]].parent), weight_name=files[case["lora"]].name)
            print("  by diffusers' loader, mean difference:", f"{float((picture(pipe, case) - made).abs().mean()):.2e}")
    save_file(tensors, Path(__file__).parent / "sdxl_changes.safetensors", {"cases": json.dumps(CASES)})


main()
