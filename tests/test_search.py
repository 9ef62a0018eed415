"""The search for the users a server holds: right under noise, within its budget, never beyond what
was measured."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llmserve.search import Trial, bracket, holds, next_users, run_search

NEAR = 0.05


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def server(truth: float, noise, clock: Clock, seconds: float = 1.0):
    """Measures a server that holds `truth` users: the margin falls with users, and `noise()` is
    added to each measurement."""

    def measure(users: int) -> float:
        clock.now += seconds
        return (truth - users) / truth + noise()

    return measure


truths = st.floats(0.3, 2000)
limits = st.integers(1, 1500)
precisions = st.sampled_from([0.0, 0.05, 0.2])


@given(truths, limits, limits, precisions, st.data())
@settings(max_examples=300)
def test_the_answer_is_right_within_the_noise(truth, upto, start, precision, data):
    """Noise that is smaller than what counts as near cannot decide a clear point, and at a near one
    errs by no more than itself."""
    size = data.draw(st.floats(0, NEAR))
    clock = Clock()
    measure = server(truth, lambda: data.draw(st.floats(-size, size)), clock)
    trials, settled = run_search(
        measure,
        start=start,
        upto=upto,
        precision=precision,
        near=NEAR,
        budget=float("inf"),
        clock=clock,
    )
    low, high = bracket(trials, NEAR)
    assert settled
    assert low == 0 or (truth - low) / truth >= -size - 1e-9
    assert high is None or (truth - high) / truth <= size + 1e-9
    measured = {trial.users for trial in trials}
    assert low in measured | {0}
    assert max(measured) <= upto
    assert min(measured) >= 1
    if high is None:
        assert low == upto
    else:
        assert high in measured
        assert high - low <= max(1, precision * low)


@given(truths, limits, limits, st.floats(0, 30), st.floats(0.1, 5), st.data())
def test_the_budget_is_kept_and_its_end_is_told(truth, upto, start, budget, seconds, data):
    clock = Clock()
    noise = st.floats(-0.5, 0.5)
    trials, settled = run_search(
        server(truth, lambda: data.draw(noise), clock, seconds),
        start=start,
        upto=upto,
        precision=0.0,
        near=NEAR,
        budget=budget,
        clock=clock,
    )
    assert trials
    assert clock.now <= max(budget, seconds) + 1e-6
    nothing_left = next_users(trials, start=start, upto=upto, precision=0.0, near=NEAR) is None
    assert settled == nothing_left
    low, high = bracket(trials, NEAR)
    assert high is None or low < high
    held = {trial.users for trial in trials if trial.margin >= 0}
    assert low in held | {0}


@given(truths, st.integers(2, 1000))
def test_without_noise_few_points_are_enough(truth, upto):
    """Doubling and halving: twice the logarithm, and the repeats of what is near."""
    trials, _ = run_search(
        server(truth, lambda: 0.0, Clock()),
        start=1,
        upto=upto,
        precision=0.0,
        near=0.0,
        budget=float("inf"),
    )
    assert len({trial.users for trial in trials}) <= 2 * upto.bit_length() + 1


@pytest.mark.parametrize(
    ("margins", "outcome"),
    [
        ([], None),
        ([0.2], True),
        ([-0.2], False),
        ([float("-inf")], False),
        ([0.01], None),
        ([0.01, 0.02], True),
        ([0.01, -0.02], None),
        ([0.01, -0.02, -0.01], False),
        ([-0.01, 0.3], None),
        ([-0.01, 0.3, 0.01], True),
        ([0.0, 0.0], True),
    ],
)
def test_what_is_near_its_bound_is_measured_again(margins, outcome):
    assert holds(margins, NEAR) is outcome


def test_an_open_point_comes_again_before_another_does():
    trials = [Trial(8, 0.5), Trial(16, 0.01)]
    assert next_users(trials, start=8, upto=64, precision=0.05, near=NEAR) == 16
    assert bracket(trials, NEAR) == (8, None)


TEST = """
    import pytest
    from pytest_llmserve import at_least, at_most, most_users

    KWARGS = dict(duration=1, prompt_tokens=64, output_tokens=8, precision=0.2)

    @pytest.mark.llmserve(
        engine="emulator", model="Qwen3-8B", args={"max-num-seqs": 8},
        emulation={"hardware": "h100", "weights": "bf16", "kv": "bf16"},
    )
    class TestFound:
        def test_seats(self, load):
            # Eight seats: who comes ninth waits for an answer of eight tokens.
            found = most_users(load, at_most("ttft.mean", 0.03), upto=64, **KWARGS)
            assert found.settled and not found.bounded
            assert 6 <= found.users <= 13 < found.beyond * 2
            assert found.run.plan.arrivals.users == found.users
            assert str(found).startswith(f"{found.users} users held ttft.mean <= 0.03, ")
            assert f", {found.beyond} did not" in str(found)
            found.check(at_least=4)
            with pytest.raises(pytest.fail.Exception, match="users held .* did not"):
                found.check(at_least=40)

        def test_bounded(self, load):
            found = most_users(load, at_most("ttft.mean", 5), upto=4, **KWARGS)
            assert (found.users, found.beyond, found.bounded) == (4, None, True)
            assert found.check(at_least=4).verdict == "pass"

        def test_unsettled(self, load):
            found = most_users(load, at_most("ttft.mean", 5), upto=64, budget=0, **KWARGS)
            assert (found.users, found.settled) == (1, False)
            assert found.check(at_least=4).verdict == "inconclusive"

        def test_uncertified(self, load):
            found = most_users(load, at_most("ttft.p99", 5), upto=1, **KWARGS)
            verdict = found.check(at_least=1)
            assert verdict.verdict == "inconclusive"
            assert "lengthen the load's duration" in verdict.reason

        def test_nobody(self, load):
            found = most_users(load, at_most("ttft.mean", 2e-3), upto=4, start=4, **KWARGS)
            assert (found.users, found.beyond) == (0, 1)

        def test_mistakes(self, load):
            for wrong in ({"upto": 0}, {"upto": 4, "start": 1.5}, {"upto": 4, "near": -1}):
                with pytest.raises(pytest.fail.Exception, match="most_users"):
                    most_users(load, at_most("ttft.mean", 1), **{**KWARGS, **wrong})
            with pytest.raises(pytest.fail.Exception, match="add one"):
                most_users(load, upto=4)
            with pytest.raises(pytest.fail.Exception, match="no bound 'itl'"):
                most_users(load, at_most("ttft.mean", 1), upto=1, goodput={"itl": 1}, **KWARGS)
"""


def test_most_users_on_a_server(pytester):
    pytester.makepyfile(TEST)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*4 passed, 2 inconclusive*"])
