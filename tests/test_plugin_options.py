"""Options, ini twins and markers: registered, checked, and refused with one clear sentence."""

import pytest

from pytest_llmserve.config import OPTIONS


def test_help_and_markers_are_listed(pytester):
    shown = pytester.runpytest("--help").stdout.str()
    for option in OPTIONS:
        assert option.flag in shown
        assert option.ini in shown
    pytester.runpytest("--markers").stdout.fnmatch_lines(
        ["@pytest.mark.llmserve(*", "@pytest.mark.capstone*"]
    )


def test_the_command_line_wins_over_the_ini_file(pytester):
    pytester.makeini("[pytest]\nllmserve_baselines = from_ini\nllmserve_strict = true")
    pytester.makeconftest(
        """
        from pytest_llmserve.config import read_settings
        def pytest_configure(config):
            settings = read_settings(config)
            print("SEEN", settings.baselines.name, settings.strict, settings.engine)
        """
    )
    assert "SEEN from_ini True auto" in pytester.runpytest("-s").stdout.str()
    result = pytester.runpytest("-s", "--llmserve-baselines=here", "--llmserve-engine=emulator")
    assert "SEEN here True emulator" in result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--llmserve-endpoint=localhost:8000"], "*--llmserve-endpoint 'localhost:8000'*http://*"),
        (["--llmserve-endpoint=http://me:secret@h:1"], "*no user or password in the URL*"),
        (["--llmserve-json=no/such/folder/x.json"], "*--llmserve-json*does not exist; make it*"),
        (["--llmserve-json=."], "*--llmserve-json*is a folder; name a file*"),
        (
            ["--llmserve-baselines=test_options.py"],
            "*--llmserve-baselines*is a file; name a folder*",
        ),
        (["--llmserve-endpoint=http://h:1", "--llmserve-engine=emulator"], "*exclude each other*"),
        (["--llmserve-update-baselines=some"], "*invalid choice: 'some'*"),
    ],
)
def test_a_bad_option_is_a_usage_error(pytester, arguments, sentence):
    pytester.makepyfile(test_options="def test_it(): pass")
    result = pytester.runpytest(*arguments)
    assert result.ret == 4
    result.stderr.fnmatch_lines([sentence])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()
    assert "secret" not in result.stderr.str() + result.stdout.str()


def test_a_bad_ini_value_is_a_usage_error(pytester):
    pytester.makeini("[pytest]\nllmserve_update_baselines = sometimes")
    result = pytester.runpytest()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*llmserve_update_baselines = 'sometimes'*none, new or all*"])


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("'qwen'", "*takes keywords only, such as server='qwen'*"),
        ("severs='x'", "*no argument 'severs'*"),
        ("server=3", "*server=3 must be str*"),
        ("engine='emulator', args=[1]", "*args=[[]1] must be dict*"),
        ("engine='vlm'", "*'vlm'*vllm*"),
        ("server='no-such'", "*no-such*"),
        ("server='x', engine='vllm'", "*drop engine=*"),
        ("args={}", "*args= needs server= or engine=*"),
        ("engine='emulator', emulation={'hardwear': 'x'}", "*emulation has no 'hardwear'*"),
        ("engine='vllm', model='x'", "*cannot run (no NVIDIA GPU here)*"),
    ],
)
@pytest.mark.parametrize("xdist", [False, True])
def test_a_bad_marker_stops_the_run_or_fails_the_test(pytester, marker, sentence, xdist):
    if xdist:
        pytest.importorskip("xdist")
    pytester.makepyfile(
        f"""
        import pytest
        @pytest.mark.llmserve({marker})
        def test_it(llm_server): assert False, "must not run"
        """
    )
    result = pytester.runpytest(*(["-n1"] if xdist else []))
    shown = result.stdout if xdist else result.stderr
    shown.fnmatch_lines([sentence])
    assert result.ret == (1 if xdist else 4)
    assert "Traceback" not in result.stderr.str() + result.stdout.str()
    assert "must not run" not in result.stdout.str()


def test_capstone_takes_no_arguments(pytester):
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.capstone(users=30)
        def test_it(llm_server): pass
        """
    )
    result = pytester.runpytest()
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*@pytest.mark.capstone takes no arguments*"])


def test_the_option_wins_over_the_marker(pytester):
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.llmserve(server="no-such")
        def test_it(llm_server): pass
        """
    )
    result = pytester.runpytest("--llmserve-server=other")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*other*"])
    assert "no-such" not in result.stderr.str()
