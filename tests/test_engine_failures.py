"""Logs of failed starts, most of them of the real vLLM, each explained by one cause."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from pytest_llmserve.engines import Failure, get_engine
from pytest_llmserve.launch import container
from pytest_llmserve.launch.log import LogFollower, diagnose, last_lines, root_lines

# Provoked with vLLM 0.32's CPU build; stack frames are left out, paths shortened.
LOGS = Path(__file__).parent / "data" / "vllm_logs"
VLLM = get_engine("vllm")


@pytest.mark.parametrize(
    ("log", "cause", "line"),
    [
        ("wrong_flag", "does not know the argument --no-such-flag", "unrecognized arguments"),
        ("wrong_value", "argument --max-num-seqs: invalid int value: 'many'", "invalid int"),
        ("no_such_folder", "neither a directory here nor a name", "/models/nothere"),
        ("empty_folder", "neither a directory here nor a name", "Invalid repository ID"),
        ("not_in_cache", "not in the local cache, and the hub cannot be asked", "LocalEntryNot"),
        ("context_too_long", "max-model-len 100000 is longer than the model allows", "2048"),
        ("port_taken", "the port is taken by another program", "Errno 98"),
        ("memory_not_free", "less memory is free than", "(6.98/8.34 GiB) on startup"),
        ("no_kv_memory", "the weights leave no memory for the KV cache", "(-0.53/0.08 GiB)"),
        ("kv_larger_than_machine", "larger than the memory that is left", "(400.0 GiB)"),
        ("kv_too_small", "cannot hold one request of 2048 tokens", "at least one request"),
        ("worker_killed", "a worker process of vLLM was killed", "VllmWorker-0 died"),
        ("illegal_instruction", "an instruction that this CPU lacks", "Illegal instruction"),
    ],
)
def test_real_logs_of_vllm(log, cause, line):
    found = diagnose((LOGS / f"{log}.log").read_text(), VLLM.failures)
    assert cause in found.cause
    assert line in found.lines[0], "the line that proves it comes first"
    assert len(found.lines) <= 5
    assert not any(text.startswith("(EngineCore") for text in found.lines)


def test_every_real_log_is_tested():
    tested = test_real_logs_of_vllm.pytestmark[0].args[1]
    assert {row[0] for row in tested} == {path.stem for path in LOGS.glob("*.log")}


@pytest.mark.parametrize(
    ("engine", "line", "cause"),
    [
        # Lines that only a GPU provokes, from vLLM's source.
        (
            "vllm",
            "ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than "
            "desired GPU memory utilization (0.92, 72.8 GiB).",
            "less memory is free than",
        ),
        (
            "vllm",
            "ValueError: No available memory for the cache blocks. Try increasing "
            "`gpu_memory_utilization` when initializing the engine.",
            "leave no memory for the KV cache",
        ),
        ("vllm", "torch.OutOfMemoryError: CUDA out of memory.", "the GPU ran out of memory"),
        ("vllm", "/x/python: No module named vllm.entrypoints", "the interpreter has no vLLM"),
        ("tensorrt-llm", "Error: No such option: --max_batchsize", "the option --max_batchsize"),
        (
            "tensorrt-llm",
            "RuntimeError: Failed to bind socket to localhost:8000: [Errno 98]",
            "the port is taken",
        ),
        ("tensorrt-llm", "ValueError: No GPU devices found on the node", "finds no GPU"),
        ("llama.cpp", "error: invalid argument: --nope", "the argument --nope"),
        (
            "sglang",
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "leave no memory for the KV cache",
        ),
    ],
)
def test_lines_of_engines_that_did_not_run_here(engine, line, cause):
    found = diagnose(f"starting\n{line}\n", get_engine(engine).failures)
    assert cause in found.cause


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            "docker: permission denied while trying to connect to the Docker daemon socket at "
            "unix:///var/run/docker.sock",
            "may not use docker",
        ),
        ("docker: Cannot connect to the Docker daemon at unix:///x.", "the docker daemon does not"),
        ("docker: Error response from daemon: manifest unknown", "the image is not here"),
        (
            'docker: Error response from daemon: could not select device driver "" with '
            "capabilities: [[gpu]].",
            "cannot hand out GPUs",
        ),
        (
            "Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=all",
            "cannot hand out GPUs",
        ),
        ('exec: "vllm": executable file not found in $PATH: unknown.', "the engine's program"),
    ],
)
def test_lines_of_container_runtimes(line, cause):
    assert cause in diagnose(line, container.FAILURES).cause


def test_warnings_are_not_taken_for_errors():
    text = "WARNING 11-23 [a.py:1] can cause `OSError: [Errno 98] Address already in use`\nfine\n"
    assert diagnose(text, VLLM.failures) is None
    assert root_lines(text) == []
    assert last_lines(text)[-1] == "fine"


def test_causes_come_before_their_consequences():
    failures = (Failure("root", "the root", "m"), Failure("late", "the consequence", "m"))
    text = "late\nroot: ValueError: x\n"
    assert diagnose(text, failures).cause == "the root"


def test_lines_are_shown_once_without_their_prefixes():
    text = (
        "(EngineCore pid=1) ERROR 11-23 18:42:49 [core.py:1510] ValueError: too small\n"
        "(EngineCore pid=1)   File x\n"
        "ValueError: too small\n"
        "RuntimeError: Engine failed\n"
    )
    assert root_lines(text) == ["ValueError: too small", "RuntimeError: Engine failed"]


def test_follower_tells_each_stage_of_a_real_log_once(tmp_path):
    text = (LOGS / "worker_killed.log").read_text()
    log = tmp_path / "log"
    follower = LogFollower(log, VLLM.stages)
    assert follower.new_stages() == [], "there is no log yet"
    seen = []
    with log.open("a") as file:
        for start in range(0, len(text), 97):  # pieces that end in the middle of lines
            file.write(text[start : start + 97])
            file.flush()
            seen += follower.new_stages()
    wanted = ["starting the engine", "loading weights", "KV cache allocated", "engine ready"]
    assert [stage for stage in seen if stage in wanted] == wanted
    assert all(one != other for one, other in pairwise(seen))


def test_follower_reads_progress_bars(tmp_path):
    log = tmp_path / "log"
    log.write_text("Loading safetensors checkpoint shards:  25% Completed\rLoading safetensors ")
    follower = LogFollower(log, VLLM.stages)
    assert follower.new_stages() == ["loading weights, 25 %"]
    with log.open("a") as file:
        for part in (50, 75, 75):
            file.write(f"checkpoint shards:  {part}% Completed\rLoading safetensors ")
    assert follower.new_stages() == ["loading weights, 50 %", "loading weights, 75 %"]
