"""Writes lr_schedules.json: learning-rate factors of transformers' get_scheduler, step by step."""
import json
import pathlib

import torch
from transformers.optimization import get_scheduler

cases = []
for name in ["constant", "constant_with_warmup", "linear", "cosine"]:
    for warmup, total in [(0, 1), (0, 7), (0, 40), (1, 10), (5, 40), (10, 10)]:
        if name == "constant" and warmup:
            continue
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([parameter], lr=1.0)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        factors = []
        for _ in range(total + 1):
            factors.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        cases.append(
            {"scheduler": name, "warmup_steps": warmup, "total_steps": total, "factors": factors}
        )
path = pathlib.Path(__file__).with_name("lr_schedules.json")
path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
