"""Pairs of names of full-size Stable Diffusion 1, 2 and XL: LDM layout beside diffusers'.

python make_layouts.py SD_SCRIPTS_FOLDER OUT_FOLDER

Needs PyTorch, diffusers, transformers and a checkout of sd-scripts. No weights: every tensor is made
with sizes of 1 and holds a number of its own, goes through sd-scripts' conversion to the LDM layout,
and back through diffusers' loader of single files; both must agree. Shapes are those of the models
on the meta device.

A line: LDM name, component/diffusers name (three for joined projections), shape in the LDM layout,
and `bias` when the same holds for the bias (the last `weight` replaced, the shape's first number).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from library import model_util, sdxl_model_util
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = Path(sys.argv[2])

BLOCKS = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
UNETS = {
    "sd1": dict(BLOCKS, cross_attention_dim=768, attention_head_dim=8),
    "sd2": dict(
        BLOCKS,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sdxl": {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in sdxl_model_util.DIFFUSERS_SDXL_UNET_CONFIG.items()
    },
}
VAE = dict(model_util.create_vae_diffusers_config())
# hidden, intermediate, layers
TEXTS = {
    "sd1": [("text_encoder", 768, 3072, 12)],
    "sd2": [("text_encoder", 1024, 4096, 23)],
    "sdxl": [("text_encoder", 768, 3072, 12), ("text_encoder_2", 1280, 5120, 32)],
}


def shapes(make):
    with torch.device("meta"):
        model = make()
    names = model.state_dict()
    # Newer transformers leave the outer name out of the module, files have it.
    prefix = "text_model." if "embeddings.token_embedding.weight" in names else ""
    return {prefix + k: tuple(v.shape) for k, v in names.items() if not k.endswith("position_ids")}


class Tags:
    """Tensors of one number, to be told apart afterwards."""

    def __init__(self):
        self.names = []

    def of(self, name, shape):
        self.names.append(name)
        return torch.full((1,) * len(shape), len(self.names) - 1, dtype=torch.int64)

    def read(self, tensor):
        return [self.names[i] for i in tensor.flatten().tolist()]


def ldm_of(family, tagged):
    """sd-scripts' names: LDM name -> tagged tensor."""
    out = {}
    if family == "sdxl":
        unet = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(tagged["unet"])
    else:
        unet = model_util.convert_unet_state_dict_to_sd(family == "sd2", tagged["unet"])
    out.update({f"model.diffusion_model.{k}": v for k, v in unet.items()})
    vae = model_util.convert_vae_state_dict(tagged["vae"])
    out.update({f"first_stage_model.{k}": v for k, v in vae.items()})
    if family == "sd2":
        text = model_util.convert_text_encoder_state_dict_to_sd_v2(tagged["text_encoder"])
        out.update({f"cond_stage_model.model.{k}": v for k, v in text.items()})
    else:
        prefix = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        text = tagged["text_encoder"]
        out.update({f"{prefix}.transformer.{k}": v for k, v in text.items()})
    if family == "sdxl":
        text = sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(tagged["text_encoder_2"], None)
        out.update({f"conditioner.embedders.1.model.{k}": v for k, v in text.items()})
    return out


def check_back(family, ldm, tagged):
    """diffusers' loader of single files finds every tensor under its name again."""
    config = dict(UNETS[family], layers_per_block=2)
    config.setdefault("class_embed_type", None)
    config.setdefault("addition_embed_type", None)
    config.setdefault("num_class_embeds", None)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(ldm), config)
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(ldm), VAE)

    class Text:
        class config:
            hidden_size = 1

    found = {"unet": unet, "vae": vae}
    if family == "sd2":
        found["text_encoder"] = single_file_utils.convert_open_clip_checkpoint(Text, dict(ldm))
    else:
        found["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(dict(ldm))
    if family == "sdxl":
        prefix = "conditioner.embedders.1.model."
        found["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(Text, dict(ldm), prefix)
    for component, names in tagged.items():
        back = found[component]
        known = {k for k in names}
        extra = {k for k in back if k not in known}
        assert not extra, (family, component, sorted(extra)[:5])
        for name, tensor in names.items():
            assert back[name].flatten().tolist() == tensor.flatten().tolist(), (family, component, name)


def shape_in_ldm(key, name, shape):
    if ".in_proj_" in key:
        return (3 * shape[0],) + shape[1:]
    if ".mid.attn_1." in key and len(shape) == 2:
        return shape + (1, 1)
    if key.endswith(".text_projection"):
        return shape[::-1]
    return shape


for family, unet in UNETS.items():
    parts = {"unet": shapes(lambda: UNet2DConditionModel(**unet)), "vae": shapes(lambda: AutoencoderKL(**VAE))}
    for folder, hidden, inner, layers in TEXTS[family]:
        config = CLIPTextConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, projection_dim=hidden
        )
        cls = CLIPTextModelWithProjection if folder == "text_encoder_2" else CLIPTextModel
        parts[folder] = shapes(lambda: cls(config))
    tags = Tags()
    tagged = {c: {n: tags.of(f"{c}/{n}", s) for n, s in names.items()} for c, names in parts.items()}
    ldm = ldm_of(family, tagged)
    check_back(family, ldm, tagged)
    lines = {}
    for key, tensor in sorted(ldm.items()):
        names = tags.read(tensor)
        component, name = names[0].split("/")
        shape = shape_in_ldm(key, name, parts[component][name])
        lines[key] = (names, shape)
    text = []
    for key, (names, shape) in lines.items():
        as_bias = lambda s: s[: -len("weight")] + "bias" if s.endswith("weight") else None
        if key.endswith("bias") and key[:-4] + "weight" in lines:
            continue
        bias = as_bias(key)
        with_bias = bias in lines
        if with_bias:
            assert lines[bias] == ([as_bias(n) for n in names], (shape[0],)), bias
        fields = [key, " ".join(names), "x".join(map(str, shape))] + (["bias"] if with_bias else [])
        text.append("\t".join(fields) + "\n")
    (OUT / f"{family}.txt").write_text("".join(text))
    print(family, len(lines), "tensors", len(text), "lines", sum(map(len, text)), "bytes")
