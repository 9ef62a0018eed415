"""The capstone, for longer: does the server still do after ten minutes what it did in the first?"""

import statistics

import psutil
import pytest

from pytest_llmserve import at_least, at_most, closed_loop

pytestmark = [pytest.mark.soak, pytest.mark.nightly]

#: Loads in a row, with a moment's rest between them in which everything must be given back.
PARTS = 6


def memory(server):
    """Bytes of host memory that the server's processes hold; None for one we did not start."""
    if server.pid is None:
        return None
    parent = psutil.Process(server.pid)
    processes = [parent, *parent.children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


def middle(runs):
    """The run of median throughput."""
    ordered = sorted(runs, key=lambda run: run["output_throughput"])
    return ordered[len(ordered) // 2]


def test_nothing_drifts_and_nothing_leaks(llm_server, load, slo, llm_profile):
    """The same load again and again: its last third is as fast as its first, the KV cache is empty
    after each part, and the server holds no more memory than after the first third."""
    runs, held = [], []
    for _ in range(PARTS):
        runs.append(
            load(
                closed_loop(users=llm_profile.users),
                duration=llm_profile.bound("soak_duration") / PARTS,
                prompt_tokens=llm_profile.prompt_tokens,
                output_tokens=llm_profile.output_tokens,
            )
        )
        held.append(memory(llm_server))
    third = PARTS // 3
    early, late = middle(runs[:third]), middle(runs[-third:])
    drift = llm_profile.bound("soak_drift")
    slo.check(
        late,
        at_least("output_throughput", (1 - drift) * early["output_throughput"]),
        at_most("tpot.p50", (1 + drift) * early["tpot.p50"]),
    )
    slo.check(runs[-1], at_most("server.kv_usage.last", llm_profile.bound("kv_usage_at_rest")))
    if None not in held:
        before, after = statistics.median(held[:third]), statistics.median(held[-third:])
        if after - before > llm_profile.bound("soak_memory_growth"):
            pytest.fail(
                f"the server's processes held {before / 1e6:,.0f} MB in the soak's first third "
                f"and {after / 1e6:,.0f} MB in its last",
                pytrace=False,
            )
