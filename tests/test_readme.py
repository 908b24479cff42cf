"""README.md shows what results/*.json hold, and names files that exist."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import judges  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_is_what_was_measured():
    measured = json.loads((ROOT / "results/demo.json").read_text())
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", TEXT, re.S)[1]
    for arm, row in measured["arms"].items():
        line = next(line for line in shown.splitlines() if line.startswith(arm))
        validation, test, seconds = (float(v) for v in line.split()[-3:])
        assert abs(validation - row["validation"][0]) < 0.051
        assert abs(test - row["test"][0]) < 0.051
        assert abs(seconds - row["seconds"][0]) < 0.51


def test_the_table_over_seeds_is_what_was_measured():
    measured = json.loads((ROOT / "results/demo.json").read_text())
    assert len(measured["seeds"]) == 3
    for arm, row in measured["arms"].items():
        line = next(line for line in TEXT.splitlines() if line.startswith(f"| {arm} |"))
        mean, spread = re.search(r"([\d.]+) ± ([\d.]+)", line).groups()
        assert abs(float(mean) - row["mean"]) < 0.051 and abs(float(spread) - row["spread"]) < 0.051


def test_every_file_and_picture_it_names_exists():
    named = set(re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT))
    named |= set(re.findall(r"(?:python|bash) ((?:benchmarks/)?[a-z_0-9]+\.py)", TEXT))
    named |= set(re.findall(r"settings/[a-z0-9-]+\.json", TEXT))
    assert named and not [name for name in named if not (ROOT / name).exists()]


# ------------------------------------------------------------------------- claims and numbers


def test_verdicts_follow_from_the_files_of_results():
    rows = json.loads((ROOT / "results/claims.json").read_text())
    assert rows == {
        claim.name: json.loads(json.dumps(claims.judge(claim))) for claim in claims.CLAIMS
    }
    shown = claims.README.search(TEXT)[0].splitlines()[1:-1]
    assert shown == list(claims.table(rows))


def test_a_row_repeats_the_command_that_made_its_file():
    for claim in claims.CLAIMS:
        if claim.file and (ROOT / "results" / claim.file).exists():
            content = json.loads((ROOT / "results" / claim.file).read_text())
            if "command" not in content:  # a file of cells, each with its own
                continue
            made, repeats = (
                words[next(i for i, w in enumerate(words) if w.startswith(("bench", "-m"))) :]
                for words in (shlex.split(content["command"]), shlex.split(claim.command))
            )
            assert made[0] == repeats[0] and set(made) == set(repeats), claim.name


def an_arm(mean, spread=0.5, seeds=3):
    return {"mean": float(mean), "spread": spread, "test": [float(mean)] * seeds}


def test_a_verdict_can_be_other_than_it_is():
    """The judge of the first row, with pretraining that did nothing, half and all of it."""
    arms = {"S4-scratch": an_arm(80), "Transformer-scratch": an_arm(70)}
    for mean, verdict in ((70, judges.NOT), (75, judges.PART), (79, judges.HOLDS)):
        arms["Transformer-masked"] = an_arm(mean)
        assert judges.gap_closes({"arms": arms})[1] == verdict


def test_a_difference_within_the_noise_is_none():
    assert judges.differs(an_arm(80.01, 5.0), an_arm(80.0, 5.0)) == 0
    assert judges.differs(an_arm(81, 0.5), an_arm(80, 0.5)) == 1  # 2.4 standard errors
    assert judges.differs(an_arm(80, 0.5), an_arm(81, 0.5)) == -1
    assert judges.differs(an_arm(81, 0.7), an_arm(80, 0.7)) == 0  # 1.7
    assert judges.differs(an_arm(90, None, 1), an_arm(10)) == 0  # one seed tells nothing


def test_tests_that_did_not_run_prove_nothing():
    for passed, failed, code, verdict in (
        (3, 0, 0, judges.HOLDS),
        (0, 0, 0, judges.NOT),
        (3, 1, 1, judges.NOT),
        (3, 0, 2, judges.NOT),
    ):
        content = {"passed": passed, "failed": failed, "returncode": code}
        assert judges.tests_pass(content)[1] == verdict


def numbers(content):
    """Every number in a file of results."""
    if isinstance(content, dict):
        for value in content.values():
            yield from numbers(value)
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value)
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        yield float(content)


def sections():
    """(title, prose without code, links and numbers of papers, files of results it names)."""
    for part in re.split(r"^## ", TEXT, flags=re.M):
        files = sorted(set(re.findall(r"results/(\w+\.json)", part)))
        prose = re.sub(r"<!-- claims -->.*?<!-- /claims -->", "", part, flags=re.S)
        prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}", "", prose, flags=re.S)
        prose = re.sub(r"\d{4}-\d\d-\d\d|torch \d+\.\d+\.\d+", "", prose)
        yield part.splitlines()[0], prose, files


# Numbers of papers, and what is set and not measured.
GIVEN = {"53.6", "86.2", "86.1", "86.8", "40 times", "60 times"}
UNITS = "%|times|ms|s|MiB|GiB|MB|GB|points"
DECIMAL = r"\d+\.\d+(?:e-?\d+)?"


def shown_numbers(prose):
    """Numbers with a point, whole numbers before a unit, and those in the cells of tables."""
    yield from re.findall(rf"(?<![\w.]){DECIMAL}(?![\w.]*\d)", prose)
    yield from re.findall(rf"(?<![\w.,-])\d+ (?:{UNITS})(?!\w)", prose)
    for table in re.findall(r"(?:^\|.*\n)+", prose, re.M):
        for line in table.splitlines()[2:]:
            for cell in line.split("|")[2:-1]:
                yield from re.findall(r"(?<![\w.,-])\d+(?![\w.,]*\d)", cell)


def is_known(shown, known):
    """One of the known numbers, perhaps in other units, rounds to what is shown."""
    text = re.match(rf"{DECIMAL}|\d+", shown)[0]
    digits = len(text.split("e")[0].partition(".")[2])
    unit = 10.0 ** int(text.partition("e")[2] or 0)
    factors = (1, 100, 1e3, 1e-3, 1e-6, 1e-9, 2**-20, 2**-30)
    return any(
        abs(k * f - float(text)) <= 0.501 * 10**-digits * unit for k in known for f in factors
    )


@pytest.mark.parametrize("title, prose, files", list(sections()))
def test_every_number_is_in_a_file_that_the_section_names(title, prose, files):
    known = []
    for name in files:
        content = json.loads((ROOT / "results" / name).read_text())
        assert "command" in json.dumps(content) and "commit" in json.dumps(content), name
        known += numbers(content)
    missing = sorted(n for n in set(shown_numbers(prose)) - GIVEN if not is_known(n, known))
    assert not missing, f"{title}: {missing} in none of {files}"


def test_a_number_that_nobody_measured_is_found():
    text = "1.5 of 2.5, 7 %, 3.0e-5 and\n| a | b |\n|---|---|\n| 8 | 9 ms |\n"
    assert sorted(shown_numbers(text)) == ["1.5", "2.5", "3.0e-5", "7 %", "9", "9 ms"]
    assert is_known("0.72 s", [0.7151, 3]) and is_known("2.1e-6", [2.06e-6])
    assert not is_known("0.73", [0.7151, 3]) and not is_known("2.1e-6", [2.2e-6])
