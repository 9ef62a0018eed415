"""Baseline files: round trip, names, diffs, hostile content, migration, concurrent writers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.verdict import baseline_file
from pytest_llmserve.verdict.baseline_file import (
    SCHEMA,
    Accepted,
    Baseline,
    LoadBaseline,
    StoredRun,
    baseline_path,
    decode,
    encode,
    read,
    update,
)

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def stored(number, value=1000.0):
    return StoredRun(
        id=f"{number:012x}",
        time="2026-11-23T18:00:00+00:00",
        duration=60.0,
        metrics={"output_throughput": value, "ttft.p95": 0.4},
        samples={"ttft": 900},
        uncertified=("ttft.p99",),
        sketch={"ttft": (0.1, 0.2, 0.4)},
        fingerprint={"engine": "vllm", "gpu_count": 1},
        validity={"concurrency": "30 of 30"},
    )


def baseline(*runs, test="t.py::test_x"):
    runs = runs or (stored(1), stored(2))
    load = LoadBaseline({"users": 30}, (runs[0].id,), (), runs)
    return Baseline(test, "dgx-spark", "Qwen/Qwen3-8B", "qwen", False, {"closed-30": load})


def test_the_schema_is_a_schema():
    schema = Path(baseline_file.__file__).parents[1] / "schemas/baseline.schema.json"
    Draft202012Validator.check_schema(json.loads(schema.read_text()))


def test_round_trip(tmp_path):
    path = tmp_path / "a/b/c/d.json"
    accepted = Accepted(stored(2).id, "2026-11-23T18:00:00+00:00", "new driver", {"ttft.p95": 1.2})
    load = LoadBaseline({}, (stored(1).id,), (accepted,), (stored(1), stored(2)))
    written = replace(baseline(), loads={"x": load})
    update(path, tmp_path, lambda found: written)
    assert read(path) == written
    assert read(path).loads["x"].current() == (stored(2),)
    assert read(tmp_path / "none.json") is None
    assert [p.name for p in path.parent.iterdir()] == ["d.json"]


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=20)
RUNS = st.lists(
    st.builds(
        StoredRun,
        id=st.integers(0, 16**12 - 1).map(lambda n: f"{n:012x}"),
        time=TEXT,
        duration=st.floats(0, 1e6),
        metrics=st.dictionaries(TEXT, NUMBERS, max_size=3),
        samples=st.dictionaries(TEXT, st.integers(0, 10**9), max_size=2),
        uncertified=st.lists(TEXT, max_size=2).map(tuple),
        sketch=st.dictionaries(
            TEXT, st.lists(NUMBERS, min_size=2, max_size=5).map(tuple), max_size=2
        ),
        fingerprint=st.dictionaries(TEXT, st.one_of(TEXT, st.booleans(), NUMBERS), max_size=3),
        validity=st.dictionaries(TEXT, TEXT, max_size=2),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda run: run.id,
)


@relaxed
@given(RUNS)
def test_whatever_is_stored_is_read_back(runs):
    written = baseline(*runs)
    lists = json.loads(encode(written))
    assert decode(encode(written), "x") == decode(json.dumps(lists), "x")
    again = decode(encode(written), "x").loads["closed-30"].runs
    for before, after in zip(runs, again, strict=True):
        assert dict(after.metrics) == dict(before.metrics)
        assert after.fingerprint == before.fingerprint
        assert {k: tuple(v) for k, v in after.sketch.items()} == before.sketch
    assert encode(decode(encode(written), "x")) == encode(written)


def test_an_appended_run_is_all_that_a_diff_shows():
    before, after = encode(baseline(stored(1))), encode(baseline(stored(1), stored(2, 990.0)))
    lost = [line for line in before.splitlines() if line not in after.splitlines()]
    assert lost == []
    assert len(after.splitlines()) - len(before.splitlines()) < 35
    assert '"ttft": [ 0.1, 0.2, 0.4 ]' in after


@relaxed
@given(st.tuples(TEXT, TEXT, TEXT), st.tuples(TEXT, TEXT, TEXT))
def test_no_name_leaves_the_root_and_no_two_share_a_file(one, other):
    root = Path("/root/of/baselines")
    first = baseline_path(root, "hw", one[0], one[1], one[2])
    second = baseline_path(root, "hw", other[0], other[1], other[2])
    assert first.parts[: len(root.parts)] == root.parts
    assert ".." not in first.parts
    assert len(first.relative_to(root).parts) == 4
    assert (first == second) == (one == other)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a\0b", "x" * 5000]
)
def test_hostile_names_stay_inside(tmp_path, name):
    path = baseline_path(tmp_path, name, name, name, name)
    assert path.resolve().is_relative_to(tmp_path.resolve())
    update(path, tmp_path, lambda found: baseline())
    assert read(path) == baseline()


def broken(change):
    content = json.loads(encode(baseline()))
    change(content, content["loads"]["closed-30"])
    return json.dumps(content)


HOSTILE = {
    "truncated": (encode(baseline())[:200], "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "merge conflict": ("<<<<<<< HEAD\n" + encode(baseline()), "not valid JSON"),
    "a list": ("[]", "schema is None"),
    "a number": ("7", "schema is None"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "deep in place": (
        encode(baseline()).replace('"vllm"', "[" * 900 + "]" * 900),
        "should be of type string or number",
    ),
    "NaN": (encode(baseline()).replace("1000.0", "NaN"), "NaN, which is no number"),
    "infinite": (encode(baseline()).replace("1000.0", "1e999"), "1e999, which is no number"),
    "huge integer": (encode(baseline()).replace("1000.0", "9" * 5000), "not valid JSON"),
    "unknown version": (encode(baseline()).replace(SCHEMA, "llmserve-baseline/99"), "baseline/99"),
    "version of another type": (broken(lambda c, _: c.update(schema=[1])), r"schema is \[1\]"),
    "number as text": (
        broken(lambda _, load: load["runs"][0]["metrics"].update({"ttft.p95": "fast"})),
        r"at 'loads.closed-30.runs.0.metrics.ttft.p95', 'fast' should be of type number",
    ),
    "key missing": (broken(lambda _, load: load["runs"][0].pop("metrics")), "'metrics' is missing"),
    "key unknown": (broken(lambda _, load: load.update(pinned=1)), "'pinned' is unknown"),
    "runs not a list": (broken(lambda _, load: load.update(runs={})), "should be of type array"),
    "no runs": (broken(lambda _, load: load.update(runs=[])), "breaks minItems"),
    "same id twice": (
        broken(lambda _, load: load["runs"].append(load["runs"][0])),
        "a run id occurs twice",
    ),
    "origin of nothing": (broken(lambda _, load: load.update(origin=["f" * 12])), "referred to"),
    "emulated as text": (broken(lambda c, _: c.update(emulated="no")), "at 'emulated'"),
    "negative count": (
        broken(lambda _, load: load["runs"][0]["samples"].update(ttft=-1)),
        "breaks minimum",
    ),
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_content_is_one_sentence_and_left_alone(tmp_path, text, said):
    path = tmp_path / "hardware/model/server/t.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    with pytest.raises(ConfigError):
        update(path, tmp_path, lambda found: baseline())
    assert path.read_text() == text


def test_binary_and_oversized_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(path)
    monkeypatch.setattr(baseline_file, "MOST_BYTES", 100)
    path.write_text(encode(baseline()))
    with pytest.raises(ConfigError, match="may have"):
        read(path)


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path):
    (tmp_path / "t.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "t.json")


def test_a_root_that_is_a_file_is_one_sentence(tmp_path):
    root = tmp_path / "baselines"
    root.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        update(root / "a/b/c/d.json", root, lambda found: baseline())


def test_an_older_version_is_migrated_step_by_step():
    def from_minus_one(content):
        return {**content, "schema": "llmserve-baseline/0"}

    def from_zero(content):
        return {**content, "schema": SCHEMA, "emulated": content["emulated"] == "yes"}

    migrations = {"llmserve-baseline/-1": from_minus_one, "llmserve-baseline/0": from_zero}
    old = json.loads(encode(baseline()))
    old.update(schema="llmserve-baseline/-1", emulated="no")
    assert decode(json.dumps(old), "x", migrations) == baseline()
    with pytest.raises(ConfigError, match="baseline/-1"):
        decode(json.dumps(old), "x")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a/b/c/d.json"
    update(path, tmp_path, lambda found: baseline())
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(baseline_file.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        update(path, tmp_path, lambda found: baseline(stored(3)))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["d.json"]


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from test_baseline_file import baseline, stored
from pytest_llmserve.verdict.baseline_file import update
root, first = Path(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + 10):
    def change(found):
        if found is None:
            return baseline(stored(number))
        load = found.loads["closed-30"]
        return replace(found, loads={"closed-30": replace(load, runs=(*load.runs, stored(number)))})
    update(root / "a/b/c/d.json", root, change)
"""


def test_writers_at_once_lose_nothing(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = f"import sys; sys.path[:0] = {paths!r}\n{WRITER}"
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(first)])
        for first in (100, 200, 300)
    ]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    ids = sorted(int(run.id, 16) for run in read(tmp_path / "a/b/c/d.json").loads["closed-30"].runs)
    assert ids == [*range(100, 110), *range(200, 210), *range(300, 310)]
