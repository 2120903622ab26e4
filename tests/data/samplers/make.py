"""Trajectories of diffusers' schedulers, for the tests of `models/src/sampler`.

    python make.py            # writes trajectories.safetensors beside this file

Made with diffusers 0.42.1, torch 2.11.0, numpy 2.4.6, scipy 1.17.1 (LMS integrates with it).
The schedulers are configured as sd-scripts' gen_img.py configures them: scaled_linear betas
0.00085 to 0.012, steps_offset 1, no clipping. The U-Net is a formula (`predict`) of the scaled
latents, the timestep, the element and the number of the evaluation, so that an error anywhere
shows in all that follows. Its slope in the latents lies between 0.375 and 1.025 as that of a
denoiser does: rounding is not amplified from step to step.

Keys: `SAMPLER/VARIANT/STEPS/timesteps` and `SAMPLER/VARIANT/STEPS/PREDICTION`; the latter holds the
latents before the first evaluation and after each one. `clean`, `initial` and `noise` are shared
inputs; row 0 of `noise` is what is added to `clean` where a run starts in the middle, the k-th
draw of a run takes row k.
"""

import math
import pathlib

import torch
from diffusers.schedulers import (
    scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep,
    scheduling_dpmsolver_singlestep, scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete, scheduling_heun_discrete, scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete, scheduling_lms_discrete, scheduling_pndm, scheduling_unipc_multistep,
)
from safetensors.torch import save_file

SHAPE = (1, 4, 1, 1)
STRENGTH = 0.55
MULTISTEP, SINGLESTEP = scheduling_dpmsolver_multistep, scheduling_dpmsolver_singlestep
OFFSET = {"steps_offset": 1}
NO_CLIP = {"steps_offset": 1, "clip_sample": False}
# name: module, class, settings, whether karras, whether zero terminal SNR is offered
SAMPLERS = {
    "ddim": (scheduling_ddim, "DDIMScheduler", NO_CLIP, False, True),
    "ddpm": (scheduling_ddpm, "DDPMScheduler", NO_CLIP, False, True),
    "pndm": (scheduling_pndm, "PNDMScheduler", OFFSET, False, False),
    "lms": (scheduling_lms_discrete, "LMSDiscreteScheduler", OFFSET, True, False),
    "euler": (scheduling_euler_discrete, "EulerDiscreteScheduler", OFFSET, True, True),
    "euler_a": (
        scheduling_euler_ancestral_discrete, "EulerAncestralDiscreteScheduler", OFFSET, False, True
    ),
    "heun": (scheduling_heun_discrete, "HeunDiscreteScheduler", OFFSET, True, False),
    "dpm_2": (scheduling_k_dpm_2_discrete, "KDPM2DiscreteScheduler", OFFSET, True, False),
    "dpm_2_a": (
        scheduling_k_dpm_2_ancestral_discrete, "KDPM2AncestralDiscreteScheduler", OFFSET, True, False
    ),
    # This algorithm cannot end at sigma 0: diffusers asks for `sigma_min`.
    "dpmsolver": (
        MULTISTEP, "DPMSolverMultistepScheduler",
        {**OFFSET, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, True, True,
    ),
    "dpmsolver++": (
        MULTISTEP, "DPMSolverMultistepScheduler",
        {**OFFSET, "algorithm_type": "dpmsolver++"}, True, True,
    ),
    "dpmsolver++_sde": (
        MULTISTEP, "DPMSolverMultistepScheduler",
        {**OFFSET, "algorithm_type": "sde-dpmsolver++"}, True, True,
    ),
    "dpmsingle": (SINGLESTEP, "DPMSolverSinglestepScheduler", {}, True, False),
    "dpmsingle_sde": (
        SINGLESTEP, "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++"}, True, False,
    ),
    "unipc": (scheduling_unipc_multistep, "UniPCMultistepScheduler", OFFSET, True, True),
}


