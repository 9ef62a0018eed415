"""GPU telemetry by a stand-in for NVML alone: what is read, left out, added up and judged.

There is no GPU here; the rest (threads, processes, /proc) is real.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_records import make_record

from pytest_llmserve.launch.tree import MARKER
from pytest_llmserve.load.plan import LoadPlan, Workload, closed_loop
from pytest_llmserve.metrics.definitions import measure
from pytest_llmserve.metrics.nvml import READINGS, REASONS
from pytest_llmserve.metrics.telemetry import (
    Owner,
    Readings,
    Recorder,
    energy_in,
    owner_of,
    reason_shares,
    summarize,
)
from pytest_llmserve.servers import Server, ServerConfig
from pytest_llmserve.verdict.slo import GPU as GPU_NAMES
from pytest_llmserve.verdict.validity import check

WATTS = 500.0


class NVMLError(Exception):
    pass


def nvml(*, lacks=(), count=1, processes=lambda gpu: [], mask=0, **replaced):
    """A stand-in for the module `pynvml` of nvidia-ml-py, in NVML's own units; each function named
    in `lacks` answers "Not Supported"."""
    opened = []

    def refuse(*_):
        raise NVMLError("Not Supported")

    functions = {
        "nvmlInit": lambda: opened.append(1),
        "nvmlShutdown": lambda: opened.pop(),
        "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda i: i if i < count else refuse(),
        "nvmlDeviceGetHandleByUUID": lambda uuid: 0 if uuid == "GPU-abc" else refuse(),
        "nvmlDeviceGetName": lambda gpu: "NVIDIA H200",
        "nvmlDeviceGetUtilizationRates": lambda gpu: types.SimpleNamespace(gpu=90 + gpu, memory=50),
        "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(total=141 << 30, used=8 << 30),
        "nvmlDeviceGetPowerUsage": lambda gpu: int(WATTS * 1e3),
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 60 + gpu,
        "nvmlDeviceGetClockInfo": lambda gpu, which: 1980 if which == 1 else 3201,
        "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: int(time.monotonic() * WATTS * 1e3),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: mask,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
            types.SimpleNamespace(pid=pid, usedGpuMemory=1 << 30) for pid in processes(gpu)
        ],
        "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda gpu, which: 1980,
    }
    functions |= dict.fromkeys(lacks, refuse)
    module = types.ModuleType("pynvml")
    constants = {"NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2}
    module.__dict__.update({"NVMLError": NVMLError, "opened": opened}, **constants)
    module.__dict__.update(functions | replaced)
    return module


QUESTIONS = tuple(
    name
    for name in vars(nvml())
    if name.startswith("nvmlDeviceGet")
    and not name.startswith(("nvmlDeviceGetHandle", "nvmlDeviceGetCount"))
)


def server(**config):
    settings = {"name": "s", "engine": "vllm", **config}
    return Server(ServerConfig(**settings), "http://127.0.0.1:8000", "m", settings["engine"])


def record(fake, owner=None, seconds=0.25, rate=50.0):
    owner = owner or Owner((), None)
    with Recorder(server(), fake, owner=owner, rate=rate) as recorder:
        start = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
    assert fake.opened == []
    return recorder.readings, (start, end)


def told(readings, window, tokens=100.0):
    return summarize(readings, window, window[0], tokens)


def test_all_that_a_gpu_tells():
    found = told(*record(nvml()))
    gpu = found.metrics
    assert gpu["utilization"] == {"mean": pytest.approx(0.9), "max": 0.9}
    assert gpu["memory_used"]["max"] == 8 << 30
    assert gpu["power"]["mean"] == pytest.approx(WATTS)
    assert gpu["temperature"]["max"] == 60
    assert gpu["sm_clock"]["min"] == 1.98e9
    assert gpu["memory_clock"]["mean"] == pytest.approx(3.201e9)
    assert (gpu["throttled"], gpu["power_capped"]) == (0.0, 0.0)
    assert gpu["system_memory_used"] == {"mean": None, "max": None}
    assert found.facts["gpus"] == [
        {"id": "0", "name": "NVIDIA H200", "power_limit": 700.0, "max_sm_clock": 1.98e9}
    ]
    series = found.facts["series"]
    assert set(series) == {
        "time", "gpu.utilization", "gpu.memory_used", "gpu.power", "gpu.temperature",
        "gpu.sm_clock", "gpu.memory_clock", "throttled", "power_capped",
    }  # fmt: skip
    assert len({len(column) for column in series.values()}) == 1
    assert series["time"] == sorted(series["time"])
    assert series["time"][0] < 0
    json.dumps(found.facts, allow_nan=False)


def test_metrics_have_the_names_that_objectives_know():
    gpu = told(*record(nvml())).metrics
    flat = {
        f"gpu.{name}.{inner}" if inner else f"gpu.{name}"
        for name, value in gpu.items()
        for inner in (value if isinstance(value, dict) else ("",))
    }
    assert flat == set(GPU_NAMES)


def test_energy_is_that_of_the_exact_window():
    readings, window = record(nvml())
    found = told(readings, window, tokens=50.0)
    joules = WATTS * (window[1] - window[0])
    assert found.facts["energy_source"] == "counter"
    assert found.metrics["energy"] == pytest.approx(joules, rel=0.02)
    assert found.energy_per_token == pytest.approx(joules / 50, rel=0.02)
    assert told(readings, window, tokens=0.0).energy_per_token is None


def test_without_the_counter_energy_is_the_integral_of_power():
    readings, window = record(nvml(lacks=["nvmlDeviceGetTotalEnergyConsumption"]))
    found = told(readings, window)
    assert found.facts["energy_source"] == "power"
    assert found.metrics["energy"] == pytest.approx(WATTS * (window[1] - window[0]), rel=0.02)


def test_several_gpus_are_one():
    readings, window = record(nvml(count=2), Owner(("0", "1"), None))
    gpu = told(readings, window).metrics
    assert gpu["power"]["mean"] == pytest.approx(2 * WATTS)
    assert gpu["memory_used"]["max"] == 16 << 30
    assert gpu["utilization"]["mean"] == pytest.approx(0.905)
    assert gpu["temperature"]["max"] == 61
    assert gpu["energy"] == pytest.approx(2 * WATTS * (window[1] - window[0]), rel=0.02)


def test_only_the_servers_own_gpus_are_read():
    readings, _ = record(nvml(count=8), Owner(("3",), None), seconds=0.05)
    assert [gpu["id"] for gpu in readings.gpus] == ["3"]
    assert max(readings.series["temperature"]) == 63
    readings, _ = record(nvml(), Owner(("GPU-abc",), None), seconds=0.05)
    assert [gpu["id"] for gpu in readings.gpus] == ["GPU-abc"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_any_question_may_be_refused(question, recwarn):
    readings, window = record(nvml(lacks=[question]), seconds=0.1)
    found = told(readings, window)
    assert found.metrics is not None
    assert not recwarn.list
    json.dumps([found.metrics, found.facts], allow_nan=False)


def test_a_gpu_that_tells_nothing_leaves_the_systems_memory():
    found = told(*record(nvml(lacks=QUESTIONS), seconds=0.1))
    assert set(found.facts["series"]) == {"time", "system_memory_used"}
    assert found.metrics["system_memory_used"]["max"] > 2**20
    assert found.energy_per_token is None
    assert found.facts["energy_source"] is None
    assert found.facts["processes"] == {"checked": False, "foreign": []}


def test_memory_of_zero_bytes_is_unified_memory():
    nothing = types.SimpleNamespace(total=0, used=0)
    readings, _ = record(nvml(nvmlDeviceGetMemoryInfo=lambda gpu: nothing), seconds=0.05)
    assert "memory_used" not in readings.series
    assert min(readings.series["system_memory_used"]) > 0


def test_older_libraries_have_other_names():
    fake = nvml(mask=REASONS["hw_power_brake"])
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = fake.nvmlDeviceGetCurrentClocksEventReasons
    del fake.nvmlDeviceGetCurrentClocksEventReasons
    assert told(*record(fake)).metrics["throttled"] == 1.0
    del fake.nvmlDeviceGetCurrentClocksThrottleReasons
    assert told(*record(fake)).metrics["throttled"] is None


def test_a_reading_that_fails_for_once_is_a_gap():
    turn = itertools.count()

    def power(gpu):
        if next(turn) % 3 == 1:
            raise NVMLError("Unknown Error")
        return 100_000

    readings, window = record(nvml(nvmlDeviceGetPowerUsage=power))
    found = told(readings, window)
    assert None in found.facts["series"]["gpu.power"]
    assert found.metrics["power"]["mean"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("fake", "owner", "reason"),
    [
        (nvml(count=0), Owner((), None), "this machine has no NVIDIA GPU"),
        (nvml(), Owner(("7",), None), "does not show the server's GPUs"),
        (nvml(), Owner(("MIG-x",), None), "does not show the server's GPUs"),
        (nvml(lacks=["nvmlInit"]), Owner((), None), "the NVIDIA driver cannot be asked"),
        (nvml(), "the engine is emulated", "the engine is emulated"),
    ],
)
def test_without_gpus_there_is_a_reason_and_nothing_else(fake, owner, reason):
    with Recorder(server(), fake, owner=owner) as recorder:
        pass
    found = told(recorder.readings, (0.0, 1.0))
    assert (found.metrics, found.energy_per_token) == (None, None)
    assert list(found.facts) == ["reason"]
    assert reason in found.facts["reason"]
    assert fake.opened == []


def test_without_a_driver_the_library_is_not_even_imported():
    code = """if True:
        import sys
        from pytest_llmserve.metrics import nvml
        from pytest_llmserve.metrics.telemetry import Owner, Recorder
        nvml.driver_is_here = lambda: False
        with Recorder(None, owner=Owner((), None)) as recorder:
            pass
        assert recorder.readings.reason == "this machine has no NVIDIA GPU"
        print("pynvml" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("False", "")


def test_whose_gpus(tmp_path):
    assert "emulated" in owner_of(
        Server(ServerConfig("s", "vllm"), "http://x", "m", "emulator", emulated=True)
    )
    assert "CPU" in owner_of(server(gpus=0))
    far = Server(ServerConfig("s", "attach", gpus=0), "http://10.0.0.1:8000", "m", "vllm")
    assert "another machine" in owner_of(far)
    near = Server(ServerConfig("s", "attach", gpus=0), "http://localhost:8000", "m", "vllm")
    assert owner_of(near) == Owner((), None)
    (tmp_path / "state.json").write_text(json.dumps({"gpus": ["2"], "server_id": "llmserve-77"}))
    (tmp_path / "status.json").write_text(json.dumps({"server": os.getpid(), "keeper": 1 << 22}))
    log = str(tmp_path / "server.log")
    ours = Server(
        ServerConfig("s", "vllm"), "http://127.0.0.1:1", "m", "vllm", pid=1 << 22, log=log
    )
    owner = owner_of(ours)
    assert owner.ids == ("2",)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c 'import time; time.sleep(60)' & wait"],
        start_new_session=True,
    )
    marked = subprocess.Popen(sleep, env={**os.environ, MARKER: "llmserve-77"})
    try:
        assert owner.belongs(os.getpid())
        assert owner.belongs(child.pid)  # below the server
        assert not owner.belongs(os.getppid())
        assert not owner.belongs(1)
        assert not owner.belongs((1 << 22) + 5)  # no such process
    finally:
        os.killpg(child.pid, 9)
        marked.kill()
        child.wait()
        marked.wait()


