"""Makes the torch checkpoints of this folder with PyTorch itself: what our reader must agree with.

Run: python make_checkpoints.py   (torch, numpy, safetensors; writes into the script's folder)
"""
import collections
import pathlib
import pickle
import sys
import types
import zipfile

import numpy
import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
torch.manual_seed(0)

# PyTorch Lightning as old checkpoints refer to it, without needing it installed.
for name in ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]:
    sys.modules[name] = types.ModuleType(name)


class ModelCheckpoint:
    pass


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
ModelCheckpoint.__qualname__ = "ModelCheckpoint"
sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = ModelCheckpoint

big = torch.randn(6, 8)
tensors = {
    "plain.f32": torch.randn(3, 4),
    "plain.f16": torch.randn(5).half(),
    "plain.bf16": torch.randn(2, 2, 2).bfloat16(),
    "plain.f64": torch.randn(2).double(),
    "plain.i64": torch.tensor([1, -2, 1 << 40]),
    "plain.i32": torch.tensor([7, -8], dtype=torch.int32),
    "plain.i16": torch.tensor([7, -8], dtype=torch.int16),
    "plain.i8": torch.tensor([7, -8], dtype=torch.int8),
    "plain.u8": torch.tensor([7, 248], dtype=torch.uint8),
    "plain.bool": torch.tensor([True, False, True]),
    "plain.f8": torch.tensor([1.5, -448.0, 0.0]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "shared.rows": big[1:3],
    "shared.all": big,
    "strided.transposed": big.t(),
    "strided.columns": big[:, 2:7:2],
    "strided.permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "strided.expanded": torch.randn(3, 1).expand(3, 5),
    "strided.size_one": torch.randn(4, 1, 3).transpose(0, 1),
    "parameter": torch.nn.Parameter(torch.randn(2, 3)),
}
callback = ModelCheckpoint()
callback.best = 0.5
full = {
    "epoch": 3,
    "global_step": 1 << 70,
    "pytorch-lightning_version": "1.4.2",
    "state_dict": collections.OrderedDict(list(tensors.items()) + [("not_a_tensor", [1, 2]), (5, "five")]),
    "callbacks": {ModelCheckpoint: {"monitor": "val", "score": numpy.float64(0.25), "x": numpy.arange(3)}},
    "object": callback,
    "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}],
    "set": {1, 2},
    "none": None,
    "bytes": b"\x00\xff",
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
}
torch.save(full, here / "nested.ckpt")
torch.save({k: v for k, v in tensors.items()}, here / "flat.pt")
torch.save(tensors, here / "flat_protocol4.bin", pickle_protocol=4)
torch.save({"w": torch.ones(2)}, here / "before_1_6.ckpt", _use_new_zipfile_serialization=False)
save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, here / "expected.safetensors")

# A LoRA as sd-scripts saves it with --save_model_as=pt.
lora = collections.OrderedDict()
for name, (rows, columns) in {"lora_te_text_model_encoder_layers_0_mlp_fc1": (6, 4), "lora_unet_mid_block_attentions_0_proj_in": (4, 4)}.items():
    conv = (1, 1) if "proj_in" in name else ()
    lora[f"{name}.lora_up.weight"] = torch.randn(rows, 2, *conv).half()
    lora[f"{name}.lora_down.weight"] = torch.randn(2, columns, *conv).half()
    lora[f"{name}.alpha"] = torch.tensor(1.0).half()
torch.save(lora, here / "lora.pt")
save_file({k: v.contiguous() for k, v in lora.items()}, here / "lora_expected.safetensors")


# Refused: its pickle would run a command in Python's own loader.
class Evil:
    def __reduce__(self):
        import os
        return os.system, ("echo pwned",)


torch.save({"state_dict": {"w": torch.ones(2)}, "evil": Evil()}, here / "evil.ckpt")
for path in sorted(here.iterdir()):
    print(path.name, path.stat().st_size)

# What accelerate keeps of AdamW.
parameters = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(3, 2))]
optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 1e-3}, {"params": parameters[1:], "lr": 1e-4}])
for number in range(2):
    optimizer.zero_grad()
    (parameters[0].sum() * (number + 1) + (parameters[1] ** 2).sum()).backward()
    optimizer.step()
torch.save(optimizer.state_dict(), here / "optimizer.bin")
moments = {f"{n}.{key}": value.contiguous() for n, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
save_file(moments, here / "optimizer_expected.safetensors")
