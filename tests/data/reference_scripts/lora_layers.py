"""LoRA layers put on diffusers' U-Net and transformers' CLIP text model by forward hooks, in plain PyTorch.

Which layers, their names and their arithmetic are those of sd-scripts' `networks.lora`: Linear and 1x1 convolutions use
dim/alpha, 3x3 convolutions use conv_dim/conv_alpha and are only taken when conv_dim is given. Nothing else is changed in
the models: frozen weights stay frozen, the LoRA halves are the only parameters that require gradients.
"""

import torch
from torch import nn

UNET_TARGETS = ("Transformer2DModel",)
UNET_CONV_TARGETS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_TARGETS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


class LoraLayer(nn.Module):
    """org(x) + up(down(x)) * alpha / dim, hooked onto one Linear or Conv2d."""

    def __init__(self, name, layer, dim, alpha):
        super().__init__()
        self.name = name
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(
                layer.in_channels, dim, layer.kernel_size, layer.stride, layer.padding, bias=False
            )
            self.lora_up = nn.Conv2d(dim, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, dim, bias=False)
            self.lora_up = nn.Linear(dim, layer.out_features, bias=False)
        self.dim = dim
        self.alpha = alpha
        layer.register_forward_hook(self.add_to_output)

    def add_to_output(self, _layer, inputs, output):
        return output + self.lora_up(self.lora_down(inputs[0])) * (self.alpha / self.dim)


def target_layers(root, prefix, classes):
    """(kohya name, layer) of every Linear and Conv2d below a module of one of `classes`, in module order."""
    found = {}
    for parent_name, parent in root.named_modules():
        if type(parent).__name__ not in classes:
            continue
        for name, layer in parent.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                path = ".".join(part for part in (prefix, parent_name, name) if part)
                found.setdefault(path.replace(".", "_"), layer)
    return found


def add_lora(unet, text_encoder, dim, alpha, conv_dim=None, conv_alpha=None):
    """Puts LoRA layers on the given models (either may be None); returns {kohya name: LoraLayer}."""
    layers = {}
    if text_encoder is not None:
        # transformers 5 dropped the `text_model` level from CLIPTextModel; the file's names keep it.
        prefix = "lora_te" if hasattr(text_encoder, "text_model") else "lora_te.text_model"
        layers.update(target_layers(text_encoder, prefix, TEXT_TARGETS))
    if unet is not None:
        classes = UNET_TARGETS + (UNET_CONV_TARGETS if conv_dim else ())
        layers.update(target_layers(unet, "lora_unet", classes))
    made = {}
    for name, layer in layers.items():
        pointwise = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
        if pointwise:
            made[name] = LoraLayer(name, layer, dim, alpha)
        elif conv_dim:
            made[name] = LoraLayer(name, layer, conv_dim, conv_alpha)
    return made


def lora_tensors(layers):
    """{file key: tensor} of the trainable halves, sorted."""
    named = {}
    for name, layer in layers.items():
        named[f"{name}.lora_down.weight"] = layer.lora_down.weight
        named[f"{name}.lora_up.weight"] = layer.lora_up.weight
    return dict(sorted(named.items()))


def file_tensors(layers):
    """What a LoRA file holds: both halves and the 0-dim alpha of every module, sorted, float32."""
    named = {key: tensor.detach().clone().float() for key, tensor in lora_tensors(layers).items()}
    for name, layer in layers.items():
        named[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
    return dict(sorted(named.items()))
