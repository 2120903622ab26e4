#!/usr/bin/env python
"""Reference for LoRA-C3Lier on a parity folder, computed with PyTorch, diffusers and transformers.

usage: make_c3lier.py PARITY_FOLDER            writes PARITY_FOLDER/c3lier (the shape of PARITY_FOLDER/lierla)
       make_c3lier.py PARITY_FOLDER --check X  recomputes the existing case folder X from its init.safetensors and
                                               prints the largest differences; exit 1 above 2e-5 relative (measured: gradients of
                                               single tensors 1.1e-5, the rounding of float32; all else below 6e-6)

The cases and options are those of `lierla/cases.json`. `--check lierla` compares with what sd-scripts itself computed.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_layers import add_lora, file_tensors, lora_tensors
from objective import run_case

OUTPUT_CASES = {"clip_skip_none": "", "clip_skip_2": "clip_skip_2/"}
VARIANT_GRADIENT_CASES = ("v_param", "min_snr5", "min_snr5_v")


def parse_network(network):
    extra = dict(item.split("=", 1) for item in network.get("network_args", []))
    conv_dim = int(extra["conv_dim"]) if "conv_dim" in extra else None
    return network["network_dim"], network["network_alpha"], conv_dim, float(extra.get("conv_alpha", 1))


class Trial:
    """The models of a parity folder with LoRA on them, and its inputs, in one dtype."""

    def __init__(self, folder, network, dtype):
        self.dtype = dtype
        model = folder / "model"
        # Loaded as float16 files into float32: transformers would keep the file's dtype otherwise.
        self.unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
        for part in (self.unet, self.text):
            part.requires_grad_(False).eval().to(dtype)
        self.layers = add_lora(self.unet, self.text, *parse_network(network))
        for layer in self.layers.values():
            layer.to(dtype)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.tensors = lora_tensors(self.layers)

    def load(self, file):
        values = {key: value for key, value in file.items() if not key.endswith(".alpha")}
        if set(values) != set(self.tensors):
            odd = sorted(set(values) ^ set(self.tensors))
            raise SystemExit(f"the file and the model differ in {len(odd)} tensors, first: {odd[0]}")
        with torch.no_grad():
            for key, value in values.items():
                self.tensors[key].copy_(value)

    def batch(self, step, loss_weights):
        real = lambda name: self.inputs[name].to(self.dtype)
        return {
            # 0.18215 is applied in float32, as the reference does it
            "latents": (self.inputs["latents_raw"] * 0.18215).to(self.dtype),
            "noise": real("noise")[step],
            "offset_randn": real("offset_randn"),
            "timesteps": self.inputs["timesteps"][step],
            "input_ids": self.inputs["input_ids"],
            "loss_weights": torch.tensor(loss_weights, dtype=self.dtype),
        }

    def run(self, case, loss_weights):
        """Outputs and gradients {key: tensor} of one case."""
        for tensor in self.tensors.values():
            tensor.grad = None
        batch = self.batch(case["step"], loss_weights)
        out = run_case((self.unet, self.text), batch, case["options"], case["clip_skip"])
        out["loss"].backward()
        out = {key: value.detach() for key, value in out.items()}
        return out, {k: t.grad.clone() for k, t in self.tensors.items() if t.grad is not None}

    def train(self, adamw, loss_weights):
        """Five AdamW steps from the loaded weights; returns losses, gradient norms before clipping."""
        groups = {"textencoder": "lora_te_", "unet": "lora_unet_"}
        optimizer = torch.optim.AdamW(
            [
                {"params": [t for k, t in self.tensors.items() if k.startswith(groups[g])], "lr": lr}
                for g, lr in zip(adamw["groups"], adamw["lr"])
            ],
            betas=adamw["betas"],
            eps=adamw["eps"],
            weight_decay=adamw["weight_decay"],
        )
        losses, norms = [], []
        for step in range(len(self.inputs["timesteps"])):
            optimizer.zero_grad(set_to_none=True)
            loss = run_case((self.unet, self.text), self.batch(step, loss_weights), {})["loss"]
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), adamw["max_grad_norm"]).item())
            optimizer.step()
            losses.append(loss.item())
        return losses, norms


def total_norm(gradients):
    return torch.stack([g.norm() for g in gradients.values()]).norm().item()


def reference(trial, spec, init):
    """Everything a case folder holds: (ref, ref_variant_grads, cases, adamw results, after5)."""
    trial.load(init)
    weights = spec["loss_weights"]
    ref, variant_grads, cases = {}, {}, []
    for case in spec["cases"]:
        out, grads = trial.run(case, weights)
        cases.append({**case, "loss": out["loss"].item(), "grad_norm": total_norm(grads)})
        name = case["name"].removesuffix("_step0")
        if case["name"] in OUTPUT_CASES:
            prefix = OUTPUT_CASES[case["name"]]
            ref.update({prefix + key: value for key, value in out.items()})
            if not prefix:
                ref.update({f"grad/{key}": value for key, value in grads.items()})
        else:
            ref.update({f"variant/{name}/{key}": out[key] for key in ("noise_pred", "target")})
        if name in VARIANT_GRADIENT_CASES:
            variant_grads.update({f"{name}/grad/{k}": g for k, g in grads.items() if sampled(k)})
    losses, norms = trial.train(spec["adamw"], weights)
    return ref, variant_grads, cases, (losses, norms), file_tensors(trial.layers)


def sampled(key):
    """The modules whose gradients are kept for variants: a few of each kind."""
    kinds = (
        "layers_0_self_attn_q_proj.", "layers_2_mlp_fc1.", "layers_3_mlp_fc1.",
        "down_blocks_0_attentions_0_proj_in.", "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.",
        "mid_block_attentions_0_proj_out.", "up_blocks_3_attentions_2_proj_out.",
        "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj.",
        "down_blocks_0_downsamplers_0_conv.", "up_blocks_2_upsamplers_0_conv.", "mid_block_resnets_0_time_emb_proj.",
        "down_blocks_3_resnets_0_conv1.", "up_blocks_0_resnets_0_conv_shortcut.",
    )
    return any(kind in key for kind in kinds)


def only_where_different(ref):
    """Drops `variant/` tensors equal to the plain run's or to another kept variant's."""
    kept = {}
    for key, value in ref.items():
        if key.startswith("variant/"):
            last = key.rsplit("/", 1)[1]
            same = [k for k in kept if k == last or (k.startswith("variant/") and k.endswith("/" + last))]
            if any(torch.equal(kept[k], value) for k in same):
                continue
        kept[key] = value
    return kept


def noise_floor(single, double):
    """Largest float32-float64 difference and largest value of each group, as in the other folders' cases.json."""
    floor = {}

    def add(group, a, b):
        entry = floor.setdefault(group, {"maxdiff": 0.0, "maxabs": 0.0})
        entry["maxdiff"] = max(entry["maxdiff"], (a.double() - b.double()).abs().max().item())
        entry["maxabs"] = max(entry["maxabs"], b.double().abs().max().item())

    for key, value in single[0].items():
        if key.startswith("variant/"):
            group = key
        else:
            case = "clip_skip_2" if key.startswith("clip_skip_2/") else "clip_skip_none"
            rest = key.removeprefix("clip_skip_2/")
            group = f"lora/{case}/" + ("grad" if rest.startswith("grad/") else rest)
        add(group, value, double[0][key])
    for key, value in single[1].items():
        add("vgrad/" + key.split("/")[0], value, double[1][key])
    for key, value in single[4].items():
        add("after5", value, double[4][key])
    return floor


