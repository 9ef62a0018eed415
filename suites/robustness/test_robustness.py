"""No request, however odd, brings the server down or costs the others their answers."""

import time
import warnings

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, post

pytestmark = [pytest.mark.robustness, pytest.mark.nightly]

#: Seconds that are spent on making a failing request smaller.
SHRINKING = 60.0


def check_health(load, slo, profile, before=None):
    """An ordinary load, valid and (nearly) as fast as before, that leaves the KV cache empty."""
    run = load(
        closed_loop(users=profile.users),
        duration=profile.duration / 5,
        prompt_tokens=profile.prompt_tokens,
        output_tokens=profile.output_tokens,
    )
    slo.check(run, at_most("server.kv_usage.last", profile.bound("kv_usage_at_rest")))
    if before is not None:
        slo.check(
            run,
            at_least("output_throughput", profile.bound("keeps") * before["output_throughput"]),
        )
    return run


def still_answers(server):
    try:
        body = {"model": server.model, "prompt": "Hello", "max_tokens": 1}
        return post(server, "/v1/completions", body, timeout=60).status == 200
    except OSError:
        return False


def test_any_request_is_answered_or_refused(llm_server, load, slo, llm_profile):
    """Hundreds of generated requests, right, odd and broken, some of whose clients leave: each is
    answered whole or refused with a reason, and afterwards the server is as good as new."""
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -e '.[suites]'")
    from known_faults import known
    from odd_requests import complaint, odd_requests

    before = check_health(load, slo, llm_profile)
    sent, failed = 0, []

    @hypothesis.given(odd_requests(llm_server.model))
    @hypothesis.settings(
        max_examples=int(llm_profile.bound("odd_requests")),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    def is_answered_or_refused(odd):
        nonlocal sent
        gone = failed and not failed[-1][3]
        if gone or (failed and time.monotonic() > failed[0][2] + SHRINKING):
            return  # nothing more is to be learnt
        sent += 1
        said = complaint(llm_server, odd, llm_profile.bound("answer_timeout"))
        link = said and known(llm_server.engine, odd, said)
        if link:
            warnings.warn(f"{llm_server.engine} {llm_server.version}: {link}", stacklevel=1)
        elif said:
            failed.append((odd, said, time.monotonic(), still_answers(llm_server)))
            raise AssertionError(said)

    try:
        is_answered_or_refused()
    except (AssertionError, hypothesis.errors.HypothesisException):
        if not failed:
            raise
    if failed:
        # The smallest; one that ended the server is the last.
        odd, said, _, alive = min(failed, key=lambda f: (f[3], len(f[0].body)))
        words = "" if alive else "; the server does not answer any more"
        pytest.fail(f"{said}{words}\n{odd.curl(llm_server.endpoint)}", pytrace=False)
    assert sent >= llm_profile.bound("odd_requests")
    assert still_answers(llm_server)
    check_health(load, slo, llm_profile, before)


def test_clients_that_leave_give_their_memory_back(load, slo, llm_profile):
    """All users close their connections in the middle of long answers: nothing runs on, and the
    KV cache is empty soon after."""
    before = check_health(load, slo, llm_profile)
    run = load(
        closed_loop(users=llm_profile.users),
        duration=llm_profile.duration / 5,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=2 * llm_profile.output_tokens,
        # Time for the first token of a request that was just sent, and not for the last.
        drain=2 * before["ttft.max"],
    )
    slo.check(run, at_most("server.kv_usage.last", llm_profile.bound("kv_usage_at_rest")))
    check_health(load, slo, llm_profile, before)


def test_overload_is_survived(load, slo, llm_profile):
    """Eight times as many users as it is meant for wait their turn, or are told to come again:
    the server does not fall over, and serves as before once they have gone."""
    before = check_health(load, slo, llm_profile)
    run = load(
        closed_loop(users=8 * llm_profile.users),
        duration=llm_profile.duration / 3,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=max(4, llm_profile.output_tokens // 8),
        allow_errors=1.0,
    )
    # Whom it refuses it must refuse in order, by a status: nobody is left without an answer.
    dropped = {kind: n for kind, n in run.metrics["errors"].items() if kind != "http_status"}
    if dropped:
        pytest.fail(f"requests were dropped instead of refused: {dropped}", pytrace=False)
    check_health(load, slo, llm_profile, before)
