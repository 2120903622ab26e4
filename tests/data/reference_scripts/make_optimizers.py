"""Trajectories of optimizers: `tests/data/optimizers/trajectories.{json,safetensors}`.

Twenty steps of each optimizer of the packages that sd-scripts uses, on weights and gradients that a
small generator makes (the tests have the same one), in two groups with learning rates of their own.
The second tensor has no gradient in steps 4 and 12. Kept are the weights after 10 and 20 steps: all
of the small tensors, every 37th number of the large one; of schedule-free optimizers those for
evaluation, too.

The 8-bit optimizers run bitsandbytes' own CPU path (0.50.2), but with its plain PyTorch
implementation of quantize_blockwise: that one rounds to the nearest code as its CUDA kernel does,
while the compiled CPU kernel turns zeros into 7.75e-6 of the block's largest value.

    python make_optimizers.py            # torch 2.11, bitsandbytes 0.50.2, prodigyopt 1.1.2,
                                         # dadaptation 3.2, schedulefree 1.4.1, lion_pytorch 0.2.5,
                                         # pytorch_optimizer 4.1.0, came_pytorch 0.1.3,
                                         # transformers 5.23
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file

SHAPES = [[4, 8], [8, 4], [16], [4, 3, 3, 5], [72, 64], [4, 3, 1, 1]]
FIRST_GROUP = 2  # tensors of the first group
STEPS = 20
SKIPPED = (1, (4, 12))  # tensor, steps without a gradient
STRIDE = 37


class Draw:
    """Numbers between -1 and 1: a linear congruential generator, its upper 24 bits."""

    def __init__(self, seed):
        self.state = seed

    def __call__(self, count):
        out = np.empty(count, np.float32)
        for i in range(count):
            self.state = (self.state * 1664525 + 1013904223) % 2**32
            out[i] = np.float32(self.state >> 8) / np.float32(2**23) - np.float32(1)
        return out


def weights():
    draw = Draw(1)
    return [draw(int(np.prod(shape))).reshape(shape) * np.float32(0.5) for shape in SHAPES]


def gradients(step):
    """Noise around one direction, so that estimates of the distance grow; each tensor has its own
    size of gradient, which rises and falls; some numbers are small."""
    draw, direction = Draw(1000 + step), Draw(7)
    out = []
    for index, shape in enumerate(SHAPES):
        scale = np.float32([1.0, 0.25, 2.0, 0.5, 0.125, 1.0][index])
        scale = scale * np.float32(1 + step % 3)
        count = int(np.prod(shape))
        values = draw(count) * np.float32(0.5) + direction(count)
        values[::7] *= np.float32(0.0078125)
        out.append((values * scale).reshape(shape))
    return out


def factor(schedule, step):
    if schedule == "constant":
        return 1.0
    return min(1.0, step / 4) * (1 - step / 40)  # 0 in the first step


def cases():
    import bitsandbytes as bnb
    import came_pytorch
    import dadaptation
    import dadaptation.experimental as experimental
    import lion_pytorch
    import prodigyopt
    import pytorch_optimizer
    import schedulefree
    from transformers.optimization import Adafactor

    c, w = "constant", "warmup"
    yield "AdamW", torch.optim.AdamW, c, 1e-3, {}
    yield "AdamW", torch.optim.AdamW, w, 2e-2, dict(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    yield "AdamW", torch.optim.AdamW, c, 1e-2, dict(amsgrad=True, maximize=True)
    yield "PagedAdamW", bnb.optim.PagedAdamW, c, 1e-3, dict(weight_decay=0.1)
    yield "PagedAdamW32bit", bnb.optim.PagedAdamW32bit, w, 1e-2, dict(betas=(0.8, 0.95))
    yield "Adam", torch.optim.Adam, c, 1e-3, {}
    yield "Adam", torch.optim.Adam, w, 1e-2, dict(weight_decay=0.1, amsgrad=True)
    yield "AdamW8bit", bnb.optim.AdamW8bit, c, 1e-3, {}
    yield "AdamW8bit", bnb.optim.AdamW8bit, w, 1e-2, dict(weight_decay=0.1, betas=(0.8, 0.95))
    yield "PagedAdamW8bit", bnb.optim.PagedAdamW8bit, c, 1e-3, dict(min_8bit_size=100)
    yield "Adam8bit", bnb.optim.Adam8bit, c, 1e-3, {}
    yield "SGD", torch.optim.SGD, c, 1e-2, {}
    yield "SGD", torch.optim.SGD, w, 1e-2, dict(momentum=0.9, dampening=0.1, weight_decay=0.1)
    yield "SGDNesterov", torch.optim.SGD, c, 1e-2, dict(momentum=0.9, nesterov=True)
    yield "SGDNesterov", torch.optim.SGD, w, 1e-2, dict(
        momentum=0.8, nesterov=True, weight_decay=0.1)
    yield "SGDNesterov8bit", bnb.optim.SGD8bit, c, 1e-3, dict(momentum=0.9, nesterov=True)
    yield "SGDNesterov8bit", bnb.optim.SGD8bit, w, 1e-3, dict(
        momentum=0.8, nesterov=True, weight_decay=0.1)
    yield "Lion", lion_pytorch.Lion, c, 1e-3, {}
    yield "Lion", lion_pytorch.Lion, w, 1e-3, dict(weight_decay=0.1, betas=(0.8, 0.95))
    yield "Lion", lion_pytorch.Lion, c, 1e-3, dict(weight_decay=0.01, decoupled_weight_decay=True)
    yield "Lion8bit", bnb.optim.Lion8bit, c, 1e-3, {}
    yield "Lion8bit", bnb.optim.Lion8bit, w, 1e-3, dict(weight_decay=0.1, betas=(0.8, 0.95))
    yield "PagedLion8bit", bnb.optim.PagedLion8bit, c, 1e-3, dict(weight_decay=0.1)
    yield "AdaFactor", Adafactor, c, None, {}
    yield "AdaFactor", Adafactor, c, None, dict(
        warmup_init=True, weight_decay=0.1, beta1=0.9, clip_threshold=0.5)
    yield "AdaFactor", Adafactor, w, 1e-2, dict(relative_step=False, scale_parameter=False)
    yield "AdaFactor", Adafactor, c, 1e-2, dict(relative_step=False, decay_rate=-0.5)
    yield "CAME", came_pytorch.CAME, c, 1e-3, {}
    yield "CAME", came_pytorch.CAME, w, 1e-2, dict(
        weight_decay=0.1, betas=(0.8, 0.95, 0.99), eps=(1e-10, 1e-8))
    yield "CAME", pytorch_optimizer.CAME, c, 1e-3, dict(
        weight_decay=0.1, weight_decouple=False, clip_threshold=0.5)
    yield "CAME", pytorch_optimizer.CAME, c, 1e-3, dict(
        weight_decay=0.001, fixed_decay=True, eps1=1e-10)
    yield "DAdaptation", experimental.DAdaptAdamPreprint, c, 1.0, {}
    yield "DAdaptation", experimental.DAdaptAdamPreprint, w, 1.0, dict(
        weight_decay=0.1, decouple=True, d0=1e-5, growth_rate=1.5)
    yield "DAdaptAdam", dadaptation.DAdaptAdam, c, 1.0, {}
    yield "DAdaptAdam", dadaptation.DAdaptAdam, w, 0.5, dict(
        weight_decay=0.1, decouple=True, use_bias_correction=True, betas=(0.8, 0.95))
    yield "DAdaptAdam", dadaptation.DAdaptAdam, c, 1.0, dict(weight_decay=0.1, growth_rate=1.2)
    yield "DAdaptAdaGrad", dadaptation.DAdaptAdaGrad, c, 1.0, {}
    yield "DAdaptAdaGrad", dadaptation.DAdaptAdaGrad, c, 0.5, dict(
        weight_decay=0.1, momentum=0.9, d0=1e-4)
    yield "DAdaptAdan", dadaptation.DAdaptAdan, c, 1.0, {}
    yield "DAdaptAdan", dadaptation.DAdaptAdan, w, 1.0, dict(no_prox=True, betas=(0.9, 0.8, 0.95))
    yield "DAdaptAdanIP", experimental.DAdaptAdanIP, c, 1.0, {}
    yield "DAdaptAdanIP", experimental.DAdaptAdanIP, w, 1.0, dict(weight_decay=0.1, growth_rate=2.0)
    yield "DAdaptLion", dadaptation.DAdaptLion, c, 1.0, {}
    yield "DAdaptLion", dadaptation.DAdaptLion, w, 1.0, dict(
        weight_decay=0.1, d0=1e-4, betas=(0.8, 0.95))
    yield "DAdaptSGD", dadaptation.DAdaptSGD, c, 1.0, {}
    yield "DAdaptSGD", dadaptation.DAdaptSGD, c, 0.5, dict(
        momentum=0.9, weight_decay=0.1, growth_rate=3.0)
    yield "Prodigy", prodigyopt.Prodigy, c, 1.0, {}
    yield "Prodigy", prodigyopt.Prodigy, w, 1.0, dict(
        weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True, d_coef=2.0,
        betas=(0.9, 0.99))
    yield "Prodigy", prodigyopt.Prodigy, c, 1.0, dict(
        weight_decay=0.1, decouple=False, slice_p=5, growth_rate=1.5, beta3=0.9)
    yield "Prodigy", prodigyopt.Prodigy, c, 1.0, dict(betas=(0.0, 0.99))
    yield "AdamWScheduleFree", schedulefree.AdamWScheduleFree, c, 2.5e-3, {}
    yield "AdamWScheduleFree", schedulefree.AdamWScheduleFree, c, 1e-2, dict(
        weight_decay=0.1, betas=(0.95, 0.98), warmup_steps=6, r=1.0)
    yield "RAdamScheduleFree", schedulefree.RAdamScheduleFree, c, 2.5e-3, {}
    yield "RAdamScheduleFree", schedulefree.RAdamScheduleFree, c, 1e-3, dict(
        weight_decay=0.1, silent_sgd_phase=False, betas=(0.9, 0.99))
    yield "SGDScheduleFree", schedulefree.SGDScheduleFree, c, 1e-2, {}
    yield "SGDScheduleFree", schedulefree.SGDScheduleFree, c, 1e-2, dict(
        weight_decay=0.1, momentum=0.8, warmup_steps=6)
    yield "AdEMAMix8bit", bnb.optim.AdEMAMix8bit, c, 1e-3, {}
    yield "AdEMAMix8bit", bnb.optim.AdEMAMix8bit, w, 1e-3, dict(
        weight_decay=0.1, betas=(0.8, 0.95, 0.99), alpha=3.0, t_alpha=15, t_beta3=15)
    yield "PagedAdEMAMix8bit", bnb.optim.PagedAdEMAMix8bit, c, 1e-3, dict(t_alpha=10)
    yield "AdEMAMix", bnb.optim.AdEMAMix, c, 1e-3, dict(t_beta3=30)
    yield "AdEMAMix", bnb.optim.AdEMAMix, w, 1e-3, dict(weight_decay=0.1, betas=(0.8, 0.95, 0.99))
    yield "RAdam", torch.optim.RAdam, c, 1e-3, dict(betas=(0.9, 0.99))
    yield "RAdam", torch.optim.RAdam, w, 1e-2, dict(
        weight_decay=0.1, betas=(0.8, 0.999), decoupled_weight_decay=True)


def sample(params):
    parts = [p.detach().numpy().reshape(-1) for p in params]
    return np.concatenate([part[::STRIDE] if part.size > 4096 else part for part in parts])


def run(optimizer_class, schedule, lr, settings):
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights()]
    # One that estimates the rate has one rate for all.
    second = 1.0 if lr is None or lr >= 0.5 else 0.5
    groups = [{"params": params[:FIRST_GROUP]}, {"params": params[FIRST_GROUP:]}]
    base = [lr, None if lr is None else lr * second]
    if lr is not None:
        for group, rate in zip(groups, base):
            group["lr"] = rate
    optimizer = optimizer_class(groups, lr=lr, **settings)
    averaged = "ScheduleFree" in optimizer_class.__name__
    if averaged:
        optimizer.train()
    trace, kept = [], {}
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, base):
            if rate is not None:
                group["lr"] = rate * factor(schedule, step)
        for index, (param, gradient) in enumerate(zip(params, gradients(step))):
            missing = index == SKIPPED[0] and step in SKIPPED[1]
            param.grad = None if missing else torch.from_numpy(gradient.copy())
        optimizer.step()
        trace.append(optimizer.param_groups[0].get("d"))
        if step + 1 in (10, 20):
            kept[str(step + 1)] = sample(params)
            if averaged:
                optimizer.eval()
                kept[f"{step + 1}/evaluation"] = sample(params)
                optimizer.train()
    return [float(x) for x in trace if x is not None], kept, second


def main():
    import bitsandbytes.backends.cpu.ops as cpu
    import bitsandbytes.functional as functional

    # Round to the nearest code, as on a GPU.
    def quantize(values, code, absmax_out, out, blocksize):
        flat = values.reshape(-1)
        for block in range(absmax_out.numel()):
            part = slice(block * blocksize, (block + 1) * blocksize)
            largest = flat[part].abs().max()
            scale = 1 / largest if largest > 0 else torch.tensor(0.0)
            nearest = (flat[part] * scale).unsqueeze(-1).sub(code).abs().argmin(-1)
            out.view(-1)[part] = nearest.to(torch.uint8)
            absmax_out[block] = largest

    cpu._quant_blockwise_fp32_direct = quantize

    torch.set_num_threads(1)
    records, tensors = [], {}
    tensors["code/signed"] = functional.create_dynamic_map(signed=True).numpy()
    tensors["code/unsigned"] = functional.create_dynamic_map(signed=False).numpy()
    for index, (name, optimizer_class, schedule, lr, settings) in enumerate(cases()):
        trace, kept, second = run(optimizer_class, schedule, lr, settings)
        for step, values in kept.items():
            assert np.isfinite(values).all(), name
            tensors[f"{index}/{step}"] = values
        written = {k: v for k, v in settings.items()}
        if name.startswith("SGDNesterov"):
            written.pop("nesterov")
        records.append({
            "name": name,
            "class": f"{optimizer_class.__module__}.{optimizer_class.__name__}",
            "args": [f"{key}={value}" for key, value in written.items()],
            "schedule": schedule,
            "lr": lr or 0.0,
            "second_group": second,
            "d": trace,
        })
        print(index, name, settings, trace[-1:] or "", abs(kept["20"]).max())
    out = pathlib.Path(__file__).parent.parent / "optimizers"
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "trajectories.safetensors")
    lines = ",\n".join(json.dumps(record) for record in records)
    (out / "trajectories.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
