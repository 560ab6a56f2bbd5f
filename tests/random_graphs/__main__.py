"""Random graphs by hand: ``python -m tests.random_graphs --count 2000 --seed 0``.

Prints every trial that is not right with its seed, and at the end a table of verdicts and the
reasons of refusals. Graphs that fail are minimised and saved in the folder ``--save``.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path

from tests.random_graphs.run import run, trials_of
from tests.random_graphs.trial import RECIPES

#: Trials after which a line is printed.
PROGRESS = 500


def main() -> None:
    """Command line, see the module's docstring."""
    parser = argparse.ArgumentParser(prog="tests.random_graphs", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="graphs, of consecutive seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--wasm-every", type=int, default=1, help="compile every n-th for wasm too")
    parser.add_argument("--save", type=Path, help="folder for minimised graphs that fail")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    print(f"seeds {seeds.start} … {seeds.stop - 1}", flush=True)
    started, verdicts, reasons = time.monotonic(), Counter[tuple[str, str, str]](), Counter[str]()
    examples: dict[str, str] = {}
    for (seed, recipe, target), status, detail in run(trials_of(seeds, arguments.wasm_every)):
        verdicts[recipe, target, status] += 1
        if sum(verdicts.values()) % PROGRESS == 0:
            print(f"{sum(verdicts.values())} trials, up to seed {seed}", flush=True)
        if status == "refused":
            reason = re.sub(r"'[^']*'|\d+", "…", detail)
            reasons[reason] += 1
            examples.setdefault(reason, f"seed {seed} {recipe} {target}")
        elif status != "right":
            print(f"{status:8} seed {seed} {recipe} {target}: {detail}", flush=True)
            if arguments.save is not None and status in ("wrong", "crashed"):
                from tests.random_graphs.minimise import save_minimised

                print(f"  {save_minimised(seed, recipe, target, arguments.save)}", flush=True)
    for (recipe, target, status), count in sorted(verdicts.items(), key=_order):
        print(f"{recipe:10} {target:10} {status:8} {count}")
    for reason, count in reasons.most_common():
        print(f"{count:6} refused: {reason} ({examples[reason]})")
    print(f"{sum(verdicts.values())} trials in {time.monotonic() - started:.0f} s")


def _order(item: tuple[tuple[str, str, str], int]) -> tuple[int, str, str]:
    (recipe, target, status), _ = item
    return RECIPES.index(recipe), target, status


if __name__ == "__main__":
    main()
