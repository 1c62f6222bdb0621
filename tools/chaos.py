"""Everything that can happen to a server, for as long as you like; every answer is checked.

A server is asked for many adapters by HTTP and gRPC at once. Meanwhile it is killed, told to
end and started again; its adapters' files are replaced, written in place, cut short, removed
and forbidden; the disk for its copies is full (where a tmpfs can be mounted); clients leave in
the middle. Each answer is compared with that of a plain InferenceSession on a baked model.
Requests may be refused and sent again; none may be lost, and none may be answered wrong.

    python tools/chaos.py                # one process, 10,000 requests
    python tools/chaos.py --ray          # two replicas on Ray, whose processes are killed
    python tools/chaos.py --requests 1000000 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/fixtures"))
from chaos_clients import Ledger
from chaos_files import make_world
from chaos_victim import Victim, asked, fill_the_disk, happen, left_behind, settle
from serve_clients import alone, descendants, patient
from waiting import until

from onnx_adapt.serve.copies import Copies

RAY = ["--replicas", "2"]
PARTS = {
    "replica": b"ray::ServeReplica:adapted:Model",
    "gateway": b"ray::ServeReplica:adapted:Gateway",
    "repository": b"ray::ServeReplica:adapted:Repository",
    "proxy": b"ray::ProxyActor",
    "controller": b"ray::ServeController",
}
"""The processes of Ray that do something for a request, by how their command lines begin."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs on a folder, if the system lets us; whether it does."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def kill_part(victim: Victim, rng: Random) -> str:
    """Kill one process of Ray; its name."""
    name = rng.choice(list(PARTS))
    assert victim.process is not None
    found = [
        pid for pid, line in descendants(victim.process.pid) if line.startswith(PARTS[name])
    ]
    if not found:
        return f"{name} (away)"
    victim.ledger.killed = time.monotonic()
    victim.ledger.restarted = time.monotonic() + 3600  # until it is whole again
    os.kill(rng.choice(found), signal.SIGKILL)
    time.sleep(5)
    until(lambda: victim.answers("POST", "/v2/repository/index"), victim.said)
    victim.ledger.killed = victim.ledger.restarted = time.monotonic()
    return name


@contextlib.contextmanager
def ended_with(victim: Victim) -> Iterator[None]:
    """Start a server, and leave none behind."""
    victim.start()
    try:
        yield
    finally:
        if victim.process is not None:
            victim.process.kill()
            victim.process.wait()


def strike(victim: Victim, rng: Random, small: bool, on_ray: bool) -> Iterator[str]:
    """Two seconds of accidents to files, then one to the server; what each is called."""
    end = time.monotonic() + 2
    while time.monotonic() < end:
        yield happen(victim.world, rng)
        time.sleep(0.02)
    if small and rng.random() < 0.3:
        fill_the_disk(victim, rng)
        yield "full disk"
    if on_ray and rng.random() < 0.7:
        yield f"{kill_part(victim, rng)} killed"
        return
    kind = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    victim.end(kind)
    victim.start()
    yield kind.name


def run(requests: int, seed: int, on_ray: bool, folder: Path) -> int:
    """Let everything happen until so many requests were answered."""
    world, ledger, rng = make_world(folder, 6), Ledger(on_ray=on_ray), Random(seed)
    temporary = folder / "tmp"
    temporary.mkdir()
    options = ["--max-adapters", "4", "--batch-axis", "0", *(RAY if on_ray else [])]
    happened: Counter[str] = Counter()
    # Ray keeps its own logs there as well, and does not live without them.
    with small_disk(temporary) if not on_ray else contextlib.nullcontext(False) as small:
        victim = Victim(world, ledger, options, temporary, grpc=not on_ray)
        with ended_with(victim):
            with asked(victim, 16):
                while ledger.right < requests and not ledger.wrong:
                    happened.update(strike(victim, rng, small, on_ray))
                    print(f"{ledger.right} right", file=sys.stderr)
                if not ledger.wrong:
                    settle(victim)
            victim.end(signal.SIGTERM)
        if on_ray:  # a part that was killed has left its copies to the next start
            tempfile.tempdir = str(temporary)
            Copies().close()
        wrong = [*ledger.wrong[:20], *(f"left behind: {name}" for name in left_behind(victim))]
    print(f"{ledger.right} requests answered right")
    for title, counter in (("sent again", ledger.again), ("happened", happened)):
        for what, count in counter.most_common():
            print(f"{title}: {count:8} {what}")
    for what in wrong:
        print(f"WRONG: {what}")
    return int(bool(wrong))


def main() -> int:
    """Read the command line, and begin."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="how many to answer")
    parser.add_argument("--seed", type=int, default=0, help="another one, other accidents")
    parser.add_argument("--ray", action="store_true", help="two replicas on Ray")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    one_ray = alone() if given.ray else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, patient(), one_ray:
        return run(given.requests, given.seed, given.ray, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
