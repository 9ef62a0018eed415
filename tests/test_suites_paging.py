"""Lessons 4 to 6 pass on the emulated engine and fail when it has the fault that each is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SERVER = yaml.safe_load((ROOT / "suites/servers/emulated-h100.yaml").read_text())


def run_lesson(
    folder: Path,
    lesson: str,
    only: str = "",
    *,
    options: Mapping[str, Any] | None = None,
    variants: Mapping[str, Any] | None = None,
) -> tuple[dict[str, int], str]:
    """How many tests of a lesson ended in which way, and all that was written.

    `options` are further options of the emulated server, `variants` replace the profile's.
    """
    server = {**SERVER, "emulation": {**SERVER["emulation"], "options": dict(options or {})}}
    (folder / "server.yaml").write_text(yaml.safe_dump(server))
    profile = {
        "extends": "emulated",
        "server": str(folder / "server.yaml"),
        "duration": 5,
        "variants": dict(variants or {}),
    }
    (folder / "faulty.yaml").write_text(yaml.safe_dump(profile))
    ended = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"suites/{lesson}",
            "-m", lesson, "-k", only, "--llmserve-profile", str(folder / "faulty.yaml"),
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("GITHUB_STEP_SUMMARY",)},
        capture_output=True,
        text=True,
        timeout=1200,  # loads of other runs on this machine come first
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    last = (ended.stdout.strip().splitlines() or [""])[-1]
    counts = {name.rstrip("s"): int(n) for n, name in re.findall(r"(\d+) ([a-z]+)", last)}
    return {k: v for k, v in counts.items() if k in ("passed", "failed", "error", "skipped")}, said


@pytest.mark.parametrize(
    ("lesson", "expected"),
    [
        ("paged_attention", {"passed": 6}),
        ("speculative_decoding", {"passed": 4, "skipped": 6}),
        ("tensorrt_llm", {"passed": 3}),
    ],
)
def test_the_lesson_passes_on_the_emulated_engine(tmp_path, lesson, expected):
    counts, said = run_lesson(tmp_path, lesson)
    assert counts == expected, said


def fault(text: str) -> dict[str, Any]:
    return {"fault": [text]}


SPECULATIVE = {
    "speculative-config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
}


def synthetic(length: float) -> dict[str, Any]:
    config = SPECULATIVE["speculative-config"]
    return {"speculative-config": {**config, "synthetic_acceptance_length": length}}


@pytest.mark.parametrize(
    ("lesson", "only", "options", "variants", "outcome", "words"),
    [
        pytest.param(
            "paged_attention", "follows_the_tokens", fault("kv-leak"), {},
            "failed", "server.kv_usage.last <= ", id="pages that never come back",
        ),
        pytest.param(
            "paged_attention", "conversation", fault("no-prefix-reuse"), {},
            "failed", "server.prefix_hit_rate >= ", id="a conversation read anew",
        ),
        pytest.param(
            "paged_attention", "capacity", {"num-gpu-blocks-override": 5000}, {},
            "failed", "80,000 tokens of KV cache fit", id="memory that is not used",
        ),
        pytest.param(
            "paged_attention", "waits_and_comes_whole", fault("truncate=probability:0.05"), {},
            "error", "truncated", id="dropped streams",
        ),
        pytest.param(
            "paged_attention", "when_memory_is_short", fault("wrong-text=probability:0.5"), {},
            "failed", "agreement", id="other answers under pressure",
        ),
        pytest.param(
            "speculative_decoding", "answers",
            {}, {"speculative": {"args": SPECULATIVE, "options": fault("wrong-text")}},
            "failed", "agreement", id="other answers by speculation",
        ),
        pytest.param(
            "speculative_decoding", "one_user",
            {}, {"speculative": {"args": SPECULATIVE, "options": {"acceptance": 0}}},
            "failed", "server.accepted_length >= ", id="every guess is wrong",
        ),
        pytest.param(
            "speculative_decoding", "one_user",
            {}, {"speculative": {
                "args": SPECULATIVE, "options": {"acceptance": 0.5, "draft-cost": 0.5}}},
            "failed", "B/A output_throughput >= ", id="guessing costs more than it saves",
        ),
        pytest.param(
            "speculative_decoding", "many_users",
            {}, {"speculative": {
                "args": SPECULATIVE, "options": fault("throttle=after:0,factor:4")}},
            "failed", "B/A output_throughput >= ", id="speculation loses with many users",
        ),
        pytest.param(
            "speculative_decoding", "set_rate",
            {}, {"synthetic": {"args": synthetic(2.5), "options": synthetic(1.5)}},
            "failed", "server.accepted_length >= ", id="another rate than it was told",
        ),
        pytest.param(
            "tensorrt_llm", "chat and all",
            {}, {"tensorrt_llm": {"options": {
                "dialect": "tensorrt-llm", **fault("throttle=after:0")}}},
            "failed", "B/A tpot.mean <= ", id="TensorRT-LLM at half the speed",
        ),
    ],
)  # fmt: skip
def test_the_lesson_fails_on(tmp_path, lesson, only, options, variants, outcome, words):
    counts, said = run_lesson(tmp_path, lesson, only, options=options, variants=variants)
    assert counts.get(outcome) == 1, said
    assert "passed" not in counts, said
    assert words in said, said
