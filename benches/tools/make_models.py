"""Writes full-size files of random numbers for the measurements of the tools.

    make_models.py LORARUN FOLDER [--sdxl]

FOLDER gets sd15.safetensors (2 GB, half precision, LDM layout), sd15_tuned.safetensors (the same plus
a low-rank change and noise, as a fine-tune looks), lora_r4.safetensors, lora_r32.safetensors and twelve
pictures. --sdxl adds sdxl.safetensors and sdxl_tuned.safetensors (7 GB each). What exists is kept.
Needs numpy and safetensors; SDXL also diffusers and transformers, for the shapes alone.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import zlib

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


def generator(name):
    """The same numbers for the same name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def changed(name, weight):
    """A fine-tune's weight: a change of rank 8 with falling singular values, and noise."""
    if weight.ndim < 2 or weight.dtype != np.float16:
        return weight
    rng = generator(name)
    matrix = weight.astype(np.float32).reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    size = float(matrix.std()) or 1.0
    rank = min(8, rows, columns)
    up = rng.standard_normal((rows, rank), dtype=np.float32) * 0.6 ** np.arange(rank, dtype=np.float32)
    down = rng.standard_normal((rank, columns), dtype=np.float32)
    noise = rng.standard_normal(matrix.shape, dtype=np.float32)
    matrix = matrix + size * (0.1 * up @ down + 0.02 * noise)
    return matrix.astype(np.float16).reshape(weight.shape)


def write_streamed(path, shapes, fill):
    """A safetensors file of half-precision tensors, one in memory at a time."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(np.ascontiguousarray(fill(name, shape), dtype=np.float16).tobytes())


def tuned_copy(source, target):
    with safe_open(source, "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        write_streamed(target, shapes, lambda name, _: changed(name, file.get_tensor(name)))


def write_lora(path, rank):
    """All modules that networks.lora trains in SD1.5, with values as after training."""
    shapes = json.loads((ROOT / "tests/data/keys/lierla_r4.json").read_text())["shapes"]
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".alpha"):
            tensors[name] = np.array(rank / 2, dtype=np.float32)
            continue
        axis = 0 if "lora_down" in name else 1
        shape = [rank if at == axis else size for at, size in enumerate(shape)]
        tensors[name] = generator(path.name + name).standard_normal(shape, dtype=np.float32) * 0.02
    facts = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
             "ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)}
    save_file(tensors, str(path), facts)


def write_pictures(folder):
    """Twelve pictures of photographs' sizes: smooth shapes with noise, PNG and JPEG."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for index in range(12):
        width, height = [(1600, 1200), (1200, 1800), (2048, 1536), (1920, 1080)][index % 4]
        x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
        layers = [np.sin(x * (1 + c) + index) * np.cos(y * (2 - 0.4 * c)) for c in range(3)]
        noise = generator(f"picture {index}").normal(0, 6, (height, width, 3))
        pixels = np.clip(128 + 90 * np.stack(layers, -1) + noise, 0, 255).astype(np.uint8)
        ending = "png" if index % 3 == 0 else "jpg"
        Image.fromarray(pixels).save(folder / f"picture{index:02}.{ending}", quality=92)


def sdxl_shapes():
    """{file: {tensor: shape}} of a diffusers folder; models without memory for their weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = dict(
        act_fn="silu", addition_embed_type="text_time", addition_time_embed_dim=256,
        attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], layers_per_block=2,
        projection_class_embeddings_input_dim=2816, sample_size=128,
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True)
    vae = dict(
        block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    large = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_attention_heads=20,
                           num_hidden_layers=32, projection_dim=1280, hidden_act="gelu")
    small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                           num_hidden_layers=12, projection_dim=768, hidden_act="quick_gelu")
    with torch.device("meta"):
        models = {
            "unet/diffusion_pytorch_model.safetensors": UNet2DConditionModel(**unet),
            "vae/diffusion_pytorch_model.safetensors": AutoencoderKL(**vae),
            "text_encoder/model.safetensors": CLIPTextModel(small),
            "text_encoder_2/model.safetensors": CLIPTextModelWithProjection(large),
        }
    return {
        path: {name: list(tensor.shape) for name, tensor in model.state_dict().items()
               if not name.endswith("position_ids")}
        for path, model in models.items()
    }


def write_sdxl(lorarun, folder):
    source = folder / "sdxl"
    for path, shapes in sdxl_shapes().items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)

        def fill(name, shape):
            if len(shape) == 1:
                return np.ones(shape) if name.endswith("weight") else np.zeros(shape)
            size = float(np.prod(shape[1:])) ** -0.5
            return generator(name).standard_normal(shape, dtype=np.float32) * size

        write_streamed(source / path, shapes, fill)
    (source / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    subprocess.run([lorarun, "convert", "--model", source, "--save_to", folder / "sdxl.safetensors"],
                   check=True)
    subprocess.run(["rm", "-r", source], check=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lorarun")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--sdxl", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "sd15.safetensors"
    if not model.exists():
        parts = folder / "sd15"
        subprocess.run([options.lorarun, "selftest", "--write_model", parts], check=True)
        subprocess.run([options.lorarun, "convert", "--model", parts, "--save_to", model], check=True)
        subprocess.run(["rm", "-r", parts], check=True)
    if not (folder / "sd15_tuned.safetensors").exists():
        tuned_copy(model, folder / "sd15_tuned.safetensors")
    for rank in [4, 32]:
        for copy in ["", "b"]:
            path = folder / f"lora_r{rank}{copy}.safetensors"
            if not path.exists():
                write_lora(path, rank)
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
    if options.sdxl:
        if not (folder / "sdxl.safetensors").exists():
            write_sdxl(options.lorarun, folder)
        if not (folder / "sdxl_tuned.safetensors").exists():
            tuned_copy(folder / "sdxl.safetensors", folder / "sdxl_tuned.safetensors")


if __name__ == "__main__":
    main()
