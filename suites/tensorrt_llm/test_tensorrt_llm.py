"""Lesson 6: TensorRT-LLM against vLLM on the same work, in turns: is it worth it, and for whom?"""

import pytest

from pytest_llmserve import at_least, at_most, closed_loop, factories

pytestmark = pytest.mark.tensorrt_llm

trtllm_server = factories.llm_server(variant="tensorrt_llm")
load_trtllm = factories.load("trtllm_server")


@pytest.fixture
def both(load, load_trtllm):
    """The loads of the profile's server and of TensorRT-LLM; skips if only one of them is real."""
    if load.server.emulated != load_trtllm.server.emulated:
        kinds = [
            f"{each.server.config.name} is {'emulated' if each.server.emulated else 'real'}"
            for each in (load, load_trtllm)
        ]
        pytest.skip(f"{' and '.join(kinds)}: that would compare a machine with arithmetic")
    return load, load_trtllm


def judge(ab, pairs, profile):
    """The verdict on throughput, and on the parts of an answer in which a difference arises."""
    latency = profile.bound("trtllm_latency")
    ab.check(
        pairs,
        at_least("output_throughput", profile.bound("trtllm_throughput")),
        at_most("ttft.mean", latency),  # waiting and reading the prompt
        at_most("tpot.mean", latency),  # writing
        at_most("e2e.mean", latency),
    )


@pytest.mark.parametrize("crowd", ["one", "all"])
def test_chat(both, ab, llm_profile, crowd):
    """Questions of the profile's length and answers half as long as its own, so that several fit
    into each load; for one user and for all of them."""
    pairs = ab(
        *both,
        closed_loop(users=1 if crowd == "one" else llm_profile.users),
        pairs=3,
        duration=llm_profile.duration / 10,
        prompt_tokens=llm_profile.prompt_tokens,
        output_tokens=max(4, llm_profile.output_tokens // 2),
    )
    judge(ab, pairs, llm_profile)


def test_long_prompts(both, ab, llm_profile):
    """Much to read and little to write: here prefill decides."""
    pairs = ab(
        *both,
        closed_loop(users=min(4, llm_profile.users)),
        pairs=3,
        duration=llm_profile.duration / 10,
        prompt_tokens=llm_profile.prompt_tokens * 12,
        output_tokens=max(4, llm_profile.output_tokens // 8),
    )
    judge(ab, pairs, llm_profile)
