#!/usr/bin/env python
"""Runs a command and notes its start, its end and the most GPU memory in use meanwhile: watch.py RESULT.json -- COMMAND...

The memory is the card's, as nvidia-smi reports it, less what was in use before: run nothing else on the card.
"""

import json
import subprocess
import sys
import threading
import time

QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]


def used_mib():
    return int(subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split()[0])


def main():
    result, command = sys.argv[1], sys.argv[3:]
    before = used_mib()
    peak, done = [before], threading.Event()

    def sample():
        while not done.wait(0.05):
            peak[0] = max(peak[0], used_mib())

    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.time()
    code = subprocess.run(command).returncode
    end = time.time()
    done.set()
    watcher.join()
    facts = {"start": start, "end": end, "peak_gib": (peak[0] - before) / 1024, "exit_code": code}
    with open(result, "w") as file:
        json.dump(facts, file)
    sys.exit(code)


if __name__ == "__main__":
    main()
