"""Writes ../objective: noise, target and loss of sd-scripts for given random draws and options.

    make_noise.py SD_SCRIPTS_FOLDER

The functions are taken out of sd-scripts' files and run as they are; only their sources of random numbers are replaced by
the draws that are stored beside the results. Each sample goes through alone, as a batch of one: what sd-scripts draws or
measures once for a batch belongs to the sample here.
"""

import argparse
import ast
import json
import math
import pathlib
import random
import sys
import types

import numpy
import torch
from diffusers import DDPMScheduler
from safetensors.numpy import save_file

B, C, H, W = 3, 4, 10, 7
TIMESTEPS = [0, 437, 999]
LOSS_WEIGHTS = [1.0, 0.5, 1.0]
MAX_OCTAVES = 6
OUT = pathlib.Path(__file__).parent.parent / "objective"

NOISE_CASES = {
    "plain": {},
    "offset": {"noise_offset": 0.1},
    "offset_random": {"noise_offset": 0.1, "noise_offset_random_strength": True},
    "offset_adaptive": {"noise_offset": 0.05, "adaptive_noise_scale": 0.3},
    "offset_adaptive_negative": {"noise_offset": 0.05, "adaptive_noise_scale": -0.3},
    "offset_adaptive_random": {"noise_offset": 0.05, "adaptive_noise_scale": 0.3, "noise_offset_random_strength": True},
    "multires": {"multires_noise_iterations": 6, "multires_noise_discount": 0.3},
    "multires_strong": {"multires_noise_iterations": 2, "multires_noise_discount": 0.9},
    "offset_multires": {"noise_offset": 0.1, "multires_noise_iterations": 6, "multires_noise_discount": 0.4},
    "ip": {"ip_noise_gamma": 0.1},
    "ip_random": {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True},
    "v_zero_terminal": {"v_parameterization": True, "zero_terminal_snr": True, "ip_noise_gamma": 0.1},
    "everything": {
        "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 6, "multires_noise_discount": 0.3, "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True, "v_parameterization": True,
    },
}
V = {"v_parameterization": True}
LOSS_CASES = {
    "l2": {},
    "l1": {"loss_type": "l1"},
    **{
        f"{kind}_{schedule}": {"loss_type": kind, "huber_schedule": schedule, "huber_c": 0.2, "huber_scale": 1.7}
        for kind in ("huber", "smooth_l1")
        for schedule in ("constant", "exponential", "snr")
    },
    "huber_snr_zero_terminal": {"loss_type": "huber", "zero_terminal_snr": True, **V},
    "min_snr": {"min_snr_gamma": 5.0},
    "min_snr_v": {"min_snr_gamma": 5.0, **V},
    "min_snr_v_zero_terminal": {"min_snr_gamma": 5.0, "zero_terminal_snr": True, **V},
    "debiased": {"debiased_estimation_loss": True},
    "debiased_v": {"debiased_estimation_loss": True, **V},
    "scale_v": {"scale_v_pred_loss_like_noise_pred": True, **V},
    "v_like": {"v_pred_like_loss": 0.3},
    "mask": {"masked_loss": True},
    "all_noise": {
        "loss_type": "smooth_l1", "masked_loss": True, "min_snr_gamma": 3.0, "v_pred_like_loss": 0.2,
        "debiased_estimation_loss": True,
    },
    "all_v": {
        "loss_type": "huber", "masked_loss": True, "min_snr_gamma": 3.0, "scale_v_pred_loss_like_noise_pred": True,
        "debiased_estimation_loss": True, **V,
    },
}
DEFAULTS = {
    "noise_offset": None, "noise_offset_random_strength": False, "adaptive_noise_scale": None,
    "multires_noise_iterations": None, "multires_noise_discount": 0.3, "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False, "min_timestep": None, "max_timestep": None, "zero_terminal_snr": False,
    "v_parameterization": False, "loss_type": "l2", "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0,
    "min_snr_gamma": None, "debiased_estimation_loss": False, "scale_v_pred_loss_like_noise_pred": False,
    "v_pred_like_loss": None, "masked_loss": False,
}


