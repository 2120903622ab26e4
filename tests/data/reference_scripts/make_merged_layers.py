"""Writes ../tools/merged_layers: layers, an adapter with a module of every kind for them, and the merged weights as
LyCORIS makes them.

Needs torch, safetensors and lycoris_lora (4.1). The scale of LoHa and LoKr counts once, as in their forward passes and in
every loader; LyCORIS' own get_merged_weight multiplies by it twice.
"""
import json
from pathlib import Path
import torch
from safetensors.torch import save_file
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.full import FullModule
from lycoris.functional.general import weight_decompose

OUT = Path(__file__).resolve().parent.parent / "tools" / "merged_layers"
torch.manual_seed(11)
LINEAR, POINT, CONV = "linear", "point", "conv"


def layer(kind):
    if kind == LINEAR:
        return torch.nn.Linear(12, 10)
    return torch.nn.Conv2d(12, 10, 1 if kind == POINT else 3)


CASES = [
    ("lora_linear", LINEAR, LoConModule, {}),
    ("lora_point", POINT, LoConModule, {}),
    ("lora_conv", CONV, LoConModule, {}),
    ("lora_tucker", CONV, LoConModule, {"use_tucker": True}),
    ("dora_linear", LINEAR, LoConModule, {"weight_decompose": True}),
    ("dora_linear_in", LINEAR, LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    ("dora_conv", CONV, LoConModule, {"weight_decompose": True}),
    ("dora_conv_in", CONV, LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    ("loha_linear", LINEAR, LohaModule, {}),
    ("loha_conv", CONV, LohaModule, {}),
    ("loha_tucker", CONV, LohaModule, {"use_tucker": True}),
    ("loha_dora", CONV, LohaModule, {"weight_decompose": True}),
    ("lokr_linear", LINEAR, LokrModule, {"lora_dim": 2}),
    ("lokr_both", LINEAR, LokrModule, {"decompose_both": True, "lora_dim": 1}),
    ("lokr_whole", LINEAR, LokrModule, {"full_matrix": True}),
    ("lokr_conv", CONV, LokrModule, {"lora_dim": 2}),
    ("lokr_conv_whole", CONV, LokrModule, {"full_matrix": True}),
    ("lokr_tucker", CONV, LokrModule, {"use_tucker": True, "lora_dim": 2}),
    ("full_linear", LINEAR, FullModule, {}),
    ("full_conv", CONV, FullModule, {}),
]

weights, adapter, merged = {}, {}, {}
with torch.no_grad():
    for name, kind, module_class, options in CASES:
        name, org = f"lora_unet_{name}", layer(kind)
        options = {"lora_dim": 3, "alpha": 1.5, **options}
        module = module_class(name, org, 1.0, **options)
        for parameter in module.parameters():
            if any(parameter is own for own in org.parameters()):
                continue
            parameter.copy_(torch.randn_like(parameter) * 0.4)
        if getattr(module, "wd", False):
            module.dora_scale.copy_(module.dora_scale.abs() + 0.5)
        shape = org.weight.shape
        if module_class is FullModule:
            state = {"diff": module.weight.clone(), "diff_b": module.bias.clone()}
            weight, bias = org.weight + module.weight, org.bias + module.bias
        else:
            state = module.custom_state_dict()
            if module_class is not LoConModule:
                weight = org.weight + module.get_weight(shape)
                if module.wd:
                    weight = weight_decompose(weight, module.dora_scale)
            else:
                weight = module.get_merged_weight(1, shape)[0]
            bias = org.bias
        weights[f"{name}.weight"] = org.weight.detach().clone()
        weights[f"{name}.bias"] = org.bias.detach().clone()
        merged[f"{name}.weight"], merged[f"{name}.bias"] = weight.detach().clone(), bias.detach().clone()
        for key, value in state.items():
            adapter[f"{name}.{key}"] = value.detach().clone().contiguous()
OUT.mkdir(parents=True, exist_ok=True)
for file, tensors in [("layers", weights), ("adapter", adapter), ("merged", merged)]:
    save_file({key: value.contiguous() for key, value in tensors.items()}, str(OUT / f"{file}.safetensors"))
print({name: sorted(k.split(".", 1)[1] for k in adapter if k.startswith(f"lora_unet_{name}.")) for name, *_ in CASES})
