"""README.md and RESULTS.md say what results/*.json hold, and name files and flags that exist."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from settings import Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import judges  # noqa: E402
import measured  # noqa: E402
import results_page  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "results").glob("*.json"))


# ---------------------------------------------------------------- README.md


def test_the_front_page_is_short():
    assert len(README.encode()) <= 10_000


def test_the_file_table_counts_the_lines():
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| ([\d,]+) \|", README, re.M)
    listed = {name: int(lines.replace(",", "")) for name, lines in rows}
    counted = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("*.py")}
    assert listed == counted, "python benchmarks/results_page.py updates it"


def test_the_measured_numbers_of_the_front_page_are_those_of_the_results():
    block = re.search(r"\n\n```\n(.*?)```", README, re.S)[1]
    assert block.rstrip().splitlines() == list(results_page.demo_screen())
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|^\|.*\|$", "", README, flags=re.S | re.M)
    prose = prose[: prose.index("## Citations")].replace("\n", " ")
    for text in results_page.front_page_numbers():
        assert text in README.replace("\n", " ")
        prose = prose.replace(text, "")
    decimals = re.findall(r"\d+\.\d+(?!\d*\))", prose)
    assert decimals == [], "a number of the front page that no test compares"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_a_snippet_runs_and_has_at_most_ten_lines(snippet):
    assert len(snippet.strip().splitlines()) <= 10
    torch.manual_seed(0)
    exec(snippet, {})


def test_links_and_commands_name_files_and_every_picture_is_linked():
    linked = set(re.findall(r"\]\(((?!http)[^)#]+)\)", README + RESULTS))
    scripts = re.findall(r"(?:python|bash) ((?:benchmarks/)?[a-z_0-9]+\.py)", README + RESULTS)
    assert [name for name in {*linked, *scripts} if not (ROOT / name).exists()] == []
    pictures = {f"results/{path.name}" for path in (ROOT / "results").glob("*.png")}
    assert pictures <= linked


# ---------------------------------------------------------------- RESULTS.md and results/


def test_the_results_page_is_what_the_files_say():
    assert RESULTS == results_page.page(), "python benchmarks/results_page.py writes it"


def origins(content):
    """Every record of origin in a results file."""
    if isinstance(content, dict):
        if "commit" in content:
            yield content
        content = [*content.values()]
    if isinstance(content, list):
        for value in content:
            yield from origins(value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_results_file_names_its_command_and_commit(path):
    found = list(origins(json.loads(path.read_text(encoding="utf-8"))))
    assert any("command" in origin for origin in found)
    for origin in found:
        assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", origin["commit"] or ""), origin["commit"]
        if "command" in origin:
            assert origin.get("hardware") or origin.get("cpu")


def commands():
    """Every command of the front page, of a results file or of a row of the table."""
    yield from re.findall(r"^((?:python|torchrun) .*?)(?:  +#.*)?$", README, re.M)
    yield from re.findall(r"`((?:python|torchrun) [^`]*)`", README)
    for path in FILES:
        for origin in origins(json.loads(path.read_text(encoding="utf-8"))):
            yield origin.get("command", "")
    yield from map(claims.command_of, claims.CLAIMS)


def flags_of(script):
    """The flags in a script's source; those of pretrain.py are the fields of Config."""
    source = (ROOT / script).read_text(encoding="utf-8")
    flags = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source))
    if script == "pretrain.py":
        flags |= {"--" + field.name.replace("_", "-") for field in fields(Config)}
        flags |= {"--settings", "--print-config", "--check"}
    return flags


def test_a_command_names_a_script_and_flags_that_exist():
    seen = 0
    for command in commands():
        script = re.search(r"(?:benchmarks/)?[a-z_0-9]+\.py", command)
        if script and "pytest" not in command:
            options = re.sub(r"'.*?'", "", command[script.end() :])  # without arms of compare.py
            flags = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", options))
            assert flags <= flags_of(script[0]), command
            seen += len(flags)
    assert seen > 100


def test_runs_that_a_results_file_has_are_not_measured_again(tmp_path):
    ran = []

    def measure(arm, seed):
        ran.append((arm, seed))
        return {"loss": 10 * seed}

    path = tmp_path / "new" / "x.json"
    keys = [{"arm": "a", "seed": 1}, {"arm": "a", "seed": 2}, {"arm": "b", "seed": 1}]
    measured.complete(path, keys[:1], measure, {})
    result = measured.complete(path, keys, measure, {"L": 4})
    assert ran == [("a", 1), ("a", 2), ("b", 1)] and result["L"] == 4
    assert [run["loss"] for run in measured.select(result["runs"], arm="a")] == [10, 20]
    assert all(run["commit"] == result["commit"] for run in result["runs"])
    assert measured.load(path) == result and list(path.parent.iterdir()) == [path]
    two = {"runs": [{"arm": "a", "seed": 1, "steps": 2}]}
    measured.save(tmp_path / "steps.json", two)
    with pytest.raises(SystemExit, match=r"with \[2\] steps: move it away"):
        measured.complete(tmp_path / "steps.json", [{"arm": "a", "seed": 1, "steps": 3}], None, {})
    assert measured.load(tmp_path / "steps.json") == two
    assert measured.series(result["runs"], "seed", "loss") == ([1, 1, 2], [10, 10, 20])
    assert measured.series([{"x": 1}, {"x": 2, "y": 0}], "x", "y") == ([2], [0])


