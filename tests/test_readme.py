"""README.md shows what results/*.json hold, and names files that exist."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402

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


def test_a_verdict_can_be_other_than_it_is():
    """The judge of the first row, with pretraining that did nothing, half and all of it."""
    arms = {name: {"mean": 80.0, "spread": 0.5} for name in ("S4-scratch", "Transformer-scratch")}
    arms["Transformer-scratch"]["mean"] = 70.0
    for mean, verdict in ((70, claims.NOT), (75, claims.PART), (79, claims.HOLDS)):
        arms["Transformer-masked"] = {"mean": float(mean), "spread": 0.5}
        assert claims.gap_closes({"arms": arms})[1] == verdict


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
GIVEN = {"53.6", "86.2", "86.1", "86.8"}


@pytest.mark.parametrize("title, prose, files", sections(), ids=[s[0][:30] for s in sections()])
def test_every_number_is_in_a_file_that_the_section_names(title, prose, files):
    """A number with a point, as shown, is one of the file's, perhaps in other units, rounded."""
    known = []
    for name in files:
        content = json.loads((ROOT / "results" / name).read_text())
        assert "command" in json.dumps(content) and "commit" in json.dumps(content), name
        known += numbers(content)
    missing = []
    for shown in set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", prose)) - GIVEN:
        digits = len(shown.split(".")[1])
        units = (1, 100, 1e3, 1e-3, 2**-20, 2**-30)
        if not any(abs(k * u - float(shown)) <= 0.501 * 10**-digits for k in known for u in units):
            missing.append(shown)
    assert not missing, f"{title}: {missing} in none of {files}"
