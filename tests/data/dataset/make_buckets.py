"""Makes buckets.json: bucket sizes and choices by the published rules of sd-scripts 0.10.1.

Usage: python make_buckets.py PATH_TO_SD_SCRIPTS > buckets.json
(the reference's own functions are called; nothing of them is kept here)
"""
import ast
import json
import math
import sys

root = sys.argv[1]


def take(path, names):
    tree = ast.parse(open(f"{root}/{path}").read())
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    return compile(ast.Module(body=body, type_ignores=[]), path, "exec")


import numpy as np
import typing

space = {"math": math, "np": np, "Tuple": typing.Tuple}
exec(take("library/model_util.py", {"make_bucket_resolutions"}), space)
space["model_util"] = type("m", (), {"make_bucket_resolutions": staticmethod(space["make_bucket_resolutions"])})
exec(take("library/train_util.py", {"BucketManager"}), space)
Manager = space["BucketManager"]

resolutions = []
for reso, low, high, steps in [
    ((512, 512), 256, 1024, 64), ((768, 768), 256, 1024, 64), ((640, 512), 256, 1024, 64),
    ((512, 768), 320, 1024, 64), ((1024, 1024), 256, 2048, 64), ((1024, 1024), 512, 1536, 32),
    ((256, 256), 64, 512, 64), ((832, 1216), 256, 2048, 32), ((512, 512), 128, 1024, 8),
]:
    sizes = space["make_bucket_resolutions"](reso, low, high, steps)
    resolutions.append(dict(resolution=reso, min=low, max=high, steps=steps, sizes=sizes))

images = [(512, 512), (640, 480), (480, 640), (1920, 1080), (1080, 1920), (300, 200), (200, 300),
          (1000, 1001), (4000, 3000), (3000, 4000), (5000, 700), (700, 5000), (768, 512), (333, 777),
          (256, 256), (513, 511), (1024, 1024), (1365, 768), (90, 2000), (2000, 333)]
choices = []
for reso in [(512, 512), (768, 768), (640, 512)]:
    for steps in [64, 32]:
        for no_upscale in [False, True]:
            manager = Manager(no_upscale, reso, 256, 1024, steps)
            if not no_upscale:
                manager.make_buckets()
            for image in images:
                bucket, resized, error = manager.select_bucket(*image)
                crop = Manager.get_crop_ltrb(bucket, image)
                choices.append(dict(resolution=reso, steps=steps, no_upscale=no_upscale, image=image,
                                    bucket=bucket, resized=resized, aspect_error=float(error),
                                    crop=[float(c) for c in crop]))
print("{\"resolutions\": [")
print(",\n".join(json.dumps(r) for r in resolutions))
print("], \"choices\": [")
print(",\n".join(json.dumps(c) for c in choices))
print("]}")