def rounding_only(double_ref):
    """LoRA tensors whose gradient is zero in exact arithmetic: what float32 gives there cannot be compared relatively.

    They are time_emb_proj of the blocks with one channel per group, where GroupNorm cancels the time embedding.
    """
    gradients = {k.removeprefix("grad/"): g for k, g in double_ref.items() if k.startswith("grad/")}
    return sorted(key for key, gradient in gradients.items() if gradient.norm() < 1e-14)


def fresh_init(trial, seed):
    """down as kaiming_uniform(a=sqrt(5)) draws it, up normal 0.05 (not zero, or every gradient of down would be)."""
    generator = torch.Generator().manual_seed(seed)
    init = {}
    for key, tensor in trial.tensors.items():
        if key.endswith("lora_down.weight"):
            bound = tensor[0].numel() ** -0.5
            init[key] = (torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound
        else:
            init[key] = torch.randn(tensor.shape, generator=generator) * 0.05
    return init


def write_folder(folder, spec, init):
    target = folder / "c3lier"
    target.mkdir(exist_ok=True)
    trial = Trial(folder, spec["network"], torch.float32)
    init = fresh_init(trial, 3) if init is None else init
    single = reference(trial, spec, init)
    double = reference(Trial(folder, spec["network"], torch.float64), spec, init)
    trial.load(init)
    metadata = {
        "ss_network_module": spec["network"]["network_module"],
        "ss_network_dim": str(spec["network"]["network_dim"]),
        "ss_network_alpha": str(spec["network"]["network_alpha"]),
        "ss_network_args": json.dumps(dict(item.split("=") for item in spec["network"]["network_args"])),
    }
    contiguous = lambda tensors: {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(contiguous(file_tensors(trial.layers)), target / "init.safetensors", {**metadata, "note": "parity init"})
    save_file(contiguous(only_where_different(single[0])), target / "ref.safetensors")
    save_file(contiguous(single[1]), target / "ref_variant_grads.safetensors")
    save_file(contiguous(single[4]), target / "after5.safetensors", {**metadata, "note": "after 5 steps"})
    adamw = {**spec["adamw"], "losses": single[3][0], "grad_norm_before_clip": single[3][1]}
    cases = {
        "network": spec["network"],
        "loss_weights": spec["loss_weights"],
        "cases": single[2],
        "adamw": adamw,
        "fp32_vs_fp64": noise_floor(single, double),
        "gradient_is_rounding_only": rounding_only(double[0]),
        "torch": torch.__version__,
    }
    for file in target.glob("*.safetensors"):
        file.chmod(0o644)
    (target / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(f"{target}: {len(trial.layers)} modules, {len(single[2])} cases, loss {single[2][0]['loss']:.6f}")
    print(f"{len(cases['gradient_is_rounding_only'])} gradients are zero but for rounding")


def check_folder(folder, name):
    case_folder = folder / name
    spec = json.loads((case_folder / "cases.json").read_text())
    init = load_file(case_folder / "init.safetensors")
    trial = Trial(folder, spec["network"], torch.float32)
    ref, variant_grads, cases, (losses, norms), after5 = reference(trial, spec, init)
    worst = {}

    def compare(group, name, ours, theirs):
        ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
        error = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        if error >= worst.get(group, (-1.0, ""))[0]:
            worst[group] = (error, name)

    for ours, theirs in zip(cases, spec["cases"]):
        compare("loss of a case", theirs["name"], ours["loss"], theirs["loss"])
        compare("gradient norm of a case", theirs["name"], ours["grad_norm"], theirs["grad_norm"])
    for step, (ours, theirs) in enumerate(zip(losses, spec["adamw"]["losses"])):
        compare("loss of an AdamW step", f"step {step}", ours, theirs)
    for step, (ours, theirs) in enumerate(zip(norms, spec["adamw"]["grad_norm_before_clip"])):
        compare("gradient norm of an AdamW step", f"step {step}", ours, theirs)
    for file, ours in (("ref", ref), ("ref_variant_grads", variant_grads), ("after5", after5)):
        path = case_folder / f"{file}.safetensors"
        if not path.exists():
            continue
        with safe_open(path, "pt") as theirs:
            for key in theirs.keys():
                if key not in ours:
                    raise SystemExit(f"{path} holds a tensor that was not computed: {key}")
                group = "gradient" if "grad/" in key else key.rsplit("/", 1)[-1]
                compare(f"{file}: {group if file != 'after5' else 'tensor'}", key, ours[key], theirs.get_tensor(key))
    for group, (error, name) in worst.items():
        print(f"{error:9.2e}  {group} ({name})")
    return all(error <= 2e-5 for error, _ in worst.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--check", metavar="CASE_FOLDER_NAME")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.check:
        sys.exit(0 if check_folder(args.folder, args.check) else 1)
    spec = json.loads((args.folder / "lierla" / "cases.json").read_text())
    spec["network"] = {**spec["network"], "network_args": ["conv_dim=4", "conv_alpha=1"]}
    write_folder(args.folder, spec, None)


if __name__ == "__main__":
    main()
