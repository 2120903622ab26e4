"""Makes resize.json: small pictures resized by OpenCV 4.10 (area, bilinear, bicubic, nearest) and Pillow 11.3
(lanczos, box), the libraries that sd-scripts resizes with.

Usage: python make_resize.py > resize.json
"""
import json

import cv2
import numpy as np
from PIL import Image

rng = np.random.default_rng(5)


def picture(width, height, channels):
    y, x = np.mgrid[0:height, 0:width]
    planes = [(np.sin(x * (0.3 + c * 0.2)) + np.cos(y * (0.5 - c * 0.1))) * 60 + 128 for c in range(channels)]
    noise = rng.integers(-40, 40, (height, width, channels))
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)


def flat(a):
    return dict(width=a.shape[1], height=a.shape[0], channels=a.shape[2], data=a.reshape(-1).tolist())


sources = [picture(24, 18, 3), picture(17, 23, 3), picture(20, 12, 4)]
cases = []
for index, source in enumerate(sources):
    h, w = source.shape[:2]
    sizes = [(w // 2, h // 2), (11, 7), (w * 3 // 4, h - 1), (w, h // 2), (w + 7, h + 5), (9, h * 2)]
    for size in sizes:
        for name, flag in [("area", cv2.INTER_AREA), ("bilinear", cv2.INTER_LINEAR),
                           ("bicubic", cv2.INTER_CUBIC), ("nearest", cv2.INTER_NEAREST_EXACT)]:
            cases.append(dict(source=index, filter=name, result=flat(cv2.resize(source, size, interpolation=flag))))
        mode = "RGBA" if source.shape[2] == 4 else "RGB"
        for name, flag in [("lanczos", Image.Resampling.LANCZOS), ("box", Image.Resampling.BOX)]:
            out = np.array(Image.fromarray(source, mode).resize(size, resample=flag))
            cases.append(dict(source=index, filter=name, result=flat(out)))
print('{"sources": [')
print(",\n".join(json.dumps(s, separators=(",", ":")) for s in map(flat, sources)))
print('], "cases": [')
print(",\n".join(json.dumps(c, separators=(",", ":")) for c in cases))
print("]}")
