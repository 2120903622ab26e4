"""All-reduce beside torch's gloo, inside one host and between two, in turns: see run.sh.

For each group of ranks gloo's processes are started once and wait; then ours and theirs sum in turns,
a few rounds each. The times are those of rank 0, from a barrier to the sum.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
NETNS = FOLDER.parent.parent / "tests/cluster/lab/netns.sh"
SIZES = [1_000_000, 10_000_000, 100_000_000]
# A lab of its own, beside one that tests may use.
os.environ["LAB_NAME"], os.environ["LAB_NET"] = "lrb", "10.78.0"
FIRST = "10.78.0.1"


class Group:
    """So many ranks on each of so many hosts; no host name: this machine as it is."""

    def __init__(self, hosts: list[str], ranks: int, port: int):
        self.hosts, self.ranks, self.port = hosts, ranks, port

    def address(self) -> str:
        return FIRST if len(self.hosts) > 1 else "127.0.0.1"

    def on(self, host: str) -> list[str]:
        return [str(NETNS), "exec", host] if host else []

    def start_gloo(self, python: str) -> list[subprocess.Popen]:
        started = []
        for rank in range(len(self.hosts) * self.ranks):
            host = self.hosts[rank // self.ranks]
            env = dict(
                os.environ,
                RANK=str(rank),
                WORLD_SIZE=str(len(self.hosts) * self.ranks),
                LOCAL_WORLD_SIZE=str(self.ranks),
                MASTER_ADDR=self.address(),
                MASTER_PORT=str(self.port),
                GLOO_SOCKET_IFNAME="eth0" if host else "lo",
            )
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            command = self.on(host) + [python, str(FOLDER / "gloo.py")]
            started.append(
                subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe)
            )
        if started[0].stdout.readline().strip() != "ready":
            sys.exit("error: gloo's ranks did not meet")
        return started

    def time_ours(self, lorarun: str, size: int, rounds: int) -> float:
        work = ["check-ranks", "--sizes", str(size), "--rounds", str(rounds)]
        started = []
        for number, host in enumerate(self.hosts):
            place = ["--num_processes", str(self.ranks)]
            if len(self.hosts) > 1:
                place = ["--nnodes", str(len(self.hosts)), "--node_rank", str(number)]
                place += ["--master_addr", self.address(), "--master_port", str(self.port + 1)]
                place += ["--nproc_per_node", str(self.ranks)]
            command = self.on(host) + [lorarun, *place, *work]
            started.append(
                subprocess.Popen(
                    command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
        said = [one.communicate() for one in started]
        if any(one.returncode for one in started):
            sys.exit(f"error: {lorarun} failed\n" + "\n".join(err for _, err in said))
        line = next(line for line in said[0][0].splitlines() if line.startswith("all_reduce"))
        return float(line.split()[4])


def time_gloo(first: subprocess.Popen, size: int, rounds: int) -> float:
    first.stdin.write(f"{size} {rounds}\n")
    first.stdin.flush()
    return statistics.median(float(one) for one in first.stdout.readline().split())


def compare(name: str, group: Group, options: argparse.Namespace) -> None:
    gloo = group.start_gloo(options.python)
    try:
        for size in SIZES:
            # Ours starts anew in each turn: of three rounds the median is not the first.
            rounds = options.rounds if size < SIZES[-1] else 3
            # Gloo's processes stay: their connections and pages are not fresh afterwards.
            time_gloo(gloo[0], size, 1)
            ours, theirs = [], []
            for _ in range(options.repeats):
                ours.append(group.time_ours(options.lorarun, size, rounds))
                theirs.append(time_gloo(gloo[0], size, rounds))
            ours, theirs = statistics.median(ours), statistics.median(theirs)
            print(
                f"{name:<28} {size:>10} {ours:>10.2f} {theirs:>10.2f} {theirs / ours:>13.2f}",
                flush=True,
            )
        gloo[0].stdin.close()
        for one in gloo:
            one.wait(20)
    finally:
        for one in gloo:
            one.kill()


def why_no_hosts() -> str:
    if os.geteuid() != 0:
        return "namespaces need root"
    if not NETNS.exists():
        return f"there is no {NETNS}"
    made = subprocess.run([str(NETNS), "up", "2"], capture_output=True, text=True)
    return made.stderr.strip() if made.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--lorarun", default="target/release/lorarun")
    parser.add_argument("--rounds", type=int, default=9, help="of a turn; 3 with 100 MB")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--only", choices=["local", "hosts"], help="a part of it")
    options = parser.parse_args()
    options.lorarun = str(pathlib.Path(options.lorarun).resolve())

    print("ranks                             bytes    ours ms    gloo ms   gloo / ours", flush=True)
    port = 29600 + os.getpid() % 300
    if options.only != "hosts":
        for ranks in (2, 4):
            compare(f"{ranks} on one host", Group([""], ranks, port + ranks), options)
    if options.only == "local":
        return
    why = why_no_hosts()
    if why:
        print(f"SKIPPED: two hosts, {why}", file=sys.stderr, flush=True)
        return
    hosts = ["h1", "h2"]
    try:
        for rate in ("", "1gbit"):
            for host in hosts if rate else []:
                limited = subprocess.run([str(NETNS), "rate", host, rate])
                if limited.returncode:
                    print(f"SKIPPED: {rate}, `tc` refuses", file=sys.stderr, flush=True)
                    return
            for ranks in (1, 2):
                name = f"{ranks} on each of 2 hosts {rate}".strip()
                compare(name, Group(hosts, ranks, port + 10 + 2 * ranks), options)
    finally:
        subprocess.run([str(NETNS), "down"])


if __name__ == "__main__":
    main()
