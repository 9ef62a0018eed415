"""Profiles: what the suites expect of a machine, as files; and the variants of its server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llmserve.errors import ConfigError
from pytest_llmserve.profiles import load_profile
from pytest_llmserve.yaml_files import names

SUITES = Path(__file__).parents[1] / "suites"

PLAIN = """
server: emulator
users: 4
duration: 1
prompt_tokens: 16
output_tokens: 8
bounds: {ttft.p95: 0.5, gain: 3}
variants:
  serial: {args: {max-num-seqs: 1}}
"""


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("name", names([SUITES / "profiles"]))
def test_the_suites_profiles_are_right_and_possible(name):
    profile = load_profile(name, [SUITES / "profiles"])
    assert (SUITES / "servers" / f"{profile.server}.yaml").is_file()
    for variant in profile.variants.values():
        assert variant.server is None or variant.server in names([SUITES / "servers"])


def test_a_profile_extends_another_name_by_name(tmp_path):
    write(tmp_path, "base", PLAIN)
    write(
        tmp_path,
        "mine",
        "extends: base\nusers: 8\nbounds: {gain: 2}\nvariants: {serial: null, b: {server: x}}",
    )
    profile = load_profile("mine", [tmp_path])
    assert (profile.name, profile.users, profile.duration) == ("mine", 8, 1)
    assert profile.bounds == {"ttft.p95": 0.5, "gain": 2}
    assert list(profile.variants) == ["b"]


def test_files_that_a_profile_names_are_seen_from_its_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "base", PLAIN.replace("server: emulator", "server: mine.yaml"))
    write(tmp_path, "mine", "extends: deep/base.yaml\nvariants: {b: {server: ./b.yaml}}")
    profile = load_profile(str(tmp_path / "mine.yaml"), [])
    assert profile.server == str(tmp_path / "deep" / "mine.yaml")
    assert profile.variants["b"].server == str(tmp_path / "b.yaml")
    assert profile.variants["serial"].server is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("users: 4", "the key 'server' is missing"),
        (PLAIN.replace("users: 4", "users: 0"), "users"),
        (PLAIN.replace("users: 4", "user: 4"), "did you mean 'users'"),
        ("extends: mine", "break the circle"),
        ("extends: other", "There is no profile that"),
        (PLAIN + "hardware: abacus\nmodel: qwen3-8b", "hardware 'abacus' is not known"),
        (PLAIN.replace("gain: 3", "gain: high"), "bounds.gain"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_mend(tmp_path, text, words):
    write(tmp_path, "mine", text)
    with pytest.raises(ConfigError, match=words) as told:
        load_profile("mine", [tmp_path])
    assert "mine.yaml" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_bound_that_is_not_there_names_the_file(tmp_path):
    write(tmp_path, "mine", PLAIN)
    with pytest.raises(ConfigError, match=r"mine\.yaml: bounds: there is no 'tpot\.p50'"):
        load_profile("mine", [tmp_path]).bound("tpot.p50")


def test_a_bound_that_physics_forbids_is_refused_with_the_arithmetic(tmp_path):
    """30 users on a Spark can have no more than bandwidth feeds, whatever is wished for."""
    text = PLAIN + "hardware: dgx-spark\nmodel: qwen3-8b\nweights: nvfp4\nkv: fp8\n"
    write(tmp_path, "mine", text.replace("gain: 3", "output_throughput: 5000"))
    with pytest.raises(ConfigError, match=r"bounds: output_throughput >= 5,000") as told:
        load_profile("mine", [tmp_path])
    assert "273 GB/s" in str(told.value)


TEST = """
    import pytest
    from pytest_llmserve import factories

    serial = factories.llm_server(variant="serial")
    other = factories.llm_server(variant="other")

    def test_profile(llm_profile, llm_server):
        assert llm_profile.users == 4
        assert llm_server.config.args == {}

    def test_serial(llm_profile, serial):
        assert serial.effective["max_num_seqs"] == 1
        assert serial.config.name == "emulator-serial"

    def test_other(other):
        raise AssertionError("never reached")
"""


@pytest.fixture
def project(pytester):
    folder = pytester.path
    (folder / "profiles").mkdir()
    (folder / "servers").mkdir()
    write(folder / "profiles", "mine", PLAIN)
    write(folder / "servers", "emulator", "engine: emulator\nmodel: Qwen3-8B\ngpus: 0")
    pytester.makepyfile(TEST)
    return pytester


def test_a_profile_chooses_the_server_and_its_variants(project):
    result = project.runpytest_subprocess("--llmserve-profile=mine", "-rs")
    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(["*needs the variant 'other' of a server, and profile mine*"])


def test_an_endpoint_has_no_variants(project):
    result = project.runpytest_subprocess(
        "--llmserve-profile=mine", "--llmserve-endpoint=http://127.0.0.1:9", "-rs", "-k", "serial"
    )
    result.assert_outcomes(skipped=1)


def test_a_bad_profile_is_a_usage_error_before_anything_starts(project):
    write(project.path / "profiles", "mine", PLAIN.replace("users", "usrs"))
    result = project.runpytest_subprocess("--llmserve-profile=mine")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*profiles/mine.yaml: there is no key 'usrs'*"])


def test_without_a_profile_the_fixture_says_how_to_get_one(project):
    result = project.runpytest_subprocess("-k", "test_profile")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*add --llmserve-profile NAME|FILE*"])
