"""Writes tests/data/networks/parts.json: one linear layer with sd-scripts' LoRA modules in training.

The modules are sd-scripts' own (argument: its folder), with the random numbers given: what they
compute, and the gradients of their weights and of the input under the loss sum(y * g).
"""

import json
import random
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[1])
# What the modules import beside PyTorch and do not need.
for name, item in [("utils", "setup_logging"), ("sdxl_original_unet", "SdxlUNet2DConditionModel")]:
    stub = types.ModuleType(f"library.{name}")
    setattr(stub, item, lambda: None)
    sys.modules[stub.__name__] = stub
from networks.dylora import DyLoRAModule  # noqa: E402
from networks.lora import LoRAModule  # noqa: E402

IN, OUT, DIM, UNIT = 5, 6, 6, 2


def numbers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


WEIGHT, X, G = numbers(OUT, IN, seed=1), numbers(2, 3, IN, seed=2), numbers(2, 3, OUT, seed=3)
DOWN, UP = numbers(DIM, IN, seed=4), numbers(OUT, DIM, seed=5)
RANK_DRAWS = torch.rand(2, DIM, generator=torch.Generator().manual_seed(6))
ELEMENT_DRAWS = torch.rand(2, 3, DIM, generator=torch.Generator().manual_seed(7))


def layer():
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = WEIGHT.clone()
    return linear.requires_grad_(False)


def run(linear):
    x = X.clone().requires_grad_(True)
    y = linear(x)
    (y * G).sum().backward()
    return y.detach(), x.grad


def lora(**dropouts):
    linear = layer()
    module = LoRAModule("m", linear, 1.0, DIM, 3.0, **dropouts)
    module.lora_down.weight.data, module.lora_up.weight.data = DOWN.clone(), UP.clone()
    module.apply_to()
    module.train()
    y, dx = run(linear)
    return {"y": y, "dx": dx, "down": module.lora_down.weight.grad, "up": module.lora_up.weight.grad}


def dropped(x, p):
    return x * (ELEMENT_DRAWS >= p) / (1 - p)


def dylora(draw):
    linear = layer()
    module = DyLoRAModule("m", linear, 1.0, DIM, 3.0, UNIT)
    for i in range(DIM):
        module.lora_A[i].data, module.lora_B[i].data = DOWN[i : i + 1].clone(), UP[:, i : i + 1].clone()
    module.apply_to()
    random.randint = lambda low, high: draw
    y, dx = run(linear)
    moved = [i for i in range(DIM) if module.lora_A[i].grad is not None]
    assert moved == [i for i in range(DIM) if module.lora_B[i].grad is not None]
    return {
        "y": y,
        "dx": dx,
        "moved": moved,
        "down": torch.cat([module.lora_A[i].grad for i in moved]),
        "up": torch.cat([module.lora_B[i].grad for i in moved], dim=1),
    }


torch.nn.functional.dropout = dropped
cases = {}
torch_rand = torch.rand
torch.rand = lambda *shape, **_: RANK_DRAWS if shape != (1,) else torch.tensor([0.5])
cases["dropout"] = lora(dropout=0.25)
cases["rank_dropout"] = lora(rank_dropout=0.5)
cases["all"] = lora(dropout=0.25, rank_dropout=0.5, module_dropout=0.5)
for draw in range(DIM):
    cases[f"dylora_{draw}"] = dylora(draw)
inputs = {
    "weight": WEIGHT, "x": X, "g": G, "down": DOWN, "up": UP,
    "rank_draws": RANK_DRAWS, "element_draws": ELEMENT_DRAWS,
}  # fmt: skip


def plain(value):
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else value


folder = Path(__file__).parent.parent / "networks"
folder.mkdir(exist_ok=True)
(folder / "parts.json").write_text(json.dumps(plain({"inputs": inputs, "cases": cases})) + "\n")
