"""Writes lr_schedules.json: learning rates of transformers', diffusers' and PyTorch's schedules, step by step.

A case names sd-scripts' options; `build` gives them to the schedules as its get_scheduler_fix does. Two parameter groups
show what an absolute lowest rate does to a rate of its own.
"""
import json
import pathlib
import warnings

import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers import optimization

warnings.simplefilter("ignore")
RATES = [1e-3, 2.5e-4]  # learning_rate, unet_lr
SIMPLE = {
    "constant": optimization.get_constant_schedule,
    "constant_with_warmup": optimization.get_constant_schedule_with_warmup,
    "linear": optimization.get_linear_schedule_with_warmup,
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "cosine_with_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
    "inverse_sqrt": optimization.get_inverse_sqrt_schedule,
    "cosine_with_min_lr": optimization.get_cosine_with_min_lr_schedule_with_warmup,
    "warmup_stable_decay": optimization.get_wsd_schedule,
    "piecewise_constant": get_piecewise_constant_schedule,
}


def build(optimizer, case):
    args = dict(case.get("args", {}))
    if "class" in case:
        return getattr(torch.optim.lr_scheduler, case["class"])(optimizer, **args)
    name, total, warmup = case["scheduler"], case["total_steps"], case.get("warmup_steps", 0)
    decay, cycles = case.get("decay_steps", 0), case.get("num_cycles", 1)
    if name not in ("constant", "piecewise_constant"):
        args["num_warmup_steps"] = warmup
    if name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr"):
        args["num_training_steps"] = total
    if name == "inverse_sqrt":
        args["timescale"] = case.get("timescale")
    if name == "polynomial":
        args["power"] = case.get("power", 1.0)
    if name == "cosine_with_restarts":
        args["num_cycles"] = cycles
    if name == "cosine_with_min_lr":
        args |= {"num_cycles": cycles / 2, "min_lr_rate": case.get("min_lr_ratio")}
    if name == "warmup_stable_decay":
        args |= {"num_stable_steps": total - warmup - decay, "num_decay_steps": decay}
        args |= {"num_cycles": cycles / 2, "min_lr_ratio": case.get("min_lr_ratio", 0.0)}
    return SIMPLE[name](optimizer, **args)


cases = []
for name in ["constant", "constant_with_warmup", "linear", "cosine"]:
    for warmup, total in [(0, 1), (0, 7), (0, 40), (1, 10), (5, 40), (10, 10)]:
        if name != "constant" or not warmup:
            cases.append({"scheduler": name, "warmup_steps": warmup, "total_steps": total})
for settings in [
    {"scheduler": "cosine", "args": {"num_cycles": 1.5}},
    {"scheduler": "cosine_with_restarts"},
    {"scheduler": "cosine_with_restarts", "num_cycles": 3},
    {"scheduler": "cosine_with_restarts", "num_cycles": 4, "warmup_steps": 7},
    {"scheduler": "polynomial"},
    {"scheduler": "polynomial", "power": 2.0, "warmup_steps": 5},
    {"scheduler": "polynomial", "power": 0.5, "args": {"lr_end": 1e-5}},
    {"scheduler": "inverse_sqrt"},
    {"scheduler": "inverse_sqrt", "warmup_steps": 6},
    {"scheduler": "inverse_sqrt", "warmup_steps": 6, "timescale": 20},
    {"scheduler": "inverse_sqrt", "warmup_steps": 6, "timescale": 3},
    {"scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.1},
    {"scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.3, "num_cycles": 3, "warmup_steps": 4},
    {"scheduler": "cosine_with_min_lr", "args": {"min_lr": 1e-4}, "warmup_steps": 4},
    {"scheduler": "warmup_stable_decay"},
    {"scheduler": "warmup_stable_decay", "warmup_steps": 5, "decay_steps": 10},
    {"scheduler": "warmup_stable_decay", "warmup_steps": 15, "decay_steps": 25, "min_lr_ratio": 0.2},
    {"scheduler": "warmup_stable_decay", "decay_steps": 20, "num_cycles": 3, "min_lr_ratio": 0.1},
    {"scheduler": "warmup_stable_decay", "warmup_steps": 8, "decay_steps": 8, "min_lr_ratio": 0.1,
     "args": {"warmup_type": "1-sqrt", "decay_type": "1-sqrt"}},
    {"scheduler": "warmup_stable_decay", "warmup_steps": 8, "decay_steps": 8,
     "args": {"warmup_type": "cosine", "decay_type": "linear"}},
    {"scheduler": "piecewise_constant", "args": {"step_rules": "1:10,0.1:20,0.01:30,0.005"}},
    {"scheduler": "piecewise_constant", "args": {"step_rules": "0.5"}},
    {"class": "ConstantLR"},
    {"class": "ConstantLR", "args": {"factor": 0.25, "total_iters": 9}},
    {"class": "LinearLR"},
    {"class": "LinearLR", "args": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 30}},
    {"class": "ExponentialLR", "args": {"gamma": 0.95}},
    {"class": "PolynomialLR", "args": {"total_iters": 35, "power": 2.0}},
    {"class": "StepLR", "args": {"step_size": 10}},
    {"class": "StepLR", "args": {"step_size": 7, "gamma": 0.5}},
    {"class": "MultiStepLR", "args": {"milestones": [5, 12, 12, 30], "gamma": 0.3}},
    {"class": "CosineAnnealingLR", "args": {"T_max": 40}},
    {"class": "CosineAnnealingLR", "args": {"T_max": 15, "eta_min": 1e-5}},
    {"class": "CosineAnnealingWarmRestarts", "args": {"T_0": 10}},
    {"class": "CosineAnnealingWarmRestarts", "args": {"T_0": 5, "T_mult": 2, "eta_min": 1e-5}},
]:
    cases.append(settings | {"total_steps": 40})

for case in cases:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in RATES]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, RATES)]
    optimizer = torch.optim.AdamW(groups, lr=RATES[0])
    scheduler = build(optimizer, case)
    steps = []
    for _ in range(case["total_steps"] + 1):
        steps.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    case["rates"] = [list(group) for group in zip(*steps)]
path = pathlib.Path(__file__).with_name("lr_schedules.json")
path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
