"""Loads a converted model in diffusers and compares what it computes with the original.

python check_converted.py ORIGINAL_FOLDER CONVERTED_FOLDER [CONVERTED_SINGLE_FILE]

ORIGINAL_FOLDER is a diffusers folder, CONVERTED_FOLDER what `lorarun convert` made of it by way of a
single file, CONVERTED_SINGLE_FILE that file. Heads of small models, which no shape tells, are taken
from the original's configs; everything else must stand in the converted folder. Fails on a weight that
differs, a warning of the loader about one, or another noise prediction.
"""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

HEADS = {"unet": ["attention_head_dim"], "text_encoder": ["num_attention_heads"], "text_encoder_2": ["num_attention_heads"]}


def load(folder):
    index = json.loads((folder / "model_index.json").read_text())
    cls = StableDiffusionXLPipeline if "XL" in index["_class_name"] else StableDiffusionPipeline
    # The small models come without tokenizers.
    parts = ("tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    absent = {key: None for key in parts if index.get(key) == [None, None]}
    return cls.from_pretrained(folder, dtype=torch.float32, **absent)


def with_heads(original, converted):
    to = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(converted, to)
    for part, keys in HEADS.items():
        path = to / part / "config.json"
        if not path.exists():
            continue
        config, source = json.loads(path.read_text()), json.loads((original / part / "config.json").read_text())
        config.update({key: source[key] for key in keys})
        path.write_text(json.dumps(config))
        # Whatever else decides about numbers must be told alike.
        for key, value in config.items():
            told = source.get(key)
            if key in ("_diffusers_version", "sample_size", "architectures", "dropout", "torch_dtype", "dtype"):
                continue
            same = value == told or isinstance(told, list) and set(told) == {value} or isinstance(value, list) and set(value) == {told}
            if not same:
                print(f"note: {part}/{key}: {told} in the original, {value} here")
    return to


def predict(pipe):
    torch.manual_seed(0)
    config = pipe.unet.config
    latents = torch.randn(2, config.in_channels, 16, 24)
    ids = torch.randint(0, 49000, (2, 77))
    ids[:, -1] = 49407
    with torch.no_grad():
        extra = {}
        if hasattr(pipe, "text_encoder_2"):
            one = pipe.text_encoder(ids, output_hidden_states=True)
            two = pipe.text_encoder_2(ids, output_hidden_states=True)
            context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
            extra["added_cond_kwargs"] = {"text_embeds": two[0], "time_ids": torch.tensor([[64.0, 48, 0, 8, 64, 48]] * 2)}
        else:
            context = pipe.text_encoder(ids)[0]
        noise = pipe.unet(latents, torch.tensor([400, 20]), context, **extra).sample
        picture = pipe.vae.decode(latents[:1]).sample
        mean = pipe.vae.encode(picture).latent_dist.mean
    return {"context": context, "noise": noise, "picture": picture, "latent mean": mean}


def compare(what, expected, pipe):
    found = predict(pipe)
    for name, tensor in expected.items():
        differs = (tensor - found[name]).abs().max().item()
        print(f"{what}: {name} differs by {differs} of {tensor.abs().max().item():.3f}")
        assert differs <= 1e-6 * max(1.0, tensor.abs().max().item()), (what, name)


class Strict(logging.Handler):
    def emit(self, record):
        text = record.getMessage()
        assert not any(word in text for word in ("newly initialized", "not used", "missing", "unexpected")), text


for name in ("diffusers", "transformers"):
    logging.getLogger(name).addHandler(Strict())

original, converted = Path(sys.argv[1]), Path(sys.argv[2])
load(converted)
expected = load(original)
patched = with_heads(original, converted)
pipe = load(patched)
for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
    model = getattr(expected, part, None)
    if model is None:
        continue
    ours = getattr(pipe, part).state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys(), part
    assert all(torch.equal(ours[k], v) for k, v in theirs.items()), part
    print(f"{part}: {len(theirs)} tensors equal")
numbers = predict(expected)
compare("folder", numbers, pipe)
print("tokenizer:", pipe.tokenizer("a photo of sks dog, red bucket", padding="max_length", max_length=77).input_ids[:12])
print("pad:", pipe.tokenizer.pad_token, getattr(getattr(pipe, "tokenizer_2", None), "pad_token", ""))
print("scheduler:", type(pipe.scheduler).__name__, pipe.scheduler.config.prediction_type)
image = pipe("a dog", num_inference_steps=2, height=128, width=128, output_type="np").images
print("a picture:", image.shape)
if len(sys.argv) > 3:
    single = type(pipe).from_single_file(sys.argv[3], config=str(patched), dtype=torch.float32, local_files_only=True)
    if hasattr(single, "text_encoder_2"):
        # diffusers tells the encoders apart by their widths, which are the same in the small model.
        tensors = single_file_utils.convert_open_clip_checkpoint(
            single.text_encoder_2, load_file(sys.argv[3]), "conditioner.embedders.1.model."
        )
        single.text_encoder_2 = type(expected.text_encoder_2)(expected.text_encoder_2.config).eval()
        single.text_encoder_2.load_state_dict(tensors)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(expected, part):
            ours, theirs = getattr(single, part).state_dict(), getattr(expected, part).state_dict()
            wrong = [k for k, v in theirs.items() if k not in ours or not torch.equal(ours[k], v)]
            print(f"single file: {part}: {len(wrong)} of {len(theirs)} tensors differ", wrong[:3])
    compare("single file", numbers, single)
