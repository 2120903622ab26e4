"""The training objective of sd-scripts, written from its published behaviour, on given latents, noise and timesteps.

`options` are sd-scripts' option names. The signal-to-noise table is taken before zero_terminal_snr rescales the betas:
the reference keeps that stale table for its loss weights, and these cases contain it.
"""

import math

import torch

STEPS = 1000


class Schedule:
    """scaled_linear 0.00085..0.012; `alphas_cumprod` follows zero_terminal_snr, `snr` does not."""

    def __init__(self, zero_terminal_snr, dtype):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.snr = (self.alphas_cumprod.sqrt() / (1 - self.alphas_cumprod).sqrt()) ** 2
        if zero_terminal_snr:
            root = self.alphas_cumprod.sqrt()
            first, last = root[0].clone(), root[-1].clone()
            root = (root - last) * (first / (first - last))
            bar = root**2
            # Through the betas and back, as the reference does it: the rounding of the product is part of the table.
            alphas = torch.cat([bar[:1], bar[1:] / bar[:-1]])
            self.alphas_cumprod = torch.cumprod(1 - (1 - alphas), 0)
        self.alphas_cumprod = self.alphas_cumprod.to(dtype)
        self.snr = self.snr.to(dtype)

    def coefficients(self, timesteps):
        bar = self.alphas_cumprod[timesteps][:, None, None, None]
        return bar.sqrt(), (1 - bar).sqrt()


def offset_noise(noise, latents, offset_randn, options):
    """noise + noise_offset * one normal draw per sample and channel."""
    offset = options.get("noise_offset")
    if not offset:
        return noise
    adaptive = options.get("adaptive_noise_scale")
    if adaptive:
        mean = latents.mean(dim=(2, 3), keepdim=True).abs()
        offset = (offset + adaptive * mean).clamp(min=0)
    return noise + offset * offset_randn


def huber_threshold(schedule, timesteps, options):
    c, scale = options.get("huber_c", 0.1), options.get("huber_scale", 1.0)
    kind = options.get("huber_schedule", "snr")
    if kind == "constant":
        threshold = torch.full(timesteps.shape, c, dtype=schedule.alphas_cumprod.dtype)
    elif kind == "exponential":
        threshold = torch.exp(math.log(c) / STEPS * timesteps.to(schedule.alphas_cumprod.dtype))
    elif kind == "snr":
        bar = schedule.alphas_cumprod[timesteps]
        sigma = ((1 - bar) / bar).sqrt()
        threshold = (1 - c) / (1 + sigma) ** 2 + c
    else:
        raise ValueError(f"unknown huber_schedule: {kind}")
    # sd-scripts scales the first two alone.
    threshold = threshold if kind == "snr" else threshold * scale
    return threshold[:, None, None, None]


def elementwise_loss(prediction, target, schedule, timesteps, options):
    difference = prediction - target
    kind = options.get("loss_type", "l2")
    if kind == "l2":
        return difference**2
    if kind == "l1":
        return difference.abs()
    c = huber_threshold(schedule, timesteps, options)
    curve = (difference**2 + c**2).sqrt() - c
    if kind == "huber":
        return 2 * c * curve
    if kind == "smooth_l1":
        return 2 * curve
    raise ValueError(f"unknown loss_type: {kind}")


def weighted(per_sample, schedule, timesteps, options):
    """The loss weights that depend on the timestep, in the reference's order."""
    snr = schedule.snr[timesteps]
    v = options.get("v_parameterization", False)
    if gamma := options.get("min_snr_gamma"):
        per_sample = per_sample * snr.clamp(max=gamma) / (snr + 1 if v else snr)
    capped = snr.clamp(max=1000)
    like_noise = capped / (capped + 1)
    if options.get("scale_v_pred_loss_like_noise_pred"):
        per_sample = per_sample * like_noise
    if factor := options.get("v_pred_like_loss"):
        per_sample = per_sample + per_sample / like_noise * factor
    if options.get("debiased_estimation_loss"):
        per_sample = per_sample * (1 / (capped + 1) if v else 1 / capped.sqrt())
    return per_sample


def text_states(text_encoder, input_ids, clip_skip):
    """The text encoder's output [B,77,C]; clip_skip counts from the end, the final layer norm is always applied."""
    model = getattr(text_encoder, "text_model", text_encoder)
    if clip_skip is None:
        return text_encoder(input_ids)[0]
    states = text_encoder(input_ids, output_hidden_states=True).hidden_states[-clip_skip]
    return model.final_layer_norm(states)


def run_case(models, batch, options, clip_skip=None):
    """One forward pass; returns loss (scalar), te_out, noise_pred and target."""
    unet, text_encoder = models
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    schedule = Schedule(options.get("zero_terminal_snr", False), latents.dtype)
    noise = offset_noise(noise, latents, batch["offset_randn"], options)
    signal, sigma = schedule.coefficients(timesteps)
    te_out = text_states(text_encoder, batch["input_ids"], clip_skip)
    prediction = unet(signal * latents + sigma * noise, timesteps, te_out).sample
    v = options.get("v_parameterization", False)
    target = signal * noise - sigma * latents if v else noise
    loss = elementwise_loss(prediction, target, schedule, timesteps, options).mean([1, 2, 3])
    loss = weighted(loss * batch["loss_weights"], schedule, timesteps, options).mean()
    return {"loss": loss, "te_out": te_out, "noise_pred": prediction, "target": target}
