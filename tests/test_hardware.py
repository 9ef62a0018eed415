"""The machine's description and its name for folders."""

import re
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmserve.verdict import hardware


def test_this_machine_has_a_name_a_cpu_and_memory(recwarn):
    hardware.describe.cache_clear()
    facts = hardware.describe()
    assert facts["cores"] >= 1
    assert facts["memory"] > 2**28
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", facts["slug"])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("facts", "slug"),
    [
        ({"cpu": "Intel(R) Xeon(R) Processor", "cores": 2}, "cpu-intel-xeon-2c"),
        (
            {"cpu": "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "cores": 8},
            "cpu-intel-core-i7-8650u-8c",
        ),
        ({"cpu": "AMD EPYC 7763 64-Core Processor", "cores": 64}, "cpu-amd-epyc-7763-64c"),
        (
            {"cpu": "x", "cores": 9, "gpu": "NVIDIA H100 80GB HBM3", "gpu_count": 1},
            "nvidia-h100-80gb-hbm3",
        ),
        ({"cpu": "x", "cores": 9, "gpu": "NVIDIA H200", "gpu_count": 4}, "4x-nvidia-h200"),
        ({"cpu": "x", "cores": 20, "gpu": "NVIDIA GB10", "gpu_count": 1}, "dgx-spark"),
        ({"cpu": "x", "cores": 8, "gpu": "Tesla T4", "gpu_count": 1}, "nvidia-tesla-t4"),
    ],
)
def test_slugs(facts, slug):
    assert hardware.slug(facts) == slug


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_a_safe_name_is_never_a_path(text):
    name = hardware.safe(text)
    assert re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?", name)
    assert ".." not in name
    assert len(name) <= 60


class NVMLError(Exception):
    pass


def nvml(**replaced):
    """A stand-in for NVML on a machine that has none: two GPUs of a Spark's kind."""

    def no_memory(handle):
        raise NVMLError("Not Supported")

    functions = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda handle: b"NVIDIA GB10",
        "nvmlDeviceGetMemoryInfo": no_memory,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (12, 1),
        "nvmlSystemGetDriverVersion": lambda: "580.95.05",
        **replaced,
    }
    module = types.ModuleType("pynvml")
    module.__dict__.update(functions)
    return module


def test_unified_memory_is_unknown_not_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert hardware.gpus() == {
        "gpu": "NVIDIA GB10",
        "gpu_count": 2,
        "gpu_memory": None,
        "driver": "580.95.05",
        "compute_capability": "12.1",
    }


def test_no_driver_means_no_gpu(monkeypatch):
    def no_driver():
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=no_driver))
    assert hardware.gpus() == {}
