"""docs/engines.md says what is true: its example runs, and its tables are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmserve.engines import MODULES, Failure, get_engine
from pytest_llmserve.launch import container, manager
from pytest_llmserve.launch.log import diagnose

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/engines.md").read_text()
LOGS = [path.read_text() for path in (ROOT / "tests/data/vllm_logs").glob("*.log")]


def failure_rows() -> list[str]:
    """The table of failures, as the page must have it."""
    tables = {name: get_engine(name).failures for name in MODULES}
    tables |= {"any container": container.FAILURES, "any": manager._FAILURES}
    return [
        f"| {where} | {_words(failure, failure.cause)}{_dagger(where, failure)} "
        f"| {_words(failure, failure.mend)} |"
        for where, failures in tables.items()
        for failure in failures
    ]


def _words(failure: Failure, text: str) -> str:
    return text.replace("({what})", "(…)").replace("{what}", "…").replace("|", "\\|")


def _dagger(where: str, failure: Failure) -> str:
    """Marks what a real log of vLLM is diagnosed as."""
    if where != "vllm":
        return ""
    causes = [diagnose(text, get_engine("vllm").failures).cause for text in LOGS]
    pattern = re.escape(failure.cause).replace(re.escape("{what}"), ".*")
    return " †" if any(re.fullmatch(pattern, cause, re.DOTALL) for cause in causes) else ""


def blocks() -> dict[str, str]:
    """Code blocks that begin with the name of a file, by that name."""
    return dict(re.findall(r"```\w+\n# (\S+\.\w+)\n(.*?)```", PAGE, re.DOTALL))


def test_the_table_of_failures_is_that_of_the_code():
    section = PAGE.partition("## Why a start failed")[2]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows == failure_rows()


@pytest.mark.parametrize("name", MODULES)
def test_each_engine_is_in_both_tables_with_its_key_and_its_metrics(name):
    state, dialect = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(state.split(" | ")) == 4
    engine = get_engine(name)
    _, metrics, length, key, _ = (cell.strip(" |") for cell in dialect.split("|")[1:6])
    if engine.api_key:
        assert f"made up, in `{engine.api_key}`" in key
    else:
        assert key.startswith(("none", "yours"))
    if name != "attach":
        assert (engine.metrics_prefix in metrics) if engine.metrics else metrics == "none"
    assert ("ignore_eos" in length) == ("ignore_eos" in engine.body)


# A program with the options of the page's example: behind it is the emulated engine.
PROGRAM = """#!{python}
import os, sys
run, model, listen, address, *rest = sys.argv[1:]
assert (run, listen) == ("run", "--listen"), sys.argv
if rest != ["--max-batch", "8"]:
    sys.exit(f"no option {{rest[0]}}")
assert os.environ["SWIFTSERVE_TELEMETRY"] == "off"
host, _, port = address.partition(":")
print("loading 50 %", flush=True)
os.execv(sys.executable, [sys.executable, "-m", "pytest_llmserve.emulator", "--host", host,
    "--port", port, "--served-model-name", model, "--model", "qwen3-0.6b", "--hardware", "h100",
    "--api-key-env", "SWIFTSERVE_API_KEY"])
"""


@pytest.fixture
def example(project, monkeypatch):
    """The page's example, installed as a package would be, with a program to start."""
    told = blocks()
    assert set(told) == {"swiftserve_engine.py", "pyproject.toml", "servers/swift.yaml"}
    pytester = project(
        """
@pytest.mark.llmserve(server="swift")
def test_it(llm_server, load, slo):
    assert llm_server.engine == "swiftserve"
    assert llm_server.model == "some-model"
    slo.check(load(closed_loop(users=2), **SHORT), at_least("output_throughput", 1))
""",
        {name: told[name] for name in ("swiftserve_engine.py", "servers/swift.yaml")},
    )
    (line,) = re.findall(r'^swiftserve = "(.*)"$', told["pyproject.toml"], re.MULTILINE)
    info = pytester.path / "swiftserve_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: swiftserve-engine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[pytest_llmserve.engines]\nswiftserve = {line}\n")
    program = pytester.path / "bin" / "swiftserve"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{ROOT}")
    return pytester


def test_the_example_runs(example):
    result = example.runpytest_subprocess("--llmserve-engine=swiftserve")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["verdicts: 1 pass"])


def test_the_examples_failure_is_explained(example):
    config = example.path / "servers" / "swift.yaml"
    config.write_text(config.read_text().replace("max-batch", "max-bath"))
    result = example.runpytest_subprocess("--llmserve-engine=swiftserve")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*swift (swiftserve) did not start: it does not know --max-bath; correct it in `args`.*"]
    )


def test_doctor_knows_the_example(example):
    line = [sys.executable, "-m", "pytest_llmserve.cli", "doctor", "--server", "swift"]
    told = subprocess.run(line, capture_output=True, text=True, cwd=example.path, check=False)
    assert f"program: {example.path / 'bin' / 'swiftserve'}" in told.stdout
    assert told.returncode == 0
