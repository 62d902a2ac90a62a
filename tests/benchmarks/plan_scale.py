"""Measure the plan of ten million records over 512 ranks: time until it is ready, time and balance of a step, memory.

python tests/benchmarks/plan_scale.py [--records 10000000] [--ranks 512] [--pairs 64]
"""

import argparse
import resource
import statistics
import time
from types import SimpleNamespace

import numpy as np

from dpoctl import console
from dpoctl.core.planner import Lengths, Plan

STEPS = 20


def columns(count: int) -> SimpleNamespace:
    """What a token store knows of pairs of log-normal lengths, as hh-harmless has them."""
    rng = np.random.default_rng(0)

    def lengths(mean: float, size: int) -> np.ndarray:
        return np.clip(rng.lognormal(mean, 0.8, size), 2, 2048).astype(np.int64)

    store = SimpleNamespace(
        shared_len=lengths(4.5, count),
        suffix_len=lengths(3.5, 2 * count),
        response_start=np.arange(0, 2 * count + 1, 2),
        pair_start=np.arange(count + 1),
        target=np.full(count, -1),
    )
    store.num_tokens = store.suffix_len
    return type("Store", (SimpleNamespace,), {"__len__": lambda self: count})(**vars(store))


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=64, help="pairs a rank and step")
    arguments = parser.parse_args()
    store = columns(arguments.records)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    lengths = Lengths.of(store)
    plan = Plan(lengths, arguments.ranks * arguments.pairs, arguments.ranks, seed=0)
    order = plan._order(0)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    held = [lengths.tokens, lengths.longest, lengths.cost, order, *lengths.items.values()]
    kept = sum(array.nbytes if array.strides != (0,) else 0 for array in held)

    times, cpu_times, spread = [], [], []
    for number in range(min(STEPS, plan.num_steps)):
        began, step_cpu = time.perf_counter(), time.process_time()
        step = plan.step(number)
        times.append(time.perf_counter() - began)
        cpu_times.append(time.process_time() - step_cpu)
        loads = [sum(int(lengths.tokens[list(micro)].sum()) for micro in rank) for rank in step.schedule]
        spread.append(max(loads) / min(loads) - 1)
    console.emit(f"records {arguments.records:,}, ranks {arguments.ranks}, pairs a rank {arguments.pairs}")
    console.emit(f"ready in {seconds:.2f} s ({cpu:.2f} CPU s)")
    console.emit(f"kept {kept / arguments.records:.1f} bytes a record, {peak / arguments.records:.0f} at the peak")
    console.emit(
        f"a step {statistics.median(times) * 1e3:.1f} ms, fastest {min(times) * 1e3:.1f} ms "
        f"({statistics.median(cpu_times) * 1e3:.1f} CPU ms)"
    )
    console.emit(f"tokens of the fullest rank over the emptiest: {max(spread):.2%} more at worst")


if __name__ == "__main__":
    main()