def take(path, names, scope):
    """Runs the definitions of `names` (functions, or methods of any class) of a file in `scope`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
            exec(compile(ast.Module([node], []), str(path), "exec"), scope)


def load(folder):
    quiet = types.SimpleNamespace(info=lambda *_: None)
    functions = {"torch": torch, "random": random, "math": math, "logger": quiet}
    take(folder / "library/custom_train_functions.py", {
        "prepare_scheduler_for_custom_training", "fix_noise_scheduler_betas_for_zero_terminal_snr", "apply_snr_weight",
        "scale_v_prediction_loss_like_noise_prediction", "get_snr_scale", "add_v_prediction_like_loss",
        "apply_debiased_estimation", "pyramid_noise_like", "apply_noise_offset", "apply_masked_loss",
    }, functions)
    functions["custom_train_functions"] = types.SimpleNamespace(**functions)
    take(folder / "library/train_util.py", {
        "get_timesteps", "get_noise_noisy_latents_and_timesteps", "get_huber_threshold_if_needed", "conditional_loss",
    }, functions)
    take(folder / "train_network.py", {"post_process_loss"}, functions)
    return types.SimpleNamespace(**functions)


def make_schedule(reference, args):
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False
    )
    reference.prepare_scheduler_for_custom_training(schedule, "cpu")
    if args.zero_terminal_snr:
        reference.fix_noise_scheduler_betas_for_zero_terminal_snr(schedule)
    return schedule


class Fed:
    """Replaces the sources of random numbers by the draws of one sample while it is active."""

    def __init__(self, draws, sample, octaves):
        one = slice(sample, sample + 1)
        self.like = iter([draws["noise"][one].clone(), draws["perturbation"][one].clone()])
        self.offset, self.octaves = draws["offset"][one], iter(octaves[sample])
        self.ratios = iter(RATIOS[sample])
        self.strengths = {"noise_offset": draws["strengths"][sample, 0], "ip_noise_gamma": draws["strengths"][sample, 1]}
        self.sample = sample

    def randn(self, *shape, **_):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        if shape[2:] == (1, 1) and not self.in_octaves:
            return self.offset
        octave = next(self.octaves)
        assert tuple(octave.shape) == tuple(shape), (octave.shape, shape)
        return octave


RATIOS = [[0.1, 0.8, 0.35, 0.2, 0.6, 0.5], [0.9, 0.05, 0.0, 0.7, 0.1, 0.3], [0.4, 0.55, 0.01, 0.9, 0.2, 0.2]]


def octave_sizes(sample):
    sizes = []
    for i in range(MAX_OCTAVES):
        ratio = RATIOS[sample][i] * 2 + 2
        sizes.append((max(1, int(H / ratio**i)), max(1, int(W / ratio**i))))
        if 1 in sizes[-1]:
            break
    return sizes


def noise_of(reference, args, draws, octaves, sample):
    fed = Fed(draws, sample, octaves)
    fed.in_octaves = not args.noise_offset
    strengths = iter([fed.strengths[k] for k in fed.strengths if getattr(args, k + "_random_strength")])

    def randn(*shape, **kwargs):
        result = fed.randn(*shape, **kwargs)
        fed.in_octaves = True
        return result

    saved = torch.randn, torch.randn_like, torch.rand, random.random, torch.randint
    torch.randn, torch.randn_like = randn, lambda *_, **__: next(fed.like)
    torch.rand = lambda *_, **__: next(strengths).reshape(1)
    random.random = lambda: next(fed.ratios)
    torch.randint = lambda *_, **__: torch.tensor([TIMESTEPS[sample]])
    try:
        schedule = make_schedule(reference, args)
        latents = draws["latents"][sample : sample + 1]
        noise, noisy, timesteps = reference.get_noise_noisy_latents_and_timesteps(args, schedule, latents)
    finally:
        torch.randn, torch.randn_like, torch.rand, random.random, torch.randint = saved
    target = schedule.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
    return noisy, target


def loss_of(reference, args, draws, masks):
    """The order of `process_batch`: element, mask, mean, sample weight, timestep weights, mean."""
    schedule, timesteps = make_schedule(reference, args), torch.tensor(TIMESTEPS)
    threshold = reference.get_huber_threshold_if_needed(args, timesteps, schedule)
    loss = reference.conditional_loss(draws["prediction"], draws["target"], args.loss_type, "none", threshold)
    if args.masked_loss:
        loss = reference.apply_masked_loss(loss, {"alpha_masks": masks})
    loss = loss.mean([1, 2, 3]) * torch.tensor(LOSS_WEIGHTS)
    return reference.post_process_loss(None, loss, args, timesteps, schedule)


def main():
    reference = load(pathlib.Path(sys.argv[1]))
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    draws = {name: draw(B, C, H, W) for name in ("noise", "perturbation", "latents", "prediction", "target")}
    draws["latents"] += draw(B, C, 1, 1)
    draws["offset"], draws["strengths"] = draw(B, C, 1, 1), torch.rand(B, 2, generator=generator)
    octaves = [[draw(1, C, *size) for size in octave_sizes(sample)] for sample in range(B)]
    masks = (torch.rand(B, 8 * H, 8 * W, generator=generator) * 255).round()
    tensors = {name: value.numpy() for name, value in draws.items()}
    tensors["masks"] = masks.numpy().astype(numpy.uint8)
    for sample in range(B):
        for number, octave in enumerate(octaves[sample]):
            tensors[f"octave/{sample}/{number}"] = octave.numpy()
    cases = []
    for name, options in NOISE_CASES.items():
        args = argparse.Namespace(**(DEFAULTS | options))
        results = [noise_of(reference, args, draws, octaves, sample) for sample in range(B)]
        for kind, values in zip(("noisy", "target"), zip(*results)):
            tensors[f"{kind}/{name}"] = torch.cat(values).numpy()
        cases.append({"name": name, "kind": "noise", "options": options})
    for name, options in LOSS_CASES.items():
        args = argparse.Namespace(**(DEFAULTS | options))
        losses = loss_of(reference, args, draws, masks / 255.0)
        cases.append({"name": name, "kind": "loss", "options": options, "losses": losses.double().tolist()})
    OUT.mkdir(exist_ok=True)
    save_file(tensors, OUT / "draws.safetensors")
    header = {"timesteps": TIMESTEPS, "loss_weights": LOSS_WEIGHTS, "cases": cases}
    (OUT / "cases.json").write_text(json.dumps(header, indent=1) + "\n")


main()
