"""Makes tokens.json: ids of transformers' CLIPTokenizer for a list of captions, from the embedded
vocabulary. Usage: python make_tokens.py ../../../formats/data/clip_bpe_merges.txt > tokens.json
"""
import json
import os
import sys
import tempfile

import transformers

lines = open(sys.argv[1], encoding="utf-8").read().split("\n")[:-1]
merges = [tuple(line.split()) for line in lines]
printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
table, extra = [chr(b) for b in printable], 0
for b in range(256):
    if b not in printable:
        table.append(chr(256 + extra))
        extra += 1
names = table + [c + "</w>" for c in table] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
assert len(names) == 49408
folder = tempfile.mkdtemp()
json.dump({n: i for i, n in enumerate(names)}, open(os.path.join(folder, "vocab.json"), "w"))
open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8").write("#version: 0.2\n" + "\n".join(lines) + "\n")

words = "red blue green big small old new tall short wide".split()
prompts = [
    "", " ", "a", "a photo of sks dog", "sks dog, red bucket, night", "A PHOTO of   SKS\tdog\n",
    "1girl, solo, 2024 x 1536, 3.14159", "it's a dog's life, we'll they've I'm you'd don't he're",
    "masterpiece, (best quality:1.2), [lowres], {x|y}, <lora:foo:0.8>", "hello!!! wow!!", "!", "a!b ! c",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe", "cafe\u0301", "\u732b\u8033\u306e\u5c11\u5973\u3001\u5236\u670d", "\uff21\uff22\uff23 \uff11\uff12\uff13",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467", "\u201cquoted\u201d \u2018text\u2019 \u2014 dash\u2026",
    "<|startoftext|> inside <|endoftext|> tail", "under_score hyphen-ated slash/ed back\\slash", "tab\tand\u00a0nbsp\u3000wide",
    "#$%^&*()_+-=[]{};':\",./<>?", "\u0130stanbul \u01c5 \ufb01ne", "supercalifragilisticexpialidocious antidisestablishmentarianism",
    ", ".join(words), ", ".join(words * 5), ", ".join(f"{a} {b}" for a in words for b in words[:6]),
    "dog " * 75, "dog " * 76, "dog " * 74, "dog " * 149, "dog " * 150, "dog " * 225, "dog " * 300, "\u0000a\u0007b", "x" * 200,
]


def chunked(t, text, length):
    ids = t(text, padding="max_length", truncation=True, max_length=length).input_ids
    return ids


out = []
v1 = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
v2 = transformers.CLIPTokenizer.from_pretrained(folder, pad_token="!", model_max_length=77)
assert (v1.pad_token_id, v2.pad_token_id) == (49407, 0), (v1.pad_token_id, v2.pad_token_id)
for text in prompts:
    out.append(dict(text=text, v1=v1(text).input_ids[1:-1], v2=v2(text).input_ids[1:-1],
                    v1_line=chunked(v1, text, 77), v2_line=chunked(v2, text, 77)))

# Chunks and weights by the reference's own functions, when a folder of sd-scripts is given.
long = []
if len(sys.argv) > 2:
    import ast
    import re
    import typing
    import torch

    tree = ast.parse(open(sys.argv[2] + "/library/strategy_base.py").read())
    body = [n for n in tree.body if getattr(n, "name", None) == "TokenizeStrategy"]
    import logging
    space = dict(re=re, torch=torch, List=typing.List, Tuple=typing.Tuple, Union=typing.Union, Optional=typing.Optional,
                 Any=typing.Any, CLIPTokenizer=object, os=os, logger=logging.getLogger())
    exec(compile(ast.Module(body=body, type_ignores=[]), "s", "exec"), space)
    strategy = space["TokenizeStrategy"]()
    texts = ["a photo of sks dog", "dog " * 75, "dog " * 76, "dog " * 74, "dog " * 149, "dog " * 150, "dog " * 151,
             "dog " * 224, "dog " * 225, "dog " * 300, "a (red:1.3) [old] dog, ((big)) \\(x\\) " * 12, "(open", ""]
    for text in texts:
        for name, t in [("v1", v1), ("v2", v2)]:
            for length in [75, 150, 225]:
                ids = strategy._get_input_ids(t, text, length + 2).reshape(-1, 77)
                wids, weights = strategy._get_input_ids(t, text, length + 2, weighted=True)
                long.append(dict(text=text, version=name, length=length, ids=ids.tolist(),
                                 weighted_ids=wids.reshape(-1, 77).tolist(),
                                 weights=[[round(x, 6) for x in row] for row in weights.reshape(-1, 77).tolist()]))


def squeeze(row):
    """Runs of equal numbers as [number, count]."""
    runs = []
    for x in row:
        if runs and runs[-1][0] == x:
            runs[-1][1] += 1
        else:
            runs.append([x, 1])
    return runs


for o in out:
    for k in ("v1", "v2", "v1_line", "v2_line"):
        o[k] = squeeze(o[k])
for o in long:
    for k in ("ids", "weighted_ids", "weights"):
        o[k] = [squeeze(row) for row in o[k]]
print('{"prompts": [')
print(",\n".join(json.dumps(o) for o in out))
print('], "chunks": [')
print(",\n".join(json.dumps(o) for o in long))
print("]}")