def test_the_marker_tells_a_containers_processes(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"gpus": ["0"], "server_id": "llmserve-78"}))
    log = str(tmp_path / "server.log")
    ours = Server(
        ServerConfig("s", "vllm"), "http://127.0.0.1:1", "m", "vllm", pid=1 << 22, log=log
    )
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    inside, other = (
        subprocess.Popen(sleep, env={**os.environ, MARKER: f"llmserve-{n}"}) for n in (78, 79)
    )
    try:
        deadline = time.monotonic() + 10  # until the child has its own environment
        while not owner_of(ours).belongs(inside.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert owner_of(ours).belongs(inside.pid)
        assert not owner_of(ours).belongs(other.pid)
    finally:
        for process in (inside, other):
            process.kill()
            process.wait()


PLAN = LoadPlan(closed_loop(1, ramp=0.0), Workload(10, 3), duration=10.0)


def failed(gpu):
    """Failed checks of a good load with this telemetry, with their details."""
    rows = [
        {"intended": float(t), "user": 0, "events": [t + 0.5, t + 0.75, t + 1.0], "want_output": 3}
        for t in range(11)
    ]
    load = make_record(rows)
    metrics = measure(load, PLAN)
    if gpu.metrics is not None:
        metrics["gpu"] = gpu.metrics
    checks = check(load, metrics, PLAN, counters={}, bounds={}, telemetry=gpu.facts)
    made = {one.check for one in checks}
    assert ("gpu_throttled" in made) == ("foreign_process" in made) == (gpu.metrics is not None)
    return {one.check: one.detail for one in checks if not one.ok}, checks


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("hw_thermal_slowdown", True),
        ("sw_thermal_slowdown", True),
        ("hw_power_brake", True),
        ("hw_slowdown", True),
        ("sw_power_cap", False),
        ("application_clocks", False),
        ("sync_boost", False),
        ("idle", False),
    ],
)
def test_heat_and_power_brakes_make_a_run_invalid(reason, bad):
    gpu = told(*record(nvml(mask=REASONS[reason])))
    found, checks = failed(gpu)
    assert set(found) == ({"gpu_throttled"} if bad else set())
    assert gpu.facts["reasons"] == {reason: 1.0}
    said = next(one.detail for one in checks if one.check == "gpu_throttled")
    assert ("power was capped in 100.0% of it" in said) == (reason == "sw_power_cap")


