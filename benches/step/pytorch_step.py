#!/usr/bin/env python
"""One LoRA training step of the full-size Stable Diffusion 1.5 or SDXL U-Net in PyTorch: what lorarun's step is measured against.

diffusers' UNet2DConditionModel with random weights, LoRA on the transformer blocks put on by hand (as sd-scripts does it),
PyTorch's scaled_dot_product_attention, AdamW over the LoRA weights alone. A timed step is: noise and timestep, (text
encoder,) U-Net, loss, backward, clipping at norm 1, optimizer.

--precision bf16 is sd-scripts' `mixed_precision = "bf16"`: frozen weights stored in bfloat16, autocast to bfloat16, LoRA
weights, their gradients, the optimizer state and the loss in float32.

Prints one JSON object: median and all step times in seconds, peak resident memory in GiB of the whole process and of the
timed steps alone. Progress goes to stderr.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "data" / "reference_scripts"))

import diffusers
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_layers import add_lora
from objective import Schedule

UNET_CONFIG = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_CONFIG = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FAMILIES = {"sd1": UNET_CONFIG, "sdxl": SDXL_CONFIG}
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


def random_unet(dtype, config=UNET_CONFIG):
    """Made on the meta device and filled in place, so that no second copy of the weights shows in the peak."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, (3 * parameter[0].numel()) ** -0.5)
    return unet


def memory_gib(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise SystemExit(f"/proc/self/status has no {field}")


def forget_peak():
    """Makes VmHWM start again from the present size."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def conditions(family, batch_size, resolution, dtype, device="cpu"):
    """Random text states, and what SDXL's U-Net is told beside them (pooled text, sizes)."""
    width = FAMILIES[family]["cross_attention_dim"]
    states = torch.randn(batch_size, 77, width, dtype=dtype, device=device)
    if family != "sdxl":
        return states, None
    sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=dtype, device=device)
    pooled = torch.randn(batch_size, 1280, dtype=dtype, device=device)
    return states, {"text_embeds": pooled, "time_ids": sizes.repeat(batch_size, 1)}


class Run:
    def __init__(self, args):
        self.args = args
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.unet = random_unet(self.dtype, FAMILIES[args.family]).requires_grad_(False)
        self.text = None
        if args.text_encoder:
            self.text = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)).to(self.dtype).requires_grad_(False)
        self.layers = add_lora(self.unet, self.text, args.rank, 1.0)
        self.parameters = [p for layer in self.layers.values() for p in layer.parameters()]
        for layer in self.layers.values():
            # Not zero, so that the gradients of `down` are not either.
            torch.nn.init.normal_(layer.lora_up.weight, std=0.01)
        # diffusers checkpoints in train mode only; the U-Net has no dropout, so nothing else changes.
        self.unet.train()
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if self.text is not None:
                self.text.train()
                self.text.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01)
        self.schedule = Schedule(False, torch.float32)
        side = args.resolution // 8
        self.latents = torch.randn(args.batch_size, 4, side, side)
        self.input_ids = torch.randint(0, 49000, (args.batch_size, 77))
        self.states, self.added = conditions(args.family, args.batch_size, args.resolution, self.dtype)

    def autocast(self):
        if self.args.precision == "bf16":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def step(self):
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (self.args.batch_size,))
        signal, sigma = self.schedule.coefficients(timesteps)
        noisy = signal * self.latents + sigma * noise
        with self.autocast():
            states = self.states if self.text is None else self.text(self.input_ids)[0]
            prediction = self.unet(noisy.to(self.dtype), timesteps, states, added_cond_kwargs=self.added).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="sd1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--text_encoder", action="store_true", help="train LoRA on the text encoder too")
    parser.add_argument("--resolution", type=int, default=512, help="pixels, a multiple of 64")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if args.text_encoder and args.family != "sd1":
        parser.error("--text_encoder is for SD1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    run = Run(args)
    idle = memory_gib("VmRSS")
    times, losses = [], []
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            setup_peak = memory_gib("VmHWM")
            forget_peak()
        start = time.perf_counter()
        losses.append(run.step())
        times.append(time.perf_counter() - start)
        print(f"step {number}: {times[-1]:.2f} s, loss {losses[-1]:.4f}", file=sys.stderr)
    steps_peak = memory_gib("VmHWM")
    timed = times[args.warmup :]
    result = {
        "engine": f"torch {torch.__version__}",
        **vars(args),
        "lora_modules": len(run.layers),
        "median_step_s": round(statistics.median(timed), 4),
        "step_s": [round(t, 4) for t in timed],
        "first_step_s": round(times[0], 4),
        "peak_rss_gib": round(max(setup_peak, steps_peak), 3),
        "peak_rss_steps_gib": round(steps_peak, 3),
        "rss_before_first_step_gib": round(idle, 3),
        "losses": [round(loss, 5) for loss in losses],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
