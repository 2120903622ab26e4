"""Writes tests/data/resize_images: what sd-scripts' resize_images_to_resolution.py makes of in/, with each
resolution from the original and width and height not swapped (it does both otherwise).

usage: make_resize_images.py FOLDER       reads FOLDER/in; made with OpenCV 5.0 and Pillow 13.0
"""
import math
import pathlib
import sys

import cv2
import numpy as np
from PIL import Image


def opencv(flag):
    return lambda pixels, size: cv2.resize(pixels, size, interpolation=flag)


def pillow(flag):
    return lambda pixels, size: np.array(Image.fromarray(pixels).resize(size, resample=flag))


FILTERS = {
    "area": opencv(cv2.INTER_AREA),
    "cubic": opencv(cv2.INTER_CUBIC),
    # Its table of Pillow's filters has no `lanczos4`, so Pillow takes its default.
    "lanczos4": pillow(None),
    "linear": opencv(cv2.INTER_LINEAR),
    "nearest": opencv(cv2.INTER_NEAREST_EXACT),
    "box": pillow(Image.Resampling.BOX),
}


def resized(pixels, resolution, divisible_by, resize):
    height, width = pixels.shape[:2]
    if height * width > resolution * resolution:
        scale = math.sqrt(resolution * resolution / (height * width))
        pixels = resize(pixels, (int(width * scale), int(height * scale)))
    height, width = (side - side % divisible_by for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]


folder = pathlib.Path(sys.argv[1])
for name, resize in FILTERS.items():
    (folder / name).mkdir(exist_ok=True)
    sources = ["img00.png", "img11.jpg"] if name == "area" else ["img00.png"]
    for source in sources:
        pixels = np.array(Image.open(folder / "in" / source).convert("RGB"))
        result = resized(pixels, 384, 8, resize)
        Image.fromarray(result).save(folder / name / f"{source[:5]}+384x384.png")
