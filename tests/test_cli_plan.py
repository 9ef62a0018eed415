"""`llmserve plan` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_llmserve import cli
from pytest_llmserve.report import plan as report

ROOT = Path(__file__).parent.parent
QUICK = ("--output-tokens", "16", "--users", "8")


def planned(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_a_plan_for_people(capsys, form: str) -> None:
    status, out, err = planned(capsys, *QUICK, "--format", form, "--slo", "tpot.p95<=0.03",
                               "output_throughput>=200")  # fmt: skip
    assert (status, err) == (0, "")
    assert out.startswith("**COMPUTED, not measured**" if form == "markdown" else "COMPUTED")
    for part in ("2 × 36 layers × 8 KV heads × 128 × 1 B", "Bandwidth binds", "a second NVIDIA",
                 "Users within tpot.p95 <= 0.03 and output_throughput >= 200: ",
                 "Nothing here was measured."):  # fmt: skip
        assert part in out
    if form == "markdown":
        table = [line for line in out.splitlines() if line.startswith("|")]
        assert all(line.endswith("|") for line in table)


def test_a_plan_for_programs(capsys) -> None:
    status, out, _ = planned(capsys, *QUICK, "--format", "json", "--weights", "bf16")
    assert status == 0
    found = json.loads(out)
    assert (found["schema"], found["computed"], found["measured"]) == (
        "llmserve-plan/1", True, False,
    )  # fmt: skip
    lines = {line["name"]: line for line in found["arithmetic"]}
    assert lines["bandwidth_time"]["value"] == pytest.approx(lines["step_bytes"]["value"] / 273e9)
    assert found["expected"]["output_throughput"] < lines["ceiling"]["value"]
    assert found["binds"]["what"] == "bandwidth"
    assert found["users_within"]["most"] == lines["users_that_fit"]["value"]
    assert [lift["change"] for lift in found["lifts"]][:2] == ["fp8 weights", "nvfp4 weights"]
    assert 8 in [point["users"] for point in found["curve"]]


def test_one_token_answers_have_no_time_per_token(capsys) -> None:
    _, out, _ = planned(capsys, "--output-tokens", "1", "--users", "2", "--format", "json")
    assert json.loads(out)["expected"]["tpot.p50"] is None


def test_the_model_that_does_not_exist_is_taken_as_the_nearest(capsys) -> None:
    status, out, err = planned(capsys, *QUICK, "--model", "Qwen3 7B")
    assert status == 0
    assert "There is no Qwen3 7B; taken as Qwen3-8B." in err
    assert out.startswith("COMPUTED, not measured: qwen3-8b ")


def test_two_devices(capsys) -> None:
    _, out, _ = planned(capsys, *QUICK, "--devices", "2", "--num-speculative-tokens", "2")
    assert "2 × NVIDIA DGX Spark (GB10), 2 tokens speculated" in out
    assert "a second" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware", "dgx-sprak"], "hardware 'dgx-sprak' is not known: use one of"),
        (["--model", "gpt-9"], "model 'gpt-9' is not known: use one of"),
        (["--weights", "fp3"], "weights 'fp3': use one of bf16"),
        (["--slo", "ttft"], "--slo 'ttft': write METRIC<=NUMBER"),
        (["--users", "0"], "--users 0: a plan is for 1 to"),
        (["--output-tokens", "0"], "--output-tokens 0: it must be a whole number from 1 up"),
        (["--acceptance", "2"], "--acceptance 2.0: it must be from 0 to 1"),
        (["--bandwidth-efficiency", "0"], "--bandwidth-efficiency 0.0: it must be above 0"),
        (["--devices", "2", "--hardware", "cpu"], "has no link to others"),
        (["--hardware", "l4", "--model", "qwen3-32b", "--weights", "bf16"], "larger --hardware"),
        (["--plot", "plan.pdf"], "name a file that ends in .svg or .png"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments: list[str], said: str) -> None:
    status, out, err = planned(capsys, *QUICK, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_option_that_does_not_exist(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--user", "3", "--nonsense"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_a_plot(capsys, tmp_path: Path, name: str) -> None:
    pytest.importorskip("vl_convert")
    path = tmp_path / name
    status, _, _ = planned(capsys, *QUICK, "--plot", str(path), "--slo", "ttft.p95<=0.5")
    assert status == 0
    content = path.read_bytes()
    if name.endswith(".png"):
        assert content.startswith(b"\x89PNG")
    else:
        for part in (report.COMPUTED, "output tokens/s", "TTFT p95, s", "expected"):
            assert part in content.decode()


def test_a_plot_where_it_cannot_be_written(capsys, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    status, _, err = planned(capsys, *QUICK, "--plot", str(tmp_path / "none" / "plan.svg"))
    assert status == 2
    assert "cannot be written (No such file or directory)" in err


def test_a_plot_without_the_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "vl_convert.py").write_text("raise ImportError('not here')\n")
    code = "import sys; from pytest_llmserve.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *QUICK, "--plot", "plan.svg"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'pytest-llmserve[report]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
