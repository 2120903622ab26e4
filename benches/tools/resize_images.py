"""`resize-images` beside the reference's algorithm in Python, on twelve pictures of photographs' sizes.

    resize_images.py LORARUN PYTHON [--sd_scripts DIR] [--pictures FOLDER] [--runs 3]

PYTHON needs numpy, Pillow and OpenCV. The pictures are drawn unless a folder is given. Python runs what
resize_images_to_resolution.py does (each resolution from the original) without what else sd-scripts
imports; with --sd_scripts that script itself runs too, which needs all that sd-scripts needs. The median
of the runs counts, the start of the process with it. Memory is the largest resident set.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

DRAW = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from make_models import write_pictures
write_pictures(pathlib.Path(sys.argv[2]))
"""

REFERENCE = """
import math, os, sys
import cv2, numpy as np
from PIL import Image
source, target, resolutions, divisible_by, png = sys.argv[1:]
for name in os.listdir(source):
    original = np.array(Image.open(os.path.join(source, name)).convert("RGB"))
    for resolution in resolutions.split(","):
        side_x, side_y = map(int, resolution.split("x"))
        pixels = original
        height, width = pixels.shape[:2]
        if height * width > side_x * side_y:
            scale = math.sqrt(side_x * side_y / (height * width))
            pixels = cv2.resize(pixels, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
        height, width = (side - side % int(divisible_by) for side in pixels.shape[:2])
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        stem = os.path.splitext(name)[0]
        out = os.path.join(target, f"{stem}+{resolution}." + ("png" if png == "png" else "jpg"))
        Image.fromarray(pixels[top:top + height, left:left + width]).save(out, quality=100)
"""


def measure(command, runs, environment=None):
    """Median seconds, largest resident MiB, of `command(folder)` into empty folders."""
    seconds, peak = [], 0
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as out:
            words = [str(word) for word in command(out)]
            start = time.perf_counter()
            child = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL)
            status, usage = os.wait4(child.pid, 0)[1:]
            seconds.append(time.perf_counter() - start)
            if status != 0:
                sys.exit(f"failed: {' '.join(words)}")
            peak = max(peak, usage.ru_maxrss / 1024)
    return statistics.median(seconds), peak


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lorarun", type=pathlib.Path)
    parser.add_argument("python")
    parser.add_argument("--sd_scripts", type=pathlib.Path)
    parser.add_argument("--pictures", type=pathlib.Path)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        pictures = options.pictures or pathlib.Path(drawn)
        if not options.pictures:
            here = pathlib.Path(__file__).resolve().parent
            subprocess.run([options.python, "-c", DRAW, here, drawn], check=True)
        for resolutions in ["512x512,384x384,256x256,128x128", "1024x1024"]:
            for png in [[], ["--save_as_png"]]:
                wanted = ["--max_resolution", resolutions, "--divisible_by", "8", *png]
                ours, our_peak = measure(
                    lambda out: [options.lorarun, "resize-images", pictures, out, *wanted], options.runs)
                theirs = {"python": measure(
                    lambda out: [options.python, "-c", REFERENCE, pictures, out, resolutions, "8",
                                 "png" if png else "jpg"], options.runs)}
                if options.sd_scripts:
                    script = options.sd_scripts / "tools/resize_images_to_resolution.py"
                    environment = dict(os.environ, PYTHONPATH=str(options.sd_scripts))
                    theirs["sd-scripts"] = measure(
                        lambda out: [options.python, script, pictures, out, *wanted], options.runs, environment)
                line = f"{resolutions:32}{'png' if png else 'jpg'}  ours {ours:6.2f} s {our_peak:5.0f} MiB"
                for name, (seconds, peak) in theirs.items():
                    line += f"   {name} {seconds:6.2f} s {peak:5.0f} MiB ({seconds / ours:.1f}x the time)"
                print(line, flush=True)


main()
