"""Schedules by MetaSchedule's own rules, for functions that no template executes.

The rules of the space are those that TVM has for CPUs (Shao et al., "Tensor Program Optimization
with Probabilistic Programs", NeurIPS 2022), without the one that makes threads: a bundle's threads
share outer loops. What was measured is kept in MetaSchedule's database, from which the evolutionary
search draws the next ones; a model of cost, which would need thousands of measurements, there is
none. A schedule is recorded as its trace.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.mutator import (
    MutateComputeLocation,
    MutateTileSize,
    MutateUnroll,
)

from edgepipe.context import Context
from edgepipe.lowering import traces
from edgepipe.lowering.schedule import is_done, schedule_function
from edgepipe.target import Target
from edgepipe.tuning import Ratios
from edgepipe.tuning.candidate import pair

#: Most steps of unrolled loops on offer, and elements of the innermost tile.
_UNROLL, _INNERMOST = [0, 16, 64, 256], 64


@dataclass(frozen=True)
class Function:
    """A ``Task``: a PrimFunc that the default schedule would be given."""

    label: str
    function: Any

    @property
    def name(self) -> str:
        return traces.NAME

    @property
    def version(self) -> int:
        return traces.VERSION

    @property
    def key(self) -> str:
        return traces.key(self.label, self.function)

    def size(self, target: Target) -> None:
        return None

    def draw(
        self, target: Target, trials: int, seed: int, batch: int
    ) -> Generator[Sequence[Any], Ratios, None]:
        search = Search(self.function, target.simd.lanes_f32, trials, seed)
        while drawn := search.draw():
            ratios: list[float | None] = []
            for start in range(0, len(drawn), batch):
                ratios += yield drawn[start : start + batch]
            search.tell(ratios)

    def pair(self, target: Target, setting: Any) -> Any:
        default = schedule_function(self.function, target.simd.lanes_f32)
        return pair(default, setting.mod["main"])

    def plain(self, target: Target, setting: Any | None) -> dict[str, Any]:
        return {} if setting is None else {"trace": traces.text(setting)}


def tasks(module: Any, context: Context) -> list[Function]:
    """Functions with a reduction that no template executes; equal ones are one. None of a GPU:
    rules for those need one to measure on."""
    if context.target.kind == "cuda":
        return []
    found: dict[str, Function] = {}
    for var, function in module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and not is_done(function):
            task = Function(var.name_hint, function)
            if traces.worth(function):
                found.setdefault(task.key, task)
    return list(found.values())


def _space(lanes: int) -> Any:
    rules, post = ms.schedule_rule, ms.postproc
    return ms.space_generator.PostOrderApply(
        sch_rules=[
            rules.InlineConstantScalars(),
            rules.AutoInline(
                into_producer=False,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=True,
                require_injective=True,
                require_ordered=True,
                disallow_op=["tirx.exp"],
            ),
            rules.AddRFactor(max_jobs_per_core=16, max_innermost_factor=_INNERMOST),
            rules.MultiLevelTiling(
                structure="SSRSRS",
                max_innermost_factor=_INNERMOST,
                reuse_write=rules.ReuseType(req="may", levels=[1, 2], scope="global"),
            ),
            rules.ParallelizeVectorizeUnroll(
                max_jobs_per_core=-1,
                max_vectorize_extent=4 * lanes,
                unroll_max_steps=_UNROLL,
                unroll_explicit=True,
            ),
            rules.RandomComputeLocation(),
        ],
        postprocs=[
            post.DisallowDynamicLoop(),
            post.RewriteParallelVectorizeUnroll(),
            post.RewriteReductionBlock(),
        ],
        mutator_probs={MutateTileSize(): 0.9, MutateComputeLocation(): 0.05, MutateUnroll(): 0.05},
    )


@contextlib.contextmanager
def _without_intrinsics() -> Iterator[None]:
    """TuneContext imports the tensor intrinsics of all devices, which TVM parses for a minute or
    more. The rules above use none."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


class Search:
    """Draws schedules of ``function`` for vectors of ``lanes``; the same ``seed`` and answers draw
    the same."""

    def __init__(self, function: Any, lanes: int, trials: int, seed: int) -> None:
        module = traces.module_of(function)
        # What MetaSchedule asks a target for is in the rules above.
        self._target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
        self._database = ms.database.MemoryDatabase()
        self._workload = self._database.commit_workload(module)
        with _without_intrinsics():
            self._context = ms.TuneContext(
                module,
                target=self._target,
                space_generator=_space(lanes),
                # Few at a time: each round learns from what was measured before.
                search_strategy=ms.search_strategy.EvolutionarySearch(
                    population_size=64, init_min_unmeasured=16, genetic_num_iters=2
                ),
                rand_state=seed % (2**31 - 1) + 1,
                num_threads=1,
            )
        spaces = self._context.generate_design_space()
        self._context.pre_tuning(
            max_trials=trials,
            num_trials_per_iter=max(1, min(trials, 8)),
            design_spaces=spaces,
            database=self._database,
            cost_model=ms.cost_model.RandomModel(seed=seed % 2**31),
        )
        self._drawn: Sequence[Any] = ()

    def draw(self) -> list[Any]:
        """The next schedules; none when there are no more."""
        self._drawn = self._context.generate_measure_candidates() or ()
        return [candidate.sch for candidate in self._drawn]

    def tell(self, seconds: Sequence[float | None]) -> None:
        """What the schedules that were drawn last take; None for one that failed."""
        results = []
        for candidate, value in zip(self._drawn, seconds, strict=True):
            error = None if value is not None else "failed"
            results.append(ms.runner.RunnerResult([value] if value is not None else None, error))
            if value is not None:
                record = ms.database.TuningRecord(
                    candidate.sch.trace, self._workload, [value], self._target, candidate.args_info
                )
                self._database.commit_tuning_record(record)
        self._context.notify_runner_results(list(self._drawn), results)