# ---------------------------------------------------------------- claims


def test_a_row_repeats_the_command_that_made_its_file():
    for claim in claims.CLAIMS:
        content = claim.content()
        if claim.command and "command" in content:  # else a file of cells, each with its own
            made = shlex.split(content["command"])
            assert sorted(made) == sorted(measured.essential(shlex.split(claim.command)))


def test_a_row_is_measured_only_when_asked_and_a_failed_command_keeps_the_old_file(
    capsys, monkeypatch, tmp_path
):
    ran = []

    def run(words, cwd, **options):
        assert cwd == tmp_path and not row.path.exists()
        ran.append(words[1:])
        if "x.py" in words:
            raise RuntimeError
        if "pytest" not in words:
            row.path.write_text('{"passed": 9, "failed": 0}')
        return subprocess.CompletedProcess(words, 0, stdout="7 passed, 2 skipped in 3 s")

    def row_of(command):
        return claims.Claim("x", "", "", "", "x.json", judges.tests_pass, command=command)

    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "provenance", dict)
    monkeypatch.setattr(claims.subprocess, "run", run)
    (tmp_path / "results").mkdir()
    row = row_of("")
    with pytest.raises(SystemExit, match=r"results/x.json, which names its command, is missing"):
        claims.update(row, anew=False)
    old = {"passed": 1, "failed": 2, "command": "python x.py", "date": "2026-11-01"}
    row.path.write_text(json.dumps(old))
    claims.update(row, anew=False)
    assert "nothing was run; results/x.json is of 2026-11-01" in capsys.readouterr().out
    assert not ran
    with pytest.raises(RuntimeError):
        claims.update(row, anew=True)
    assert row.content() == old
    row = row_of("torchrun y.py")
    claims.update(row, anew=True)
    shown = capsys.readouterr().out
    assert "before: does not hold here: 1 tests pass" in shown and "9 tests pass" in shown
    row.path.unlink()
    row = row_of("python -m pytest z.py")
    claims.update(row, anew=False)
    counts = {"passed": 7, "failed": 0, "skipped": 2, "returncode": 0, "seconds": 0}
    assert {"command": row.command, **counts}.items() <= row.content().items()
    assert ran == [["x.py"], ["-m", "torch.distributed.run", "y.py"], ["-m", "pytest", "z.py"]]


def test_verdicts_by_hand():
    """A difference counts beyond two standard errors; tests that did not run prove nothing."""

    def an_arm(mean, spread=0.5, seeds=3):
        return {"mean": float(mean), "spread": spread, "test": [float(mean)] * seeds}

    for after, verdict in [(70, judges.NOT), (75, judges.PART), (79, judges.HOLDS)]:
        arms = {"S4-scratch": an_arm(80), "Transformer-scratch": an_arm(70)}
        arms["Transformer-masked"] = an_arm(after)
        assert judges.lattice_gap({"arms": arms})[1] == verdict
    arms = {"S4-scratch": an_arm(80), "diagonal-scratch": an_arm(70)}
    for after, verdict in [(81, judges.PART), (84, judges.HOLDS)]:  # 4 or 1 of 10 points are left
        arms |= {"S4-masked": an_arm(85), "diagonal-masked": an_arm(after)}
        assert judges.redundant({"arms": arms})[1] == verdict
    arms = {"0 %": an_arm(70), "25 %": an_arm(75), "50 %": an_arm(80)}
    assert judges.modest_share({"arms": arms})[1] == judges.PART  # a half of the best gain
    assert judges.differs(an_arm(81, 0.5), an_arm(80, 0.5)) == 1  # 2.4 standard errors
    assert judges.differs(an_arm(80, 0.5), an_arm(81, 0.5)) == -1
    assert judges.differs(an_arm(81, 0.7), an_arm(80, 0.7)) == 0  # 1.7
    assert judges.differs(an_arm(90, None, 1), an_arm(10)) == 0  # one seed tells nothing
    done = {"passed": 3, "failed": 0, "returncode": 0}
    assert judges.tests_pass(done)[1] == judges.HOLDS
    for fault in ({"passed": 0}, {"failed": 1}, {"returncode": 2}):
        assert judges.tests_pass(done | fault)[1] == judges.NOT
