"""Outputs and gradients of LyCORIS' modules, for the tests of models/src/lora/composed.

Writes ../lora/adapters.safetensors. Each case is a kind of network on three layers: its tensors as
LyCORIS saves them, the layer's output for one input, and the gradients of the mean squared error
against fixed numbers. Computed in f64; feature maps are stored [B,H,W,C], weights [out,kh,kw,in],
the module's own tensors and their gradients as in files.

Needs torch 2.11 and lycoris_lora 4.1.3.
"""

import pathlib

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import nn

DIM, ALPHA = 2, 1.5

CASES = {
    "locon_tucker": (LoConModule, dict(use_tucker=True)),
    "locon_rs": (LoConModule, dict(rs_lora=True)),
    "dora": (LoConModule, dict(weight_decompose=True)),
    "loha": (LohaModule, {}),
    "loha_tucker": (LohaModule, dict(use_tucker=True)),
    "loha_dora": (LohaModule, dict(weight_decompose=True, rs_lora=True)),
    "lokr": (LokrModule, {}),
    "lokr_factor": (LokrModule, dict(factor=2)),
    "lokr_both": (LokrModule, dict(factor=4, decompose_both=True, lora_dim=1)),
    "lokr_full": (LokrModule, dict(full_matrix=True)),
    "lokr_tucker": (LokrModule, dict(factor=2, use_tucker=True)),
    "lokr_dora": (LokrModule, dict(weight_decompose=True, unbalanced_factorization=True)),
}


def layers():
    return {
        "linear": (nn.Linear(16, 12), (5, 16)),
        "conv3": (nn.Conv2d(12, 16, 3, stride=2, padding=1), (2, 12, 5, 6)),
        "conv1": (nn.Conv2d(16, 12, 1), (1, 16, 3, 2)),
    }


def last(t):
    """Channels last."""
    return (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).detach().float().contiguous()


def main():
    torch.manual_seed(20261122)
    out = {}
    shared = {}
    for name, (layer, shape) in layers().items():
        weight = torch.randn(layer.weight.shape).double() * 0.3
        x = torch.randn(shape).double()
        with torch.no_grad():
            size = layer.double()(x).shape
        shared[name] = (weight, x, torch.randn(size).double())
        for key, value in zip(("weight", "x", "target"), shared[name]):
            out[f"{name}/{key}"] = last(value)
    for case, (kind, settings) in CASES.items():
        for name, (layer, _) in layers().items():
            weight, x, target = shared[name]
            layer = layer.double()
            layer.weight.data.copy_(weight)
            layer.bias.data.zero_()
            settings = {"lora_dim": DIM, **settings}
            module = kind(f"lora_unet_{name}", layer, alpha=ALPHA, **settings)
            if "dora_scale" in module.state_dict():
                out[f"{case}/start/{name}"] = module.dora_scale.detach().float().flatten().clone()
            module = module.double()
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape).float().double()
                # Lengths stay positive.
                scale = 0.1 if parameter.shape[1:].numel() == 1 and parameter.dim() > 1 else 0.5
                parameter.data.copy_((parameter.data * 0.5 + noise * scale).float().double())
            module.apply_to()
            tracked = x.clone().requires_grad_()
            y = layer(tracked)
            ((y - target) ** 2).mean().backward()
            out[f"{case}/y/{name}"] = last(y)
            out[f"{case}/dx/{name}"] = last(tracked.grad)
            for key, value in module.state_dict().items():
                out[f"{case}/file/lora_unet_{name}.{key}"] = value.detach().float().contiguous()
            for key, value in module.named_parameters():
                if not key.startswith("org_module"):
                    gradient = value.grad.detach().float().contiguous()
                    out[f"{case}/grad/lora_unet_{name}.{key}"] = gradient
    path = pathlib.Path(__file__).parent.parent / "lora" / "adapters.safetensors"
    save_file({key: value.clone() for key, value in out.items()}, path)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
