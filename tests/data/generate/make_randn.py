"""Normal numbers of PyTorch's CPU generator: every eighth of each call, calls in a row."""
import json
import torch

cases = []
for seed in (0, 42, 2**32 - 1, 2**33 + 5):
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for length in (4 * 8 * 8, 100, 4 * 8 * 8):
        values = torch.randn(length, generator=generator)
        calls.append({"len": length, "values": [float(v) for v in values[::8]]})
    cases.append({"seed": seed, "calls": calls})
with open("torch_randn.json", "w") as file:
    json.dump(cases, file)
    file.write("\n")
