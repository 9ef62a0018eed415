"""TensorRT-LLM by contract: our command lines against the options that its source declares.

It cannot be installed on the machines that test this; see docs for what ran for real.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pytest_llmserve.engines import FILES, get_engine
from pytest_llmserve.launch.container import container_command
from pytest_llmserve.server_files import load_server_config
from pytest_llmserve.servers import ContainerRunner, ServerConfig

HERE = Path(__file__).parent
DECLARED = json.loads((HERE / "data" / "trtllm_serve_options.json").read_text())["options"]
OLDER, NEWER = DECLARED
ENGINE = get_engine("trtllm")
SUITE = HERE.parent / "suites" / "servers" / "trtllm-qwen3-8b-nvfp4.yaml"


def config(**args):
    return ServerConfig(name="x", engine="tensorrt-llm", model="org/model", args=args)


def parse(words, commit):
    """What `trtllm-serve` of that commit would understand; ValueError if it would refuse."""
    known = {name: option for option in DECLARED[commit] for name in option["names"]}
    sub, model, *rest = words
    assert sub == "serve"
    assert not model.startswith("-")
    found, rest = {}, iter(rest)
    for word in rest:
        if word not in known:
            raise ValueError(f"No such option: {word}")
        option = known[word]
        value = True if option["type"] == "flag" else next(rest)
        match option["type"]:
            case "integer":
                value = int(value)
            case "number":
                value = float(value)
            case list() as choices if value not in choices:
                raise ValueError(f"Invalid value for {word}: {value}")
        found[option["names"][0].lstrip("-")] = value
    return model, found


@pytest.mark.parametrize("commit", DECLARED)
def test_config_of_the_suite_is_understood_by_both_generations(commit):
    config = load_server_config(SUITE)
    model, found = parse(ENGINE.command(config, 8355), commit)
    assert model == "nvidia/Qwen3-8B-NVFP4"
    assert (found["host"], found["port"]) == ("127.0.0.1", 8355)
    assert (found["backend"], found["max_batch_size"]) == ("pytorch", 64)
    (file,) = ENGINE.files(config)
    assert f"{FILES}/{file}" in found.values()


def test_both_names_of_the_file_option():
    section = {"kv_cache_config": {"dtype": "fp8"}}
    _, newer = parse(ENGINE.command(config(config=section), 1), NEWER)
    assert newer["config"] == f"{FILES}/llm_options.yaml"
    with pytest.raises(ValueError, match="No such option: --config"):
        parse(ENGINE.command(config(config=section), 1), OLDER)
    for commit in DECLARED:
        parse(ENGINE.command(config(extra_llm_api_options=section), 1), commit)
        parse(ENGINE.command(config(), 1), commit)  # the name that all know is the default


def test_file_has_the_sections_and_what_metrics_need():
    section = {
        "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.8},
        "speculative_config": {
            "decoding_type": "Eagle3",
            "max_draft_len": 3,
            "speculative_model": "org/draft",
        },
        "cuda_graph_config": {"batch_sizes": [1, 2, 4]},
    }
    (text,) = ENGINE.files(config(config=section)).values()
    assert yaml.safe_load(text) == {
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,
        **section,
    }
    (bare,) = ENGINE.files(config()).values()
    assert yaml.safe_load(bare)["return_perf_metrics"] is True
    (user,) = ENGINE.files(config(config={"return_perf_metrics": False})).values()
    assert yaml.safe_load(user)["return_perf_metrics"] is False, "the user's word counts"


def test_file_of_the_users_own_is_passed_on():
    made = config(extra_llm_api_options="/my/options.yaml")
    assert ENGINE.files(made) == {}
    _, found = parse(ENGINE.command(made, 1), OLDER)
    assert found["extra_llm_api_options"] == "/my/options.yaml"


def test_types_of_values():
    made = config(tp_size=2, kv_cache_free_gpu_memory_fraction=0.5, trust_remote_code=True)
    for commit in DECLARED:
        _, found = parse(ENGINE.command(made, 1), commit)
        assert found["trust_remote_code"] is True
        assert {2, 0.5} <= set(found.values())
    _, found = parse(ENGINE.command(config(enable_chunked_prefill=False), 1), OLDER)
    assert "enable_chunked_prefill" not in found, "its flags have no --no- form"


def test_container_is_run_as_the_playbook_does(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    config = load_server_config(SUITE)
    assert isinstance(config.runner, ContainerRunner)
    line = container_command(
        "/usr/bin/docker",
        config,
        ENGINE,
        8355,
        name="n",
        variables=["A"],
        files="/run/files",
        gpus=["0"],
    )
    at = line.index(config.runner.image)
    before, after = line[:at], line[at + 1 :]
    assert before[:7] == ["/usr/bin/docker", "run", "--rm", "--name", "n", "--network", "host"]
    pairs = list(pairwise(before))
    assert ("--gpus", '"device=0"') in pairs
    assert ("--env", "HF_TOKEN") in pairs
    assert ("--env", "A") in pairs
    assert ("--volume", "/run/files:/llmserve:ro") in pairs
    assert any(v.endswith(":/root/.cache/huggingface") for _, v in pairs)
    assert {"--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"} <= set(before)
    assert "secret" not in " ".join(line)
    assert after[0] == "trtllm-serve"
    _, found = parse(after[1:], OLDER)
    assert found["extra_llm_api_options"] == "/llmserve/llm_options.yaml"


def test_podman_hands_out_gpus_by_its_own_name():
    config = load_server_config(SUITE)
    line = container_command(
        "/usr/bin/podman", config, ENGINE, 1, name="n", variables=(), files=None, gpus=["0", "1"]
    )
    assert "--gpus" not in line
    assert [word for word in line if "gpu" in word] == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
