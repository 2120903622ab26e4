"""Writes adamw.safetensors: 20 steps of torch.optim.AdamW (torch 2.11, float32, CPU)."""

import torch
from safetensors.torch import save_file

torch.manual_seed(0)
out = {}
cases = {
    "default": dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    "strong": dict(lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
}
for name, options in cases.items():
    start = torch.randn(100)
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], foreach=False, fused=False, **options)
    grads, params = [], []
    for step in range(20):
        param.grad = torch.randn(100) * 10.0 ** -(step % 4)
        grads.append(param.grad.clone())
        optimizer.step()
        params.append(param.detach().clone())
    out[f"{name}.start"] = start
    out[f"{name}.grads"] = torch.stack(grads)
    out[f"{name}.params"] = torch.stack(params)
save_file(out, "adamw.safetensors")
