"""Judges the trials named on standard input, a batch per line; one JSON answer per line.

``status`` "started" precedes whatever may take the process down.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings

from tests.random_graphs.generate import Case, random_graph
from tests.random_graphs.trial import Trials

#: Seconds of this process that one step of one graph may take, and by the clock, which say more of
#: what else the machine does.
TIMEOUT_S, CLOCK_S = 120, 1200


def say(seed: int, recipe: str, target: str, status: str, detail: str = "") -> None:
    print(json.dumps([seed, recipe, target, status, detail]), flush=True)
    # Either ends the process; the parent records what was started as crashed.
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)
    signal.alarm(CLOCK_S)


def judge(wanted: list[tuple[int, str, str]]) -> None:
    """Compile, link and run a batch of (seed, recipe, target), and print the results."""
    trials, begun, cases = Trials(), [], dict[int, Case]()
    for key in wanted:
        say(*key, "started")
        seed, recipe, target = key
        if seed not in cases:
            cases[seed] = random_graph(seed)[0]
        begun.append(trials.compile(cases[seed], recipe, target))
    trials.link()
    for key, trial in zip(wanted, begun, strict=True):
        say(*key, "started")
        if os.environ.get("EDGEPIPE_RANDOM_GRAPHS_CRASH") == trial.name:
            os.abort()  # the runner's own test
        verdict = trials.judge(trial)
        say(*key, verdict.status, verdict.detail)


def main() -> None:
    """Judge every batch of standard input."""
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        judge([(seed, recipe, target) for seed, recipe, target in json.loads(line)])


if __name__ == "__main__":
    main()
