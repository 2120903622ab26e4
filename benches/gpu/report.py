#!/usr/bin/env python
"""One line of the GPU benchmark: report.py NAME BATCH WATCH.json LOG_FOLDER TORCH.json TORCH_COMPILED.json"""

import json
import pathlib
import statistics
import sys

NAME, BATCH, WATCH, LOGS, EAGER, COMPILED = sys.argv[1:]


def read(path):
    return json.loads(pathlib.Path(path).read_text() or "{}")


def main():
    batch, watch = int(BATCH), read(WATCH)
    log = next(pathlib.Path(LOGS).rglob("steps.jsonl"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    timed = steps[max(3, len(steps) // 10) :]
    seconds = statistics.median(line["seconds"] for line in timed)
    first = steps[0]["time"] - watch["start"] if "time" in steps[0] else float("nan")
    eager, compiled = read(EAGER), read(COMPILED)
    rate, work = eager.get("matmul_tflops", float("nan")), eager.get("step_tflop") or float("nan")
    print(f"{NAME:18} lorarun {batch / seconds:7.2f} images/s, {watch['peak_gib']:5.2f} GiB, first step after {first:5.1f} s, "
          f"{100 * work / seconds / rate:4.1f} % of {rate:.0f} TFLOP/s")
    for name, other in (("eager", eager), ("compiled", compiled)):
        if "median_step_s" not in other:
            print(f"{'':18} PyTorch {name}: failed")
            continue
        print(f"{'':18} PyTorch {name}: {other['images_s']:7.2f} images/s, {other['peak_reserved_gib']:5.2f} GiB, "
              f"first step after {other['start_to_first_step_s']:5.1f} s; "
              f"lorarun is {other['median_step_s'] / seconds:.2f} times as fast, takes "
              f"{watch['peak_gib'] / other['peak_reserved_gib']:.2f} of the memory")


if __name__ == "__main__":
    main()