def test_a_slowdown_bit_of_one_reading_is_a_change_of_clocks():
    times = [float(t) for t in range(10)]
    bit = REASONS["hw_slowdown"]
    once = [0.0] * 9 + [float(bit)]
    assert reason_shares(times, once, (0.0, 10.0))["throttled"] == 0.0
    twice = [0.0] * 8 + [float(bit)] * 2
    assert reason_shares(times, twice, (0.0, 10.0))["throttled"] == 0.2
    assert reason_shares(times, [float(REASONS["hw_power_brake"])] * 10, (20.0, 30.0)) is None


def test_throttling_outside_the_window_does_not_count():
    times = [float(t) for t in range(10)]
    masks = [float(REASONS["hw_thermal_slowdown"])] * 3 + [0.0] * 7
    assert reason_shares(times, masks, (3.0, 10.0))["throttled"] == 0.0
    assert reason_shares(times, masks, (0.0, 10.0))["throttled"] == pytest.approx(0.3)


@pytest.fixture
def stranger():
    """A process that is not ours, as far as the server's owner says."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_foreign_process_is_named(stranger):
    owner = Owner(("0",), lambda pid: pid == os.getpid())
    gpu = told(*record(nvml(processes=lambda gpu: [os.getpid(), stranger]), owner))
    found, _ = failed(gpu)
    assert set(found) == {"foreign_process"}
    assert f"({stranger})" in found["foreign_process"]
    alone = told(*record(nvml(processes=lambda gpu: [os.getpid()]), owner))
    found, checks = failed(alone)
    assert not found
    assert any("the server was alone" in one.detail for one in checks)


@pytest.mark.parametrize("seen", [[], ["stranger"], [1 << 22]])
def test_no_alarm_where_the_list_does_not_show_the_server(seen, stranger):
    pids = [stranger if pid == "stranger" else pid for pid in seen]
    owner = Owner(("0",), lambda pid: pid == os.getpid())
    found, checks = failed(told(*record(nvml(processes=lambda gpu: pids), owner)))
    assert not found
    assert any(one.check == "foreign_process" and "not checked" in one.detail for one in checks)


def test_ids_of_another_namespace_are_no_processes():
    owner = Owner(("0",), lambda pid: pid == os.getpid())
    gpu = told(*record(nvml(processes=lambda gpu: [os.getpid(), (1 << 22) + 9]), owner))
    assert failed(gpu)[0] == {}


def test_an_attached_servers_neighbours_are_not_judged(stranger):
    gpu = told(*record(nvml(processes=lambda gpu: [stranger]), Owner((), None)))
    found, checks = failed(gpu)
    assert not found
    assert any("not checked" in one.detail for one in checks if one.check == "foreign_process")


def test_no_gpu_no_checks():
    found, _ = failed(summarize(Readings(reason="none"), (0.0, 1.0), 0.0, 1.0))
    assert not found


@given(
    st.lists(st.tuples(st.floats(0.05, 1), st.floats(1, 1000)), min_size=2, max_size=20),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_integral_of_power_lies_between_its_extremes(steps, a, b):
    times = list(itertools.accumulate(dt for dt, _ in steps))
    power = [p for _, p in steps]
    span = times[-1] - times[0]
    start, end = (times[0] + x * span for x in sorted((a, b)))
    joules, source = energy_in({"time": times, "power": power}, (start, end))
    if start == end:
        assert (joules, source) == (None, None)
    else:
        assert source == "power"
        low, high = min(power) * (end - start), max(power) * (end - start)
        assert low - 1e-6 <= joules <= high + 1e-6
    assert energy_in({"time": times, "power": power}, (times[0] - 1, end)) == (None, None)


def test_gaps_in_power_are_bridged():
    series = {"time": [0.0, 1.0, 2.0, 3.0], "power": [100.0, math.nan, 100.0, 100.0]}
    assert energy_in(series, (0.5, 2.5)) == (pytest.approx(200.0), "power")


def test_the_stand_in_answers_every_question():
    readings, _ = record(nvml(), seconds=0.05)
    assert set(READINGS) <= set(readings.series)
