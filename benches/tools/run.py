"""The tools beside sd-scripts' on full-size files, one after the other in one run.

    run.py LORARUN FOLDER [--sd_scripts DIR] [--pythonpath PATHS] [--sdxl] [--only NAME ...]

FOLDER holds what make_models.py wrote. Without --sd_scripts only ours run. Each of ours runs three
times, the median counts; theirs runs once. Memory is the largest anonymous resident set (RssAnon, what
cannot be dropped and read again) and the largest resident set of the process, read every 10 ms. Python
is the one that runs this script. Prints one line a tool: times, ratio, memory, ratio.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time


def resident(pid):
    """(anonymous, whole) KiB of a process now."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {line.split(":")[0]: line.split() for line in lines}
    return tuple(int(values[key][1]) if key in values else 0 for key in ("RssAnon", "VmRSS"))


def measure(command, environment=None):
    """Seconds, peak anonymous GiB, peak resident GiB."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0, 0]

    def watch():
        while process.poll() is None:
            now = resident(process.pid)
            peaks[0], peaks[1] = max(peaks[0], now[0]), max(peaks[1], now[1])
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    error = process.communicate()[1]
    watcher.join()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{error.decode()[-2000:]}")
    return seconds, peaks[0] / 2**20, peaks[1] / 2**20


def cases(folder, out, sdxl):
    """(name, our arguments, their script, their arguments); the output comes last."""
    a, b = folder / "lora_r4.safetensors", folder / "lora_r4b.safetensors"
    wide, wide_b = folder / "lora_r32.safetensors", folder / "lora_r32b.safetensors"
    model, tuned = folder / "sd15.safetensors", folder / "sd15_tuned.safetensors"
    merge = ["--sd_model", model, "--models", a, "--ratios", "0.8", "--save_precision", "fp16"]
    merge_wide = ["--sd_model", model, "--models", wide, wide_b, "--ratios", "0.8", "0.5",
                  "--save_precision", "fp16"]
    concat = ["--models", a, b, "--ratios", "0.7", "0.3", "--concat"]
    svd = ["--models", a, wide, "--ratios", "0.7", "0.3", "--new_rank", "32"]
    resize = ["--model", a, "--new_rank", "2"]
    extract = ["--model_org", model, "--model_tuned", tuned, "--dim", "4"]
    pictures = [folder / "pictures"]
    sizes = ["--max_resolution", "512x512,384x384", "--divisible_by", "8"]
    listed = [
        ("merge", "merge", merge, "networks/merge_lora.py", True),
        ("merge rank 32 twice", "merge", merge_wide, "networks/merge_lora.py", True),
        ("merge two LoRAs", "merge", concat, "networks/merge_lora.py", True),
        ("svd-merge", "svd-merge", svd, "networks/svd_merge_lora.py", True),
        ("resize-lora", "resize-lora", resize, "networks/resize_lora.py", True),
        ("extract", "extract", extract, "networks/extract_lora_from_models.py", True),
        ("extract exact", "extract", [*extract, "--exact"], None, True),
        ("resize-images", "resize-images", (pictures, sizes), "tools/resize_images_to_resolution.py", False),
    ]
    if sdxl:
        big, big_tuned = folder / "sdxl.safetensors", folder / "sdxl_tuned.safetensors"
        lora = folder / "sdxl_lora.safetensors"
        listed.append(("SDXL extract", "extract", ["--sdxl", "--model_org", big, "--model_tuned", big_tuned,
                                                  "--dim", "8", "--save_precision", "fp16"], None, True))
        if lora.exists():
            listed.append(("SDXL merge", "merge", ["--sd_model", big, "--models", lora, "--ratios", "0.8",
                                                   "--save_precision", "fp16"], None, True))
    for name, tool, arguments, script, to_file in listed:
        if to_file:
            ends = ["--save_to", out / f"{tool}.safetensors"]
            yield name, [tool, *arguments, *ends], script, [*arguments, *ends]
        else:
            yield (name, [tool, *arguments[0], out / "pictures", *arguments[1]], script,
                   [*arguments[0], out / "pictures", *arguments[1]])


def copy_seconds(source, out):
    """Seconds of `cp`, and of `cp` with the data on the disk."""
    times = []
    for after in ["", " && sync -f"]:
        target = out / "copy"
        start = time.perf_counter()
        subprocess.run(f"cp {source} {target}{after and after + ' ' + str(target)}", shell=True, check=True)
        times.append(time.perf_counter() - start)
        target.unlink()
    return times


def clear(out):
    for entry in out.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lorarun", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--sd_scripts", type=pathlib.Path)
    parser.add_argument("--pythonpath", default="")
    parser.add_argument("--sdxl", action="store_true")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    paths = [str(options.sd_scripts or ""), options.pythonpath, os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=":".join(path for path in paths[1:2] + paths[:1] + paths[2:] if path))
    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        out = pathlib.Path(out)
        for name in ["sd15", "sdxl"] if options.sdxl else ["sd15"]:
            source = options.folder / f"{name}.safetensors"
            with open(source, "rb") as file:  # into the page cache
                while file.read(1 << 24):
                    pass
            plain, synced = copy_seconds(source, out)
            print(f"cp of {name}: {plain:.2f} s, with the data on the disk {synced:.2f} s", flush=True)
        for name, ours, script, theirs in cases(options.folder, out, options.sdxl):
            if options.only and name not in options.only:
                continue
            runs = []
            for _ in range(options.runs):
                clear(out)
                runs.append(measure([options.lorarun, *ours]))
            seconds = statistics.median(run[0] for run in runs)
            anonymous, whole = (max(run[at] for run in runs) for at in (1, 2))
            line = f"{name:22} {seconds:7.2f} s  {anonymous:6.2f} GiB ({whole:.2f} with mapped files)"
            if script and options.sd_scripts:
                clear(out)
                command = [sys.executable, options.sd_scripts / script, *theirs]
                their_seconds, _, their_whole = measure(command, environment)
                line += (f"   sd-scripts {their_seconds:7.2f} s  {their_whole:6.2f} GiB"
                         f"   {their_seconds / seconds:6.1f}x faster, {their_whole / max(anonymous, 1e-3):.1f}x less memory")
            print(line, flush=True)


main()
