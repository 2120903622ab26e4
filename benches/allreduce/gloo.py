"""All-reduce of torch's gloo backend, timed as `lorarun check-ranks` times ours.

Usage: gloo.py WORLD_SIZE ROUNDS BYTES...   Prints one line per size: bytes and median ms of rank 0.
"""

import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank: int, world_size: int, rounds: int, sizes: list[int]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for size in sizes:
        values = torch.empty(size // 4)
        times = []
        for round in range(rounds):
            values.copy_(torch.arange(values.numel()) % 1021)
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - start)
        if rank == 0:
            print(size, f"{statistics.median(times) * 1e3:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, rounds, *sizes = (int(argument) for argument in sys.argv[1:])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    mp.spawn(run, args=(world_size, rounds, sizes), nprocs=world_size)