def predict(scaled, timestep, evaluation):
    out = [
        0.7 * x + 0.25 * math.sin(1.3 * x + 0.011 * float(timestep) + 0.9 * i + 0.17 * evaluation)
        for i, x in enumerate(scaled.flatten().tolist())
    ]
    return torch.tensor(out, dtype=torch.float32).reshape(SHAPE)


def cut(scheduler, name, start):
    """The rest of a schedule, for the schedulers that do not start in the middle by themselves:
    LMS would take coefficients for derivatives that it does not have, PNDM would give the timesteps
    of its later steps to the four evaluations of its first ones."""
    if name == "lms":
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[start:], scheduler.timesteps[start:]
        return
    times = [int(t) for t in reversed(scheduler._timesteps)][start:]
    half = 1000 // scheduler.num_inference_steps // 2
    quartets = [(a, b + half, b + half, b) for a, b in zip(times[:3], times[1:4])]
    scheduler.prk_timesteps = torch.tensor([t for four in quartets for t in four])
    scheduler.timesteps = torch.cat([scheduler.prk_timesteps, torch.tensor(times[3:])])


def run(name, settings, steps, inputs, strength=None):
    module, cls, _, _, _ = SAMPLERS[name]
    draws = iter(inputs["noise"])
    next(draws)
    module.randn_tensor = lambda shape, **_: next(draws).reshape(shape)
    scheduler = getattr(module, cls)(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        **settings,
    )
    scheduler.set_timesteps(steps)
    if strength is None:
        timesteps = scheduler.timesteps
        latents = inputs["initial"].reshape(SHAPE) * scheduler.init_noise_sigma
    else:
        start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
        if name in ("lms", "pndm"):
            cut(scheduler, name, start)
            timesteps = scheduler.timesteps
        else:
            timesteps = scheduler.timesteps[start:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)
        noise = inputs["noise"][0].reshape(SHAPE)
        latents = scheduler.add_noise(inputs["clean"].reshape(SHAPE), noise, timesteps[:1])
    rows = [latents.flatten()]
    for k, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predict(scaled, t, k), t, latents).prev_sample
        rows.append(latents.flatten())
    return timesteps.to(torch.float32).clone(), torch.stack(rows).to(torch.float32)


def cases():
    """(sampler, variant, settings, steps, strength)"""
    for name, (_, _, settings, karras, zero_snr) in SAMPLERS.items():
        for steps in (5, 10, 20, 50):
            yield name, "plain", settings, steps, None
            if karras:
                yield name, "karras", {**settings, "use_karras_sigmas": True}, steps, None
        # Where the last timestep counts: 999 is pure noise.
        if zero_snr:
            yield name, "zero_snr", {**settings, "rescale_betas_zero_snr": True}, 10, None
            snr = {**settings, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            yield name, "zero_snr_trailing", snr, 10, None
        if not name.startswith("dpmsingle"):
            for spacing in ("leading", "linspace", "trailing"):
                yield name, spacing, {**settings, "timestep_spacing": spacing}, 7, None
        yield name, "middle", settings, 20, STRENGTH


def main():
    generator = torch.Generator().manual_seed(7)
    count = math.prod(SHAPE)
    inputs = {
        "clean": torch.randn(count, generator=generator),
        "initial": torch.randn(count, generator=generator),
        "noise": torch.randn((51, count), generator=generator),
    }
    tensors = dict(inputs)
    for name, variant, settings, steps, strength in cases():
        for prediction in ("epsilon", "v_prediction"):
            # Pure noise has no epsilon that says anything of the picture: 0 divided by 0.
            if variant == "zero_snr_trailing" and prediction == "epsilon":
                continue
            chosen = {**settings, "prediction_type": prediction}
            timesteps, rows = run(name, chosen, steps, inputs, strength)
            assert torch.isfinite(rows).all(), (name, variant, prediction, steps)
            tensors[f"{name}/{variant}/{steps}/timesteps"] = timesteps
            tensors[f"{name}/{variant}/{steps}/{prediction}"] = rows
    save_file(tensors, pathlib.Path(__file__).with_name("trajectories.safetensors"))


if __name__ == "__main__":
    main()
