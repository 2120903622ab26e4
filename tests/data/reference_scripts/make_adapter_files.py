"""Writes ../adapters: one small adapter file of every naming, by the libraries that write such files.

Needs torch, diffusers, transformers, peft, safetensors and lycoris_lora. The layers' sizes are tiny; names are those of
SD1, SD2 and SDXL. `expected.json` says of each file what every module adds to its layer's weight, as the library computes it
(sum of squares and the first values), under sd-scripts' names.
"""
import json, os, shutil, sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, LoHaConfig, LoKrConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = Path(__file__).resolve().parent.parent / "adapters"
torch.manual_seed(3)
expected = {}


def unet(family):
    sdxl, linear = family == "sdxl", family != "sd1"
    if sdxl:
        sizes = dict(block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                     up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 2),
                     addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=72)
    else:
        sizes = dict(block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return UNet2DConditionModel(sample_size=8, layers_per_block=2, norm_num_groups=4, cross_attention_dim=24, attention_head_dim=4,
                                use_linear_projection=linear, **sizes)


def text(kind=CLIPTextModel):
    return kind(CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                               max_position_embeddings=8, projection_dim=8))


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def add(model, prefix, config, prefix_kohya, deltas):
    """A PEFT adapter on `model`; what it adds goes into `deltas`."""
    model.add_adapter(config)
    randomise(model)
    collect(model, prefix_kohya, deltas)
    return get_peft_model_state_dict(model, adapter_name="default")


def collect(model, prefix, deltas, cut=""):
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            name = name.removeprefix(cut)
            if prefix.startswith("lora_te") and not name.startswith("text_model."):
                name = "text_model." + name
            deltas[prefix + name.replace(".", "_")] = module.get_delta_weight("default").detach()


def sgm(name):
    """sd-scripts' name of an SDXL U-Net module of this file."""
    table = {"down_blocks_1_attentions_0_": "input_blocks_4_1_", "mid_block_attentions_0_": "middle_block_1_",
             "up_blocks_0_resnets_2_conv1": "output_blocks_2_0_in_layers_2", "up_blocks_1_upsamplers_0_conv": "output_blocks_5_2_conv",
             "down_blocks_0_downsamplers_0_conv": "input_blocks_3_0_op"}
    for old, new in table.items():
        if name.startswith("lora_unet_" + old):
            return name.replace(old, new, 1)
    return name


def note(file, deltas, rename=lambda name: name):
    expected[file] = {rename(name): {"shape": list(d.shape), "squares": (d.double() ** 2).sum().item(), "first": d.flatten()[:3].tolist()}
                      for name, d in sorted(deltas.items())}


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUTPUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
PROJ = "up_blocks.1.attentions.2.proj_in"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT = ["layers.0.self_attn.q_proj", "layers.1.mlp.fc1"]


def with_metadata():
    """Today's diffusers: lora_A/lora_B, alphas and patterns in the header."""
    deltas = {}
    model, te = unet("sd1"), text()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[QUERY, OUTPUT, PROJ, CONV], rank_pattern={QUERY: 3}, alpha_pattern={QUERY: 5})
    te_config = LoraConfig(r=2, lora_alpha=1, target_modules=TEXT)
    layers, te_layers = add(model, "unet.", config, "lora_unet_", deltas), add(te, "text_encoder.", te_config, "lora_te_", deltas)
    from diffusers.training_utils import _collate_lora_metadata
    StableDiffusionPipeline.save_lora_weights(OUT, layers, te_layers, weight_name="diffusers_metadata.safetensors",
                                              **_collate_lora_metadata({"unet": model, "text_encoder": te}))
    note("diffusers_metadata.safetensors", deltas)


def before_peft():
    """`.lora.down.weight` and `.lora_linear_layer.down.weight`; no alpha anywhere."""
    deltas = {}
    model, te = unet("sd2"), text()
    layers = add(model, "unet.", LoraConfig(r=2, lora_alpha=2, target_modules=[QUERY, OUTPUT, PROJ]), "lora_unet_", deltas)
    te_layers = add(te, "text_encoder.", LoraConfig(r=2, lora_alpha=2, target_modules=TEXT), "lora_te_", deltas)
    layers = {k.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up"): v for k, v in layers.items()}
    te_layers = convert_state_dict_to_diffusers(te_layers)
    te_layers = {k.replace(".lora_A", ".lora_linear_layer.down").replace(".lora_B", ".lora_linear_layer.up"): v for k, v in te_layers.items()}
    StableDiffusionPipeline.save_lora_weights(OUT, layers, te_layers, weight_name="diffusers_before_peft.safetensors")
    note("diffusers_before_peft.safetensors", deltas)


def sdxl():
    deltas = {}
    model, te, te2 = unet("sdxl"), text(), text(CLIPTextModelWithProjection)
    names = ["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "mid_block.attentions.0.proj_in", "up_blocks.0.resnets.2.conv1",
             "up_blocks.1.upsamplers.0.conv", "down_blocks.0.downsamplers.0.conv"]
    layers = add(model, "unet.", LoraConfig(r=2, lora_alpha=2, target_modules=names), "lora_unet_", deltas)
    te_layers = add(te, "text_encoder.", LoraConfig(r=2, lora_alpha=2, target_modules=TEXT), "lora_te1_", deltas)
    te2_layers = add(te2, "text_encoder_2.", LoraConfig(r=2, lora_alpha=2, target_modules=TEXT), "lora_te2_", deltas)
    StableDiffusionXLPipeline.save_lora_weights(OUT, layers, te_layers, te2_layers, weight_name="diffusers_sdxl.safetensors")
    note("diffusers_sdxl.safetensors", deltas, sgm)


def folder(name, config):
    """A PEFT model saved by PEFT: `base_model.model.` and adapter_config.json."""
    model = get_peft_model(unet("sd1"), config)
    randomise(model)
    deltas = {}
    collect(model, "lora_unet_", deltas, "base_model.model.")
    shutil.rmtree(OUT / name, ignore_errors=True)
    model.save_pretrained(OUT / name)
    for extra in ("README.md",):
        (OUT / name / extra).unlink(missing_ok=True)
    note(f"{name}/adapter_model.safetensors", deltas)


def main():
    OUT.mkdir(exist_ok=True)
    with_metadata()
    before_peft()
    sdxl()
    folder("peft_rslora", LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[QUERY, PROJ]))
    folder("peft_loha", LoHaConfig(r=2, alpha=3, target_modules=[QUERY, CONV], use_effective_conv2d=True))
    folder("peft_lokr", LoKrConfig(r=2, alpha=3, target_modules=[QUERY, CONV], use_effective_conv2d=True, decompose_both=True, decompose_factor=4))
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
