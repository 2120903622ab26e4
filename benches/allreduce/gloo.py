"""One rank of torch's gloo backend, whose all-reduce is timed as `lorarun check-ranks` times ours.

Rank and sizes of the group come from torchrun's variables. Rank 0 reads lines `BYTES ROUNDS` and answers
each with the milliseconds of its rounds; the other ranks are told by a broadcast. The end of the input
is the end.
"""

import os
import sys
import time

import torch
import torch.distributed as dist


def next_request(rank: int) -> tuple[int, int]:
    request = torch.zeros(2, dtype=torch.int64)
    if rank == 0:
        line = sys.stdin.readline().split()
        if line:
            request = torch.tensor([int(word) for word in line], dtype=torch.int64)
    dist.broadcast(request, 0)
    return int(request[0]), int(request[1])


def main() -> None:
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        print("ready", flush=True)
    while True:
        size, rounds = next_request(rank)
        if rounds == 0:
            break
        values = torch.empty(size // 4)
        times = []
        for _ in range(rounds):
            values.copy_(torch.arange(values.numel()) % 1021)
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            times.append((time.perf_counter() - start) * 1e3)
        if rank == 0:
            print(*(f"{one:.3f}" for one in times), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
