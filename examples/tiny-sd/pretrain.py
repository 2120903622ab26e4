"""Pretrains the small model of this folder on pictures that shapes.py draws.

    python pretrain.py --output examples/tiny-sd --tokenizer FOLDER

Needs torch, diffusers, transformers (README.md has the versions and the times). The model has
the layout of Stable Diffusion 1.x as diffusers keeps it: CLIP text encoder, U-Net, VAE, epsilon
prediction, latents an eighth of the picture.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import shapes

SIZE = 64
TOKENS = 77


def small_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), norm_num_groups=8, layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=SIZE, scaling_factor=0.18215,
    )


def small_unet(text_width):
    return UNet2DConditionModel(
        sample_size=SIZE // 8, in_channels=4, out_channels=4, layers_per_block=2,
        block_out_channels=(32, 48, 48, 48), norm_num_groups=8, cross_attention_dim=text_width,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def small_text_encoder():
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=TOKENS, hidden_act="quick_gelu",
        projection_dim=24, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    ))


def train_vae(vae, steps, seed, batch=8):
    """Absolute and squared error, a trace of KL."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        scenes = [shapes.scene(draw, shapes.SHAPES + (shapes.CONCEPT,)) for _ in range(batch)]
        pixels = shapes.draw(scenes, SIZE, draw)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (restored - pixels)
        loss = error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean() / (SIZE * SIZE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"vae {step} loss {float(loss):.4f} mae {float(error.abs().mean()):.4f} {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def encode(vae, count, seed, batch=16):
    """`count` drawn scenes and the means of their latents."""
    draw = torch.Generator().manual_seed(seed)
    scenes, latents = [], []
    for _ in range(count // batch):
        some = [shapes.scene(draw) for _ in range(batch)]
        latents.append(vae.encode(shapes.draw(some, SIZE, draw)).latent_dist.mean)
        scenes += some
    return scenes, torch.cat(latents)


@torch.no_grad()
def whiten(vae, latents):
    """Moves the latents' mean and size into the VAE's 1x1 convolutions, so that latents times
    0.18215 have mean 0 and deviation 1, which SD1's files take for granted."""
    mean = latents.mean((0, 2, 3))
    factor = 1 / (0.18215 * latents.std((0, 2, 3)))
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= factor.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) * factor
    quant.bias[4:] += 2 * factor.log()
    post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
    post.weight /= factor.view(1, 4, 1, 1)
    return (latents - mean.view(1, 4, 1, 1)) * factor.view(1, 4, 1, 1)


def tokens(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids


class Average:
    """A moving average of all weights."""

    def __init__(self, modules):
        self.modules = modules
        self.kept = [p.detach().clone() for m in modules for p in m.parameters()]

    @torch.no_grad()
    def update(self, step):
        decay = min(0.999, (1 + step) / (20 + step))
        for kept, now in zip(self.kept, (p for m in self.modules for p in m.parameters())):
            kept.lerp_(now, 1 - decay)

    @torch.no_grad()
    def swap(self):
        for kept, now in zip(self.kept, (p for m in self.modules for p in m.parameters())):
            held = now.clone()
            now.copy_(kept)
            kept.copy_(held)


def train_unet(unet, text, vae, tokenizer, scenes, latents, steps, batch, seed, each, peak):
    draw = torch.Generator().manual_seed(seed)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0).float()
    ratio = signal / (1 - signal)
    weight = ratio.clamp(max=5) / ratio
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    average = Average([unet, text])
    started, losses = time.time(), []
    for step in range(steps):
        rate = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(scenes), (batch,), generator=draw)
        captions = [shapes.caption(scenes[row], draw) for row in rows.tolist()]
        empty = torch.rand(batch, generator=draw) < 0.1
        captions = ["" if none else caption for none, caption in zip(empty.tolist(), captions)]
        clean = latents[rows]
        times = torch.randint(1000, (batch,), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        part = signal[times].view(-1, 1, 1, 1)
        noisy = part.sqrt() * clean + (1 - part).sqrt() * noise
        hidden = text(tokens(tokenizer, captions)).last_hidden_state
        predicted = unet(noisy, times, hidden).sample
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weight[times]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        losses.append(float(loss))
        if step % 50 == 0:
            print(f"unet {step} loss {sum(losses[-50:]) / len(losses[-50:]):.4f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % each == 0 or step + 1 == steps:
            average.swap()
            print(f"after {step + 1} steps: {hits(unet, text, vae, tokenizer, 60, seed)}", flush=True)
            save(unet, text, vae, "checkpoint")
            average.swap()
    average.swap()


@torch.no_grad()
def hits(unet, text, vae, tokenizer, count, seed, steps=20, scale=5.0):
    """How often a generated picture shows the asked shape, colour, background, and shape and colour."""
    draw = torch.Generator().manual_seed(seed + 1)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(steps)
    asked = [shapes.scene(draw) for _ in range(count)]
    hidden = text(tokens(tokenizer, [""] * count + [shapes.caption(s) for s in asked])).last_hidden_state
    latents = torch.randn(count, 4, SIZE // 8, SIZE // 8, generator=draw)
    for now in scheduler.timesteps:
        without, with_prompt = unet(torch.cat([latents] * 2), now, hidden).sample.chunk(2)
        latents = scheduler.step(without + scale * (with_prompt - without), now, latents).prev_sample
    pictures = torch.cat([vae.decode(part / 0.18215).sample for part in latents.split(8)])
    from PIL import Image
    columns = 10
    sheet = pictures[: count // columns * columns].reshape(-1, columns, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2)
    sheet = ((sheet + 1) * 127.5).clamp(0, 255).byte().reshape(-1, columns * SIZE, 3)
    Image.fromarray(sheet.numpy()).save("sheet.png")
    seen = [shapes.judge(picture) for picture in pictures]
    keys = ("shape", "colour", "background")
    rates = [sum(s[i] == a[k] for s, a in zip(seen, asked)) / count for i, k in enumerate(keys)]
    both = sum(s[0] == a["shape"] and s[1] == a["colour"] for s, a in zip(seen, asked)) / count
    return dict(zip((*keys, "shape and colour"), [round(r, 3) for r in (*rates, both)]))


def save(unet, text, vae, folder):
    for name, module in (("unet", unet), ("text_encoder", text), ("vae", vae)):
        copy.deepcopy(module).to(torch.float16).save_pretrained(Path(folder) / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of CLIP's tokenizer")
    parser.add_argument("--vae_steps", type=int, nargs="+", default=[2000, 5000], help="one warm restart for each number")
    parser.add_argument("--steps", type=int, nargs="+", default=[5000, 4000], help="one warm restart for each number")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--first_cycle", type=int, default=0, help="go on with what --output holds from this one on")
    parser.add_argument("--every", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer)
    vae, text = small_vae(), small_text_encoder()
    unet = small_unet(text.config.hidden_size)
    for name, module in (("vae", vae), ("text encoder", text), ("U-Net", unet)):
        print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters", flush=True)
    ready = Path("vae.pt")
    if ready.exists():
        vae.load_state_dict(torch.load(ready))
    else:
        for seed, steps in enumerate(args.vae_steps):
            train_vae(vae, steps, 1 + 10 * seed)
        torch.save(vae.state_dict(), ready)
    if args.first_cycle > 0:
        unet = UNet2DConditionModel.from_pretrained(args.output, subfolder="unet").float()
        text = CLIPTextModel.from_pretrained(args.output, subfolder="text_encoder").float()
    scenes, latents = encode(vae, args.pictures, 2)
    latents = whiten(vae, latents) * 0.18215
    print(f"latents: mean {float(latents.mean()):.3f}, deviation {float(latents.std()):.3f}", flush=True)
    for cycle, steps in enumerate(args.steps):
        if cycle < args.first_cycle:
            continue
        peak = 1.5e-3 if cycle == 0 else 8e-4
        train_unet(unet, text, vae, tokenizer, scenes, latents, steps, args.batch, 3 + 10 * cycle, args.every, peak)
    save(unet, text, vae, args.output)


if __name__ == "__main__":
    main()
