"""What is missing is told before a server is started, with what to do about it.

There is no GPU where this is tested: programs named nvidia-smi say what real ones print.
"""

from __future__ import annotations

import os
import socket
import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmserve.engines import get_engine
from pytest_llmserve.errors import ServerError
from pytest_llmserve.launch.cuda import driver_cuda
from pytest_llmserve.launch.manager import ServerManager
from pytest_llmserve.launch.preflight import (
    examine,
    gpu_memory,
    is_cached,
    memory_finding,
    requirements,
)
from pytest_llmserve.servers import ContainerRunner, ProcessRunner, ServerConfig
from tests.launching import fake_config, fake_engine

VLLM = get_engine("vllm")
H200 = ("NVIDIA H200", "580.1", "143771", "143000")
CUDA = "CUDA Version        : 13.0"
SPARK = ("NVIDIA GB10", "580.1", "[N/A]", "[N/A]")  # no memory of its own


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on PATH, which knows these GPUs."""

    def install(*gpus):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        lines = ["#!/bin/sh", 'case "$1" in']
        lists = [f"echo 'GPU {i}: {gpu[0]} (UUID: GPU-{i})'" for i, gpu in enumerate(gpus)]
        lines.append("-L) " + "; ".join(lists) + ";;")
        for query, fields in (
            ("name,driver_version", (0, 1)),
            ("memory.total,memory.free", (2, 3)),
        ):
            rows = [f"echo '{', '.join(gpu[i] for i in fields)}'" for gpu in gpus]
            lines.append(f"--query-gpu={query}) " + "; ".join(rows) + ";;")
        lines.append(f"--version) echo 'NVML version        : 580.1'; echo '{CUDA}' ;;")
        program.write_text("\n".join([*lines, "esac", ""]))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def config(**changes):
    settings = {"name": "x", "engine": "vllm", "model": "org/model", "gpus": 1}
    return ServerConfig(**settings | changes)


def told(findings, level):
    return [str(finding) for finding in findings if finding.level == level]


def test_all_is_well(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi(H200)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--org--model/snapshots/abc").mkdir(parents=True)
    made = config(runner=ProcessRunner(executable="/bin/true"))
    findings = examine(made, VLLM)
    assert told(findings, "fail") == []
    well = "\n".join(told(findings, "ok"))
    assert "program: /bin/true" in well
    assert f"org/model is in the cache {tmp_path / 'hub'}" in well
    assert "gpus: 1 visible, 1 needed (NVIDIA H200, 580.1)" in well
    assert "149.9 of 150.8 GB GPU memory are free" in well


def test_program(nvidia_smi):
    nvidia_smi(H200)
    made = config(runner=ProcessRunner(executable="/no/vllm"))
    assert any(
        "/no/vllm is not there; correct the path" in t for t in told(examine(made, VLLM), "fail")
    )


def test_model_that_is_neither_cached_nor_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    made = config(gpus=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (fail,) = told(requirements(made, VLLM), "fail")
    assert "org/model is not in the cache" in fail
    assert "hf download org/model" in fail
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert told(requirements(made, VLLM), "fail") == []
    (tmp_path / "models--org--model/snapshots").mkdir(parents=True)
    assert not is_cached("org/model"), "an interrupted download leaves an empty folder"
    (tmp_path / "models--org--model/snapshots/abc").mkdir()
    assert is_cached("org/model")


def test_too_few_gpus(nvidia_smi, monkeypatch):
    nvidia_smi(H200)
    (fail,) = told(requirements(config(gpus=2), VLLM), "fail")
    assert fail.startswith("gpus: 2 needed, 1 visible here: check `nvidia-smi`")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (fail,) = told(requirements(config(), VLLM), "fail")
    assert "0 visible" in fail


def test_memory_of_a_gpu_of_its_own(nvidia_smi):
    nvidia_smi(H200, ("NVIDIA H200", "580.1", "143771", "40000"))
    assert gpu_memory() == (143771 * 2**20, 40000 * 2**20, False), "the fullest counts"
    made = config(runner=ProcessRunner(executable="/bin/true"))
    (fail,) = told(examine(made, VLLM), "fail")
    assert "the engine takes 138.7 GB: end what uses it, or lower" in fail
    assert told(examine(config(args={"gpu_memory_utilization": 0.2}), VLLM)[1:], "fail") == []
    trtllm = get_engine("tensorrt-llm")
    assert told(examine(made, trtllm), "fail") == [], "it sizes its cache by what is free"


def test_memory_that_is_shared_with_the_system(nvidia_smi):
    nvidia_smi(SPARK)
    total, free, unified = gpu_memory()
    assert (total, unified) == (psutil.virtual_memory().total, True)
    assert 0 < free <= total


def test_no_gpu_tells_nothing_about_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == (0, 0, False)


@given(st.integers(1, 10**12), st.floats(0, 1), st.floats(0.05, 1), st.booleans())
def test_memory_suffices_or_the_mend_would_make_it(total, part, share, unified):
    free = int(part * total)
    finding = memory_finding(total, free, share, unified=unified)
    assert (finding.level == "ok") == (free >= share * total)
    if finding.level == "fail":
        assert ("drop_caches" in finding.mend) == unified
        proposed = float(finding.mend.rpartition(" ")[2])
        assert proposed < share
        assert memory_finding(total, free, proposed, unified=unified).level == "ok"


def test_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (fail,) = told(requirements(config(gpus=0, port=port), VLLM), "fail")
    assert f"port: {port} of 127.0.0.1 cannot be used (Address already in use): leave" in fail
    assert told(requirements(config(gpus=0, port=port), VLLM), "fail") == []


@pytest.fixture
def engine_built_with(tmp_path):
    """Makes a program of a Python engine whose PyTorch was built with this CUDA."""

    def make(cuda):
        torch = tmp_path / "site" / "torch"
        torch.mkdir(parents=True, exist_ok=True)
        (torch / "__init__.py").write_text("raise ImportError('it is not to be imported')\n")
        (torch / "version.py").write_text(f"__version__ = '2.9'\ncuda: str | None = {cuda!r}\n")
        python = tmp_path / "python3"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
        script = tmp_path / "vllm"
        script.write_text(f"#!{python}\nraise SystemExit\n")
        for path in (python, script):
            path.chmod(0o755)
        return {"interpreter": str(python)}, {"executable": str(script)}

    return make


@pytest.mark.parametrize("started_by", [0, 1], ids=["interpreter", "script"])
@pytest.mark.parametrize(
    ("built", "level", "part"),
    [
        ("12.9", "ok", "the driver runs CUDA up to 13.0, the engine was built with 12.9"),
        ("13.0", "ok", "the engine was built with 13.0"),
        ("13.1", "warn", "update the driver if kernels do not load"),
        ("14.0", "fail", "update the driver, or install a build of the engine for CUDA 13"),
        (None, "ok", "what the engine was built with cannot be told"),
    ],
)
def test_driver_against_the_engine(nvidia_smi, engine_built_with, started_by, built, level, part):
    nvidia_smi(H200)
    made = config(runner=ProcessRunner(**engine_built_with(built)[started_by]))
    (finding,) = [f for f in requirements(made, VLLM) if f.what.startswith("cuda:")]
    assert finding.level == level
    assert part in str(finding)


def test_cuda_is_not_asked_for_without_a_gpu(nvidia_smi, engine_built_with):
    nvidia_smi(H200)
    made = config(gpus=0, runner=ProcessRunner(**engine_built_with("14.0")[0]))
    assert not [f for f in requirements(made, VLLM) if f.what.startswith("cuda:")]


def test_driver_that_has_its_cuda_in_the_table_only(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    table = "| NVIDIA-SMI 535.1   Driver Version: 535.1   CUDA Version: 12.2     |"
    program.write_text(f"#!/bin/sh\n[ $# = 0 ] && echo '{table}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert driver_cuda() == (12, 2)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert driver_cuda() is None


@pytest.fixture
def runtime(tmp_path):
    """A container runtime that has one image, built with CUDA 14."""
    program = tmp_path / "podman"
    known = '["PATH=/usr/bin","CUDA_VERSION=14.0.1"]'
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = version ] && exit 0\n'
        f"""[ "$1 $2 $5" = "image inspect known:1" ] && echo '{known}' && exit 0\n"""
        "exit 125\n"
    )
    program.chmod(0o755)
    return str(program)


def test_image(nvidia_smi, runtime):
    nvidia_smi(H200)
    here = config(runner=ContainerRunner(image="known:1", runtime=runtime))
    findings = examine(here, VLLM)
    assert "image: known:1 is here" in told(findings, "ok")
    (warning,) = [text for text in told(findings, "warn") if text.startswith("cuda")]
    assert "up to 13.0, the engine was built with 14.0" in warning, "images may bring libraries"
    absent = config(runner=ContainerRunner(image="other:1", runtime=runtime))
    (warning,) = [text for text in told(examine(absent, VLLM), "warn") if "image" in text]
    assert "other:1 is not here: it is pulled at the first start" in warning
    assert "`podman pull other:1`" in warning


def test_key_on_a_command_line_is_refused():
    made = config(gpus=0, args={"api_key": "sk-secret"})
    (fail,) = told(requirements(made, VLLM), "fail")
    assert fail.startswith("args: api-key would be on a command line")
    assert "sk-secret" not in fail


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "ollama"])
def test_key_for_an_engine_that_takes_none_from_its_environment(name):
    engine = get_engine(name)
    assert engine.api_key == ""
    made = config(engine=name, gpus=0, api_key_env="MY_KEY")
    (fail,) = told(requirements(made, engine), "fail")
    assert fail == f"api_key_env: {engine.notes['key']}: take it out"


def test_nothing_is_asked_of_an_endpoint_or_the_emulated_engine():
    attach = ServerConfig(name="a", engine="attach", endpoint="http://x:1", gpus=0)
    assert examine(attach, get_engine("attach")) == []
    emulated = ServerConfig(name="e", engine="emulator", model="Qwen3-8B", gpus=0)
    assert {finding.level for finding in examine(emulated, get_engine("emulator"))} == {"ok"}


def test_the_launcher_looks_before_it_starts(tmp_path):
    manager = ServerManager(tmp_path / "run", os.getpid())
    made = fake_config(tmp_path / "pids", model="/no/model")
    with pytest.raises(ServerError, match="fake: model: /no/model is not there: correct the path"):
        manager.get(made, fake_engine(), lambda _: None)
    assert not (tmp_path / "pids").exists()
