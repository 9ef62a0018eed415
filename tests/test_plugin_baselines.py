"""Baselines from the outside: written on request only, compared by runs, never mixed up."""

import json

BODY = """
@quick
def test_it(load, baseline):
    baseline.check(load(closed_loop(users=2), **SHORT), metrics=["output_throughput"])
"""


def _files(pytester):
    return sorted((pytester.path / "baselines").rglob("*.json"))


def _runs(path):
    (load,) = json.loads(path.read_text())["loads"].values()
    return load["runs"]


def test_nothing_is_written_unless_asked(project):
    pytester = project(BODY)
    result = pytester.runpytest()
    assert result.ret == 0
    assert not (pytester.path / "baselines").exists()
    result.stdout.fnmatch_lines(["*1 inconclusive*"])
    assert "--llmserve-update-baselines=new" in result.stdout.str()
    assert pytester.runpytest("--llmserve-strict").ret == 1


def test_five_runs_make_a_baseline_that_judges_the_sixth(project):
    pytester = project(BODY)
    for stored in range(1, 6):
        result = pytester.runpytest("--llmserve-update-baselines=new")
        assert result.ret == 0
        (path,) = _files(pytester)
        assert "emulated" in str(path.relative_to(pytester.path))
        assert len(_runs(path)) == stored
    result = pytester.runpytest("-v")
    assert "INCONCLUSIVE" not in result.stdout.str()
    before = path.read_text()
    pytester.runpytest("--llmserve-update-baselines=new")
    assert path.read_text() == before  # it has enough


def test_a_slower_server_is_a_regression(project):
    slow = BODY.replace('emulation={"hardware"', 'emulation={"options": {}, "hardware"')
    pytester = project(BODY)
    for _ in range(5):
        pytester.runpytest("--llmserve-update-baselines=new")
    header = pytester.path / next(p.name for p in pytester.path.glob("test_*.py"))
    text = header.read_text()
    assert slow
    header.write_text(text.replace('"hardware": "h100"', '"hardware": "l4"'))
    other = pytester.runpytest()
    # Another (emulated) machine is another baseline: inconclusive, never compared in silence.
    other.stdout.fnmatch_lines(["*1 inconclusive*"])


def test_an_invalid_run_is_never_stored(project):
    body = BODY.replace("**SHORT", "duration=0.5, prompt_tokens=10**6, output_tokens=8, warmup=0")
    pytester = project(body)
    assert pytester.runpytest("--llmserve-update-baselines=all").ret == 1
    assert not _files(pytester)


def test_the_file_says_emulated(project, schema):
    import jsonschema

    pytester = project(BODY)
    pytester.runpytest("--llmserve-update-baselines=new")
    (path,) = _files(pytester)
    document = json.loads(path.read_text())
    jsonschema.Draft202012Validator(schema("baseline")).validate(document)
    assert '"emulated": true' in path.read_text()
