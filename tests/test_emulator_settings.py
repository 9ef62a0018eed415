"""Options of the emulator: what a server config becomes, and what bad ones are answered with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_llmserve.emulator.settings import acceptance_for, parse
from pytest_llmserve.engines.emulator import API_KEY, ENGINE
from pytest_llmserve.errors import ConfigError
from pytest_llmserve.servers import Emulation, ServerConfig


def test_the_default_is_qwen3_8b_on_a_spark() -> None:
    settings = parse([])
    info = settings.as_dict()
    assert info["emulated"] is True
    assert (info["model"], info["hardware"]) == ("qwen3-8b", "dgx-spark")
    assert (info["weights"], info["kv_cache_dtype"]) == ("nvfp4", "fp8")
    assert info["bandwidth_efficiency"] == 0.70
    # What is left of 85 % of 128 GB, in blocks of 16 tokens of 72 KiB.
    assert settings.blocks == int((108.8e9 - 5.152e9 - 1.245e9) / 73_728 / 16)
    assert settings.max_model_len == 40_960


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the launcher hands over beside the command."""
    monkeypatch.setenv(API_KEY, "a key")
    return "a key"


def test_a_server_config_becomes_a_command_line_that_is_understood(key: str) -> None:
    config = ServerConfig(
        name="x",
        engine="emulator",
        model="nvidia/Qwen3-8B-NVFP4",
        args={
            "max-num-seqs": 30,
            "max_num_batched_tokens": 4096,
            "--max-model-len": 4096,
            "enable_prefix_caching": False,
            "tensor-parallel-size": 2,
            "quantization": "modelopt_fp4",
            "speculative-config": {"method": "eagle3", "num_speculative_tokens": 3},
            "block-size": 32,
        },
        emulation=Emulation(
            hardware="h100",
            weights="fp8",
            kv="bf16",
            options={"block_size": 64, "noise": 0.1, "fault": ["stall=token:3", "fragment"]},
        ),
    )
    settings = parse(ENGINE.command(config, 8123))
    assert (settings.port, settings.served) == (8123, ("nvidia/Qwen3-8B-NVFP4",))
    assert settings.api_key == key
    assert (settings.policy.max_num_seqs, settings.policy.max_num_batched_tokens) == (30, 4096)
    assert (settings.max_model_len, settings.block_size) == (4096, 64)
    assert not settings.prefix_caching
    assert settings.policy.draft_tokens == 3
    assert settings.machine.hardware.name == "h100"
    assert settings.noise == 0.1
    assert [fault.name for fault in settings.faults] == ["stall", "fragment"]


@pytest.mark.usefixtures("key")
def test_names_of_other_engines_mean_the_same() -> None:
    config = ServerConfig(
        name="x", engine="emulator", model="m",
        args={"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 2048,
              "speculative_config": {"decoding_type": "NGram"}},
    )  # fmt: skip
    settings = parse(ENGINE.command(config, 1))
    assert settings.policy.max_num_seqs == 16
    assert settings.policy.max_num_batched_tokens == 512
    assert settings.max_model_len == 2048
    assert settings.served == ("m",)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max-num-seqs 0", "--max-num-seqs 0: it must be a whole number from 1 up"),
        ("--tpot -1", "--tpot -1.0: it must be not negative"),
        ("--schedule exact --tpot 0", "positive with --schedule exact"),
        ("--acceptance 1.5", "from 0 to 1"),
        ("--bandwidth-efficiency 1.2", "above 0 and at most 1"),
        ("--port 70000", "from 0 to 65535"),
        ("--hardware spark", "hardware 'spark' is not known"),
        ("--model gpt", "model 'gpt' is not known"),
        ("--model qwen3-32b --weights bf16 --hardware l4", "No available memory for the cache"),
        ("--num-gpu-blocks-override 4 --max-model-len 65", r"max seq len \(65\)"),
        ("--speculative-config {}", "must be a JSON object with num_speculative_tokens"),
        ("--speculative-config []", "must be a JSON object with num_speculative_tokens"),
        ("--api-key-env LLMSERVE_NO_SUCH", "the environment has no such variable"),
        ("--fault boom", "'boom' is not known; use one of slow-start"),
        ("--fault stall=minutes:3", "stall has no key 'minutes'; its keys are: probability"),
        ("--fault stall=seconds:long", "seconds must be a number, not 'long'"),
        ("--fault reset=probability:2", "probability must be from 0 to 1"),
    ],
)
def test_a_wrong_option_is_one_sentence(flags: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse(flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("--no-such-option", 2, "unrecognized arguments: --no-such-option"),
        ("--weights fp3", 2, "argument --weights: invalid choice: 'fp3'"),
        ("--model gpt", 2, "error: model 'gpt' is not known"),
        (
            "--host 203.0.113.1 --port 0",
            1,
            "error: cannot listen on 203.0.113.1 port 0: [Errno 99]",
        ),
        ("--truth-log /no/such/folder/x", 1, "error: /no/such/folder/x: No such file"),
    ],
)
def test_the_process_ends_with_the_sentence_and_no_traceback(
    flags: str, status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_llmserve.emulator", *flags.split()],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_synthetic_acceptance_length_is_met() -> None:
    for drafts, length in ((3, 2.5), (5, 1.0), (2, 3.0), (4, 4.2)):
        p = acceptance_for(length, drafts)
        assert sum(p**i for i in range(drafts + 1)) == pytest.approx(length, abs=1e-6)
    flags = ["--speculative-config",
             '{"num_speculative_tokens": 3, "synthetic_acceptance_length": 2.5}']  # fmt: skip
    assert parse(flags).policy.acceptance == pytest.approx(acceptance_for(2.5, 3))
