"""A process that takes a device lock on command. Run as a script: lock_actor.py ROLE KEY DIRECTORY ...

hold-using / hold-measuring   enter, say "in", stay until a line comes in, leave, say "out"
fork-using / fork-measuring   the same, but with a forked child that lives on (its pid is said before "in")
hammer COUNTS SLOT            short batches without a pause, counted in slot SLOT of the file COUNTS
journal NAME MODE ROUNDS LOG  ROUNDS times: enter, append "+NAME", append "-NAME", leave
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paretoprune.cluster.device_lock import DeviceLock


def hold(lock: DeviceLock, mode: str, fork: bool) -> None:
    print("asking", flush=True)
    with getattr(lock, mode)():
        if fork:
            started, tell = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(tell, b".")  # forked in full: what a child does first has been done
                while True:
                    time.sleep(60)
            os.read(started, 1)
            print(child, flush=True)
        print("in", flush=True)
        sys.stdin.readline()
    print("out", flush=True)


def hammer(lock: DeviceLock, counts: str, slot: int) -> None:
    with Path(counts).open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        mine = 0
        while True:
            with lock.using():
                mine += 1
                struct.pack_into("<q", view, 8 * slot, mine)
                time.sleep(0.002)


def journal(lock: DeviceLock, name: str, mode: str, rounds: int, log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    for _ in range(rounds):
        with getattr(lock, mode)():
            os.write(out, f"+{name}\n".encode())
            time.sleep(0.0005)
            os.write(out, f"-{name}\n".encode())


def main(role: str, key: str, directory: str, *rest: str) -> None:
    lock = DeviceLock(key, Path(directory))
    if role == "hammer":
        hammer(lock, rest[0], int(rest[1]))
    elif role == "journal":
        journal(lock, rest[0], rest[1], int(rest[2]), rest[3])
    else:
        how, mode = role.split("-")
        hold(lock, mode, fork=how == "fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
