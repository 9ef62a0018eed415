"""What README.md and docs/ tell a reader to type exists: sub-commands, options, values, markers,
server configs, files and links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pytest_llmserve import cli
from pytest_llmserve.commands import doctor, plan, report, serve
from pytest_llmserve.config import OPTIONS
from pytest_llmserve.emulator.settings import parse
from pytest_llmserve.engines import MODULES
from pytest_llmserve.profiles import load_profile
from pytest_llmserve.server_files import find_server_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs/examples").iterdir())
FLAGS = {option.flag: option for option in OPTIONS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=names(paths))


def blocks(text, *languages):
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(text):
    return FENCE.sub("", text)


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines(text):
    """Lines of a page that a shell would read, and code spans, as (line, is it whole)."""
    for body in blocks(text, "console"):
        joined = body.replace("\\\n", " ")
        yield from ((line[2:], True) for line in joined.splitlines() if line.startswith("$ "))
    for body in blocks(text, "bash", "sh", "ini", "yaml"):
        joined = body.replace("\\\n", " ")
        yield from ((line.strip(), True) for line in joined.splitlines())
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text)):
        yield span.replace("\\|", "|"), False


def commands(lines):
    """The calls of our programs among shell lines: (words, is it whole)."""
    for line, whole in lines:
        for part in re.split(r"\s(?:&&|\|\||;|\|)\s", line):
            if not re.search(r"\b(pytest|llmserve)(\s|$)", part):
                continue
            words = shlex.split(re.sub(r"^(- )?(run: |ExecStart=)", "", part), comments=True)
            while words and re.match(r"sudo$|\w+=|timeout$|\d+$|\S*python\d*$|-m$", words[0]):
                words.pop(0)
            if words and Path(words[0]).name in ("pytest", "llmserve"):
                words = [word.strip("[]") for word in words if word != "…"]
                yield [Path(words[0]).name, *words[1:]], whole


@pytest.fixture(scope="module")
def known():
    """All long options and all markers of pytest as it runs in this repository."""

    def answer(*words):
        line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    options = set(re.findall(r"--[a-z][a-z-]+", answer("--help"))) | {"--junitxml"}  # not shown
    return options, set(re.findall(r"^@pytest\.mark\.(\w+)", answer("--markers"), re.MULTILINE))


def check_pytest(words, known):
    options, markers = known
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag.startswith("--"):
            assert flag in options, f"pytest has no {flag}"
        if "$" in value:
            continue  # a variable of a script
        if flag == "-m":
            wanted = set(re.findall(r"\w+", value)) - {"and", "or", "not"}
            assert wanted <= markers, f"no markers {wanted - markers}"
        if flag.startswith(("suites/", "tests/")):
            assert (ROOT / flag.partition("::")[0]).exists(), f"no file {flag}"
        option = FLAGS.get(flag)
        if option and option.choices:
            assert set(value.split("|")) <= set(option.choices), f"{flag} takes no {value}"
        if option and re.fullmatch(r"[a-z0-9-]+", value):
            check_name(option.name, value)


def check_name(option, value):
    """A server or profile that is named is there. Placeholders are in capitals."""
    if option in ("server", "profile"):
        path = ROOT / f"suites/{option}s" / f"{value}.yaml"
        assert path.exists() or value in told(f"{option}s"), f"no {option} {value}"


def told(folder):
    """YAML files of a folder that the pages show, by name."""
    text = "\n".join(path.read_text() for path in PAGES)
    found = re.findall(r"^# (?:(\w+)/)?([\w-]+)\.yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return {name: body for where, name, body in found if (where or "servers") == folder}


def check_llmserve(words, whole, monkeypatch):
    """Its own parser takes the words. A mere mention (`llmserve report`) names the sub-command."""
    if len(words) < 2:
        return
    seen = []
    for module, name in (
        (cli, "_compare"),
        (cli, "_calibrate"),
        (plan, "run"),
        (serve, "run"),
        (doctor, "run"),
        (report, "run"),
    ):
        monkeypatch.setattr(module, name, lambda options: seen.append(options) or 0)
    arguments = ["1" if word == "N" else word for word in words[1:]]
    if len(arguments) == 1 and not whole:
        arguments.append("--help")
    assert exit_code(cli.main, arguments) == 0, f"llmserve refuses {' '.join(arguments)}"
    if not seen:  # --help
        return
    (options,) = seen
    rest = [word for word in options.rest if word != "--"]
    assert not rest or exit_code(parse, rest) == 0, f"the emulated engine refuses {rest}"
    if server := getattr(options, "server", None):
        check_name("server", server if re.fullmatch(r"[a-z0-9-]+", server) else "attach")


def exit_code(function, arguments):
    try:
        function(arguments)
    except SystemExit as end:
        return end.code
    return 0


def check(lines, known, monkeypatch):
    for words, whole in commands(lines):
        if words[0] == "pytest":
            check_pytest(words, known)
        else:
            check_llmserve(words, whole, monkeypatch)


@each(PAGES)
def test_commands_of_a_page(path, known, monkeypatch):
    check(shell_lines(path.read_text()), known, monkeypatch)


@each(EXAMPLES)
def test_commands_and_files_of_an_example(path, known, monkeypatch):
    text = path.read_text().replace("\\\n", " ")
    check(((line.strip(), True) for line in text.splitlines()), known, monkeypatch)
    for file in re.findall(r"docs/[\w./-]+\w", text):
        assert (ROOT / file).exists(), f"no file {file}"


def test_the_workflow_is_one():
    workflow = yaml.safe_load((ROOT / "docs/examples/nightly.yml").read_text())
    # `on` is a boolean in YAML 1.1. Pull requests must not reach a machine of one's own.
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}
    (job,) = workflow["jobs"].values()
    assert job["runs-on"][0] == "self-hosted"
    assert all({"run", "uses"} & set(step) for step in job["steps"])


@each(PAGES)
def test_options_markers_and_ini_keys_of_a_page(path, known):
    text = path.read_text()
    unknown = {flag.rstrip("-") for flag in re.findall(r"--llmserve-[a-z-]+", text)} - set(FLAGS)
    assert not unknown, "no such option"
    _, markers = known
    assert set(re.findall(r"@pytest\.mark\.(\w+)", text)) <= markers
    keys = {option.ini for option in OPTIONS} | {"llmserve_server_dirs"} | markers
    assert set(re.findall(r"(?<![\w.])llmserve_[a-z_]*[a-z]\b", text)) <= keys


@each(PAGES)
def test_links_of_a_page_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


@each(PAGES)
def test_scripts_of_a_page_are_there(path):
    for script in re.findall(r"`python (\S+\.py)", path.read_text()):
        assert (ROOT / script).is_file(), f"no {script}"


@pytest.mark.parametrize("name", sorted(told("servers")))
def test_a_server_config_that_is_shown_can_be_read(name, tmp_path, monkeypatch):
    text = told("servers")[name]
    if yaml.safe_load(text)["engine"] not in MODULES:
        pytest.skip("its engine is an example too; test_engine_docs.py runs it")
    for variable in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / f"{name}.yaml").write_text(text)
    assert find_server_config(name, (tmp_path,)).name == name


@pytest.mark.parametrize("name", sorted(told("profiles")))
def test_a_profile_that_is_shown_can_be_read(name, tmp_path):
    (tmp_path / f"{name}.yaml").write_text(told("profiles")[name])
    profile = load_profile(name, (tmp_path, ROOT / "suites/profiles"))
    check_name("server", profile.server)


def test_commands_are_found():
    """Else the tests above would hold of pages that are read wrongly."""
    page = (
        "a `llmserve plan` b\n```console\n$ A=1 pytest -m x \\\n    -q  # c\nout pytest -z\n```\n"
    )
    assert list(commands(shell_lines(page))) == [
        (["pytest", "-m", "x", "-q"], True),
        (["llmserve", "plan"], False),
    ]
    assert len(list(commands(shell_lines((ROOT / "README.md").read_text())))) > 10


@pytest.mark.parametrize(
    "line",
    [
        "pytest --llmserve-no-such",
        "pytest -m no_such_marker",
        "pytest suites/no_such.py",
        "pytest --llmserve-update-baselines=some",
        "pytest --llmserve-server no-such",
        "llmserve no-such",
        "llmserve plan --no-such",
        "llmserve plan --users many",
        "llmserve doctor --server no-such",
        "A=b python -m pytest --no-such",
    ],
)
def test_what_does_not_exist_is_found(line, known, monkeypatch):
    with pytest.raises(AssertionError):
        check([(line, True)], known, monkeypatch)
