"""``make fuzz SECONDS=600``: every target in rotation, with seeds from the clock; the finds are written to finds/."""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter

from . import TARGETS
from .runner import CASES, Find, read_case, run

_TURN = 5  # seconds of a target in a row


def main() -> int:
    """Run for some seconds, and return 1 if there are finds."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long, over all targets; default: %(default)s")
    parser.add_argument("--target", action="append", choices=TARGETS, help="this one only; repeatable")
    parser.add_argument("--seed", type=int, help="this seed of --target only")
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    finds: Counter[tuple[str, str]] = Counter()

    def report(found: list[Find]) -> None:
        for find in found:
            finds[find.target, find.kind] += 1
            if finds[find.target, find.kind] == 1:
                print(f"{find.problem.strip()}\n{find.target}, seed {find.seed}: {find.save()}\n", flush=True)

    if arguments.seed is not None:
        for name in names:
            report(run(TARGETS[name], [arguments.seed])[1])
        return int(bool(finds))
    end = time.monotonic() + arguments.seconds
    for path in sorted(CASES.glob("*.json")):
        name, made = read_case(path)
        if name in names:
            report(run(TARGETS[name], [0], lambda _, made=made: made)[1])
    first, done = time.time_ns() // 1000, Counter[str]()
    for turn in itertools.count():
        left = end - time.monotonic()
        if left <= 0:
            break
        name = names[turn % len(names)]
        seeds = range(first + done[name], first + done[name] + 10**6)
        # On one to three threads, whose parts of the work begin elsewhere.
        count, found = run(TARGETS[name], seeds, seconds=min(_TURN, left), threads=1 + turn // len(names) % 3)
        done[name] += count
        report(found)
    for name in names:
        count = sum(number for (target, _), number in finds.items() if target == name)
        print(f"{name:16} {done[name]:10,} inputs {count:6,} finds")
    for (target, kind), number in finds.items():
        print(f"{number:6,} {target}: {kind}")
    print(f"{done.total():,} inputs, {finds.total():,} finds of {len(finds):,} kinds")
    return int(bool(finds))


if __name__ == "__main__":
    raise SystemExit(main())
