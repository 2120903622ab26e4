"""Modules of sd-scripts' and LyCORIS' networks on SDXL in full size.

usage: make_sdxl_keys.py SD_SCRIPTS_FOLDER

Writes ../keys/sdxl.json: for each network its settings, the number of modules of each part, and the SHA-256 of its
modules, one sorted line each, `NAME RANK ALPHA OUTxINxHxW` (a preset's: the name alone). The U-Net is sd-scripts' own class
on the meta device. For how LyCORIS' presets are taken see make_lycoris_keys.py. Of DyLoRA the U-Net alone is written:
sd-scripts gives the modules of both text encoders the same names, of which its files keep one.

With a second folder the lines are written there, to see which differ.
"""

import collections
import hashlib
import json
import pathlib
import sys
import types

import torch
from lycoris import config, kohya
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

stub = types.ModuleType("library.utils")
stub.setup_logging = lambda *args, **kwargs: None
sys.modules["library.utils"] = stub
sys.path.insert(0, sys.argv[1])
from library.sdxl_original_unet import SdxlUNet2DConditionModel  # noqa: E402
from networks import dylora, lora  # noqa: E402

for preset in config.PRESET.values():
    modules = preset.get("unet_target_module", [])
    preset["unet_target_module"] = [name for name in modules if name != "TimestepEmbedding"]

with torch.device("meta"):
    unet = SdxlUNet2DConditionModel()
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    encoders = [CLIPTextModel(first), CLIPTextModelWithProjection(second)]


def numbers(*runs):
    return ",".join(str(value) for value, times in runs for _ in range(times))


BLOCKS = dict(
    block_dims=numbers((2, 1), (4, 6), (0, 1), (8, 2), (16, 3), (6, 4), (0, 2), (4, 3), (2, 1)),
    block_alphas=numbers((1, 10), (2, 13)),
    conv_block_dims=numbers((2, 10), (0, 3), (4, 10)),
    conv_block_alphas=numbers((1, 23)),
)
RATES = dict(
    conv_dim=2,
    conv_alpha=1,
    down_lr_weight=numbers((0, 4), (0.5, 5)),
    mid_lr_weight="0.25,1,0",
    up_lr_weight="reverse_linear",
)
NETWORKS = {
    "lierla": (lora, 4, 1.0, {}),
    "c3lier": (lora, 4, 1.0, dict(conv_dim=2, conv_alpha=1)),
    "blocks": (lora, 4, 1.0, BLOCKS),
    "rates": (lora, 4, 1.0, RATES),
    "dylora": (dylora, 8, 4.0, dict(unit=4)),
    "dylora_conv": (dylora, 8, 4.0, dict(unit=4, conv_dim=8, conv_alpha=2)),
}


def modules(net):
    return net.text_encoder_loras + net.unet_loras


def layer(module):
    weight = (module.org_module[0] if isinstance(module.org_module, list) else module.org_module).weight
    return "x".join(map(str, weight.shape))


def summary(lines, settings):
    # transformers 5 has one level less in its names than the version that sd-scripts pins.
    lines = sorted(
        line if "text_model" in line else line.replace("_encoder_layers", "_text_model_encoder_layers") for line in lines
    )
    counts = collections.Counter(line.split("_")[1] for line in lines)
    if len(sys.argv) > 2:
        pathlib.Path(sys.argv[2], f"{len(out)}.txt").write_text("\n".join(lines) + "\n")
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    return dict(settings=settings, modules=counts, sha256=digest)


out = {}
for name, (kind, dim, alpha, settings) in NETWORKS.items():
    net = kind.create_network(1.0, dim, alpha, None, encoders, unet, **settings)
    found = net.unet_loras if kind is dylora else modules(net)
    lines = [f"{m.lora_name} {m.lora_dim} {float(m.alpha):g} {layer(m)}" for m in found]
    out[name] = summary(lines, dict(dim=dim, alpha=alpha, **{k: str(v) for k, v in settings.items()}))
for preset in config.PRESET:
    if preset != "ia3":
        net = kohya.create_network(
            1.0, 8, 4, None, encoders, unet, preset=preset, conv_dim=4, conv_alpha=1, warn_on_unmatched=False
        )
        out[f"preset {preset}"] = summary([m.lora_name for m in modules(net)], {})
path = pathlib.Path(__file__).parent.parent / "keys" / "sdxl.json"
path.write_text(json.dumps(out, indent=1) + "\n")
print(path, path.stat().st_size)
