"""A run that uses none of our fixtures behaves as without the plugin, and pays next to nothing."""

import subprocess
import sys

BODY = """
import pytest

def test_pass(): pass
def test_fail(): assert 1 == 2
@pytest.mark.skip
def test_skip(): pass
@pytest.fixture
def broken(): raise RuntimeError("broken")
def test_error(broken): pass
"""

HEAVY = (
    "numpy",
    "scipy",
    "yaml",
    "jsonschema",
    "httptools",
    "psutil",
    "prometheus_client",
    "msgspec",
)


def _visible(lines):
    """Output lines but for durations and the line that lists plugins."""
    return [line.split(" in ")[0] for line in lines if not line.startswith("plugins:")]


def test_output_and_status_are_the_same(pytester):
    pytester.makepyfile(BODY)
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider -p no:randomly")
    with_plugin = pytester.runpytest_subprocess("-ra")
    without = pytester.runpytest_subprocess("-ra", "-p", "no:llmserve")
    assert _visible(with_plugin.outlines) == _visible(without.outlines)
    assert with_plugin.ret == without.ret == 1


def test_a_disabled_plugin_leaves_nothing(pytester):
    pytester.makepyfile("def test_it(load): pass")
    result = pytester.runpytest_subprocess("-p", "no:llmserve")
    result.stdout.fnmatch_lines(["*fixture 'load' not found*"])
    assert pytester.runpytest_subprocess("-p", "no:llmserve", "--llmserve-strict").ret == 4


def test_nothing_heavy_is_imported():
    code = f"""
import sys
import pytest_llmserve.plugin
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_without_our_tests_makes_no_folder(pytester, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pytester.makepyfile(BODY)
    pytester.runpytest_subprocess()
    assert not list(tmp_path.glob("llmserve-*"))


def test_what_failed_is_run_again(pytester):
    """pytest tells plugins of tests left out even if there are none."""
    pytester.makepyfile("def test_fail(): assert 1 == 2")
    pytester.runpytest_subprocess().assert_outcomes(failed=1)
    again = pytester.runpytest_subprocess("--last-failed")
    again.assert_outcomes(failed=1)
    assert again.ret == 1
