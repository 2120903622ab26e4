#!/usr/bin/env python
"""LoRA training steps of the full-size Stable Diffusion 1.5 or SDXL U-Net in PyTorch on a GPU: what lorarun is measured against.

diffusers' UNet2DConditionModel with random weights in bf16 and channels_last, LoRA in float32 on the transformer blocks put
on by hand (as sd-scripts does it), autocast to bf16, scaled_dot_product_attention, fused AdamW, cached latents and text
embeddings. A step is: noise and timestep, U-Net, loss, backward, clipping at norm 1, optimizer. Once as it is, once through
torch.compile.

Before the steps the card's bf16 matmul rate is measured (8192 cubed, the best of 20), and the arithmetic of a step is counted
by PyTorch's own counter, forward and the backward that frozen weights need. Prints one JSON object per variant.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

START = time.time()
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data" / "reference_scripts"))
sys.path.insert(0, str(ROOT / "benches" / "step"))

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lora_layers import add_lora
from objective import Schedule
from pytorch_step import FAMILIES, conditions


def matmul_rate():
    """FLOP/s of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / best


class Run:
    def __init__(self, family, batch_size, checkpointing, compiled, rank, resolution):
        with torch.device("cuda"):
            unet = UNet2DConditionModel(**FAMILIES[family]).to(torch.bfloat16)
        self.unet = unet.to(memory_format=torch.channels_last).requires_grad_(False)
        layers = add_lora(self.unet, None, rank, 1.0)
        for layer in layers.values():
            layer.to("cuda", torch.float32)
            torch.nn.init.normal_(layer.lora_up.weight, std=0.01)
        self.parameters = [p for layer in layers.values() for p in layer.parameters()]
        self.unet.train()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.model = torch.compile(self.unet) if compiled else self.unet
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)
        schedule = Schedule(False, torch.float32)
        self.signal, self.sigma = (c.cuda() for c in schedule.coefficients(torch.arange(1000)))
        side = resolution // 8
        self.latents = torch.randn(batch_size, 4, side, side, device="cuda")
        self.states, self.added = conditions(family, batch_size, resolution, torch.bfloat16, "cuda")

    def forward_backward(self):
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (self.latents.shape[0],), device="cuda")
        noisy = self.signal[timesteps] * self.latents + self.sigma[timesteps] * noise
        noisy = noisy.to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            prediction = self.model(noisy, timesteps, self.states, added_cond_kwargs=self.added).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise)
        loss.backward()
        return loss

    def step(self):
        loss = self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def flops(self):
        with FlopCounterMode(display=False) as counter:
            self.forward_backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="sd1")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--resolution", type=int, help="default: 512, of SDXL 1024")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    args.resolution = args.resolution or {"sd1": 512, "sdxl": 1024}[args.family]
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    rate = matmul_rate()
    run = Run(args.family, args.batch_size, args.gradient_checkpointing, args.compile, args.rank, args.resolution)
    # Recomputed blocks are no use to anybody: the share counts the plain step's arithmetic.
    flops = 0
    if not args.compile and not args.gradient_checkpointing:
        flops = run.flops()
    times, first = [], None
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = run.step().item()
        times.append(time.perf_counter() - start)
        first = first or time.time() - START
    median = statistics.median(times[args.warmup :])
    result = {
        "engine": f"torch {torch.__version__}" + (" compiled" if args.compile else ""),
        **vars(args),
        "median_step_s": median,
        "images_s": args.batch_size / median,
        "start_to_first_step_s": first,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "matmul_tflops": rate / 1e12,
        "step_tflop": flops / 1e12,
        "loss": loss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
