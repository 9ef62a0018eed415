"""Server configs as files: what they become, and one clear sentence for each mistake."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.server_files import find_server_config, load_server_config
from pytest_llmserve.servers import ContainerRunner, Emulation, ProcessRunner, ServerConfig
from pytest_llmserve.yaml_files import names

SUITES = Path(__file__).parents[1] / "suites" / "servers"
FULL = """
description: all of it
engine: vLLM
model: org/model
served_model_name: short
args: {max-num-seqs: 64, enable-prefix-caching: false, speculative-config: {method: ngram}}
env: {A: text, B: 1, C: 2.5}
runner:
  container:
    image: some/image:1
    runtime: podman
    mounts: ["~/models:/models:ro", "cache:/cache"]
    env: [HF_TOKEN]
    options: [--ipc=host]
host: 0.0.0.0
port: 8123
gpus: 2
hardware: dgx-spark
ready_timeout: 60
stop_timeout: 5.5
api_key_env: MY_KEY
emulation: {hardware: dgx-spark, model: qwen3-8b, weights: fp8, kv: bf16, options: {seed: 1}}
"""


def write(folder, text, name="some.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def told(folder, text):
    path = write(folder, text)
    with pytest.raises(ConfigError) as error:
        load_server_config(path)
    message = str(error.value)
    assert message.startswith(str(path)), "the file is named first"
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_every_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, FULL)
    assert load_server_config(path) == ServerConfig(
        name="some",
        engine="vllm",
        model="org/model",
        served_model_name="short",
        args={
            "max-num-seqs": 64,
            "enable-prefix-caching": False,
            "speculative-config": {"method": "ngram"},
        },
        env={"A": "text", "B": "1", "C": "2.5"},
        runner=ContainerRunner(
            image="some/image:1",
            runtime="podman",
            mounts=("/home/me/models:/models:ro", f"{tmp_path}/cache:/cache"),
            env=("HF_TOKEN",),
            options=("--ipc=host",),
        ),
        host="0.0.0.0",
        port=8123,
        gpus=2,
        hardware="dgx-spark",
        ready_timeout=60,
        stop_timeout=5.5,
        api_key_env="MY_KEY",
        emulation=Emulation("dgx-spark", "qwen3-8b", "fp8", "bf16", {"seed": 1}),
        source=str(path),
    )


def test_defaults(tmp_path):
    path = write(tmp_path, "engine: emulator\n")
    assert load_server_config(path) == ServerConfig(
        name="some", engine="emulator", source=str(path)
    )


def test_places_are_seen_from_the_file_and_links_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = "engine: vllm\nrunner: {process: {interpreter: link/bin/python}}"
    config = load_server_config(write(tmp_path, text))
    assert config.runner == ProcessRunner(interpreter=f"{tmp_path}/link/bin/python")
    text = "engine: vllm\nrunner: {process: {executable: vllm}}"
    assert load_server_config(write(tmp_path, text)).runner == ProcessRunner(executable="vllm")


def test_key_tells_servers_apart_and_nothing_else(tmp_path):
    one = load_server_config(write(tmp_path, FULL, "one.yaml"))
    other_name = load_server_config(write(tmp_path, FULL, "two.yaml"))
    patient = FULL.replace("ready_timeout: 60", "ready_timeout: 90")
    other_args = FULL.replace("64", "65")
    assert one.key == other_name.key
    assert one.key == load_server_config(write(tmp_path, patient)).key
    assert one.key != load_server_config(write(tmp_path, other_args)).key
    assert len(one.key) == 16


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model", "engine: vllm\nmodel: ${SOME_VALUE}/x\n"),
        ("endpoint", "engine: attach\nendpoint: http://${SOME_VALUE}:1\n"),
        (
            "runner.process.interpreter",
            "engine: vllm\nrunner: {process: {interpreter: '${SOME_VALUE}/python'}}\n",
        ),
        (
            "runner.process.executable",
            "engine: vllm\nrunner: {process: {executable: '${SOME_VALUE}'}}\n",
        ),
        (
            "runner.container.mounts.0",
            "engine: vllm\nrunner: {container: {image: i, mounts: ['${SOME_VALUE}:/x']}}\n",
        ),
    ],
)
def test_variables_of_the_environment(tmp_path, monkeypatch, key, text):
    monkeypatch.delenv("SOME_VALUE", raising=False)
    message = told(tmp_path, text)
    assert f"{key}: the environment variable SOME_VALUE is not set; set it" in message
    monkeypatch.setenv("SOME_VALUE", "value")
    assert "value" in repr(load_server_config(write(tmp_path, text)))


def test_variables_are_filled_in_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_VALUE", "secret")
    config = load_server_config(
        write(tmp_path, "engine: vllm\nargs: {x: '${SOME_VALUE}'}\nenv: {Y: '${SOME_VALUE}'}\n")
    )
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("engine: vllm\nargs: [1, 2\n", ", line 3, column 1: not valid YAML: "),
        ("engine: vllm\n\tport: 1\n", ", line 2, column 1: not valid YAML"),
        ("engine: vllm\nport: 1\nport: 2\n", ", line 3, column 1: not valid YAML: the key 'port'"),
        ("engine: !!python/object:os.system x\n", "not valid YAML"),
        ("", "must be a mapping of keys such as `engine: vllm`, but is empty"),
        ("- engine\n", "but is list"),
        ("model: x\n", "the key 'engine' is missing; add it"),
        ("engine: vlm\n", "engine: There is no engine 'vlm'; did you mean 'vllm'?"),
        ("engine: vllm\nmodle: x\n", "there is no key 'modle'; did you mean 'model'?"),
        ("engine: vllm\nport: '80'\n", 'port: "80" must be a whole number'),
        ("engine: vllm\nport: 99999\n", "port: 99999 is greater than the maximum of 65535"),
        ("engine: vllm\nenv: {A: true}\n", "env.A: true must be text or a number; put it in quot"),
        ("engine: vllm\nmodel: 8\n", "model: 8 must be text; put it in quotes"),
        ("engine: vllm\nargs: 5\n", "args: 5 must be a mapping"),
        ("engine: vllm\nready_timeout: 0\n", "ready_timeout: 0 is less than or equal to"),
        ("engine: vllm\nrunner: {}\n", "runner: must have exactly one of the keys process"),
        (
            "engine: vllm\nrunner: {process: {}, container: {image: i}}\n",
            "runner: must have exactly one of the keys process, container",
        ),
        (
            "engine: vllm\nrunner: {process: {executable: a, interpreter: b}}\n",
            "runner.process: executable and interpreter exclude each other",
        ),
        ("engine: vllm\nrunner: {container: {}}\n", "runner.container: the key 'image' is missing"),
        (
            "engine: vllm\nrunner: {container: {image: i, mounts: [x]}}\n",
            'runner.container.mounts.0: "x" must be HOST:INSIDE',
        ),
        ("engine: vllm\nemulation: {kv: fp4}\n", 'emulation.kv: "fp4" must be one of bf16, fp8'),
        ("engine: attach\n", "the key 'endpoint' is missing"),
        ("engine: attach\nendpoint: localhost\n", "endpoint: 'localhost' must be a URL such as"),
        ("engine: vllm\napi_key_env: sk-1 2\n", "must be the name of an environment variable"),
        ("engine: vllm\nmodel: ${a b}\n", "model: ${a b} is not the name of a variable"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, text, part):
    assert part in told(tmp_path, text)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_config_or_one_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(f"engine: vllm\n{text}", encoding="utf-8")
    told = f"{path}: "
    try:
        load_server_config(path)
    except ConfigError as error:
        told = str(error)
    assert told.startswith(str(path))


def test_file_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match="there is no such server config file; check the path"):
        load_server_config(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml: cannot be read as UTF-8 text"):
        load_server_config(tmp_path / "binary.yaml")


def test_names_are_found_in_order_of_the_folders(tmp_path):
    for folder, model in (("first", "a"), ("second", "b")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, f"engine: vllm\nmodel: {model}\n", "both.yaml")
    write(tmp_path / "second", "engine: emulator\n", "only.yml")
    folders = [tmp_path / "missing", tmp_path / "first", tmp_path / "second"]
    assert sorted(names(folders)) == ["both", "only"]
    assert find_server_config("both", folders).model == "a"
    assert find_server_config("only", folders).engine == "emulator"
    assert find_server_config(str(tmp_path / "second/both.yaml"), []).model == "b"


def test_unknown_name_is_answered_with_those_there_are(tmp_path):
    write(tmp_path, "engine: emulator\n", "quick-one.yaml")
    write(tmp_path, "engine: emulator\n", "other.yaml")
    with pytest.raises(ConfigError) as error:
        find_server_config("quick-on", [tmp_path])
    assert str(error.value) == (
        "There is no server config 'quick-on'; did you mean 'quick-one'? "
        f"Known in {tmp_path}: other, quick-one."
    )
    with pytest.raises(ConfigError, match=r"There is no server config 'x'\. Known in .*: none\."):
        find_server_config("x", [tmp_path / "missing"])


def test_configs_of_the_suites(monkeypatch):
    monkeypatch.setenv("LLMSERVE_ENDPOINT", "http://127.0.0.1:8000/v1/")
    monkeypatch.setenv("LLMSERVE_TINY_MODEL", "/models/tiny")
    monkeypatch.setenv("LLMSERVE_MODEL_DIR", "/models/qwen3-8b")
    monkeypatch.setenv("LLMSERVE_VLLM_PYTHON", "/env/bin/python")
    configs = {name: find_server_config(name, [SUITES]) for name in names([SUITES])}
    assert {
        "emulated-spark",
        "qwen3-8b-nvfp4",
        "qwen3-8b-nvfp4-process",
        "vllm-tiny-cpu",
        "trtllm-qwen3-8b-nvfp4",
        "attach",
    } <= set(configs)
    assert configs["attach"].endpoint == "http://127.0.0.1:8000"
    assert configs["attach"].gpus == 0
    for name in ("emulated-spark", "qwen3-8b-nvfp4", "trtllm-qwen3-8b-nvfp4"):
        spark = Emulation("dgx-spark", "qwen3-8b", "nvfp4", "fp8")
        imitated = configs[name].emulation
        assert imitated is not None
        assert replace(imitated, options={}) == spark, "the same machine and model, so comparable"
    assert os.fspath(SUITES) in (configs["attach"].source or "")
