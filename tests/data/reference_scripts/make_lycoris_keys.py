"""Layers of LyCORIS' presets, and keys and shapes of its files, on Stable Diffusion 1.

usage: make_lycoris_keys.py SD_SCRIPTS_FOLDER

Writes ../keys/lycoris.json. The U-Net is sd-scripts' own class, as in training, without numbers.
LyCORIS 4.1.3 lists the class `TimestepEmbedding` for another model (Anima); on this U-Net that makes
`full`, `full-lin` and `unet-only` fail (a layer is named twice) and adds two layers to `attn-mlp` and
`unet-transformer-only`. The class is taken out here: this is what LyCORIS 1 to 3 trained.
"""

import json
import pathlib
import sys
import types

import torch
from lycoris import config, kohya
from transformers import CLIPTextConfig, CLIPTextModel

# `library.utils` imports torchvision and more for things that the model does not use.
stub = types.ModuleType("library.utils")
stub.setup_logging = lambda *args, **kwargs: None
sys.modules["library.utils"] = stub
sys.path.insert(0, sys.argv[1])
from library.original_unet import UNet2DConditionModel  # noqa: E402

for preset in config.PRESET.values():
    modules = preset.get("unet_target_module", [])
    preset["unet_target_module"] = [name for name in modules if name != "TimestepEmbedding"]

with torch.device("meta"):
    unet = UNet2DConditionModel(
        sample_size=64,
        attention_head_dim=8,
        cross_attention_dim=768,
        use_linear_projection=False,
        upcast_attention=False,
    )
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def network(**settings):
    return kohya.create_network(1.0, 8, 4, None, encoder, unet, warn_on_unmatched=False, **settings)


def modules(net):
    return net.text_encoder_loras + net.unet_loras


out = {"presets": {}, "networks": {}}
for preset in config.PRESET:
    if preset != "ia3":
        names = sorted(module.lora_name for module in modules(network(preset=preset)))
        out["presets"][preset] = names
NETWORKS = {
    "loha": dict(algo="loha", conv_dim=4, conv_alpha=1, use_tucker=True),
    "lokr": dict(algo="lokr", factor=8),
    "lokr_default": dict(algo="lokr", conv_dim=2, decompose_both=True),
}
for name, settings in NETWORKS.items():
    shapes, alphas = {}, {}
    for module in modules(network(**settings)):
        for key, value in module.custom_state_dict().items():
            if key == "alpha":
                alphas[module.lora_name] = value.item()
            else:
                shapes[f"{module.lora_name}.{key}"] = list(value.shape)
    # Transformers of one width have the same shapes: the first of each block says it all.
    keep = lambda key: "unet" in key or "layers_0_" in key
    out["networks"][name] = {
        "shapes": {key: value for key, value in sorted(shapes.items()) if keep(key)},
        "alphas": {key: value for key, value in sorted(alphas.items()) if keep(key)},
    }
# transformers 5 has one level less in its names than the version that sd-scripts pins.
text = json.dumps(out, separators=(",", ":")).replace("lora_te_encoder", "lora_te_text_model_encoder")
path = pathlib.Path(__file__).parent.parent / "keys" / "lycoris.json"
path.write_text(text.replace("],\"", "],\n\"") + "\n")
print(path, path.stat().st_size, {preset: len(names) for preset, names in out["presets"].items()})
