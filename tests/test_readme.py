"""README.md shows what results/*.json hold, and names files and flags that exist."""

import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims  # noqa: E402
import judges  # noqa: E402
import measured  # noqa: E402
import readme  # noqa: E402

from settings import Config  # noqa: E402

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "results").glob("*.json"))

# ------------------------------------------------------------------------------------ numbers


def test_every_block_is_what_its_files_say():
    assert TEXT == readme.written(TEXT), "python benchmarks/readme.py writes it"
    assert {match[1] for match in readme.BLOCK.finditer(TEXT)} == readme.BLOCKS.keys()


def test_a_digit_that_is_changed_is_found():
    for number in ("86.2", "1,048,576", "2.6"):  # a decimal, a whole number, one in a table
        match = next(m for m in readme.BLOCK.finditer(TEXT) if number in m[2])
        false = TEXT.replace(match[0], match[0].replace(number, number[:-1] + "9"))
        assert false != TEXT and readme.written(false) == TEXT
    with pytest.raises(ValueError, match="no function makes"):
        readme.written("<!-- other -->\n5\n<!-- /other -->")


# What stands outside of the blocks: sizes that commands set, and numbers of papers.
GIVEN = {
    "8 x 8": "the pictures of lattice", "4,000": "its training examples",
    "1000": "tokens of the example", "7 x 7": "the convolution that SGConv2d replaces",
    "96": "that convolution", "7": "that convolution", "3": "that convolution",
    "100,000": "trees of ListOps", "131,072": "tokens of the default run", "40": "the paper's",
    "4090": "a GPU", "1024": "a layer", "4096": "a layer", "1": "all that can be gained",
    "2.11": "torch", "-9": "a signal",
}  # fmt: skip


def outside():
    """The text without blocks, code but for its comments, links, papers, names with digits."""
    text = readme.BLOCK.sub("", TEXT)
    text = re.sub(r"\d{4}\.\d{5}", "", text)
    text = text[: text.index("## Citations")]
    fence = re.compile(r"```\w*\n(.*?)```", re.S)
    text = fence.sub(lambda m: "\n".join(re.findall(r"#(.*)", m[1])), text)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return re.sub(r"[A-Za-z]+-?\d+\w*|\d-[DX]", "", text)  # S4, H100, Pathfinder-32, float64


def test_no_other_number_stands_in_the_text():
    found = re.findall(r"-?\d[\d.,]*(?: x \d+)?(?<![.,])", outside())
    assert len(found) > 8 and set(found) <= GIVEN.keys(), set(found) - GIVEN.keys()
    words = "four|three|two|half|quarter|tenth|twice"
    counted = [w for w in re.findall(rf"\b(?:{words})\b [a-z-]+", outside(), re.I)]
    assert set(counted) <= {
        "four models", "four runs", "three files", "two it", "three steps", "two standard",
        "two classes", "four RTX", "half plane", "four sizes",
    }, counted  # fmt: skip


def origins(content):
    """Every record of origin in a file of results."""
    if isinstance(content, dict):
        if "commit" in content:
            yield content
        for value in content.values():
            yield from origins(value)
    elif isinstance(content, list):
        for value in content:
            yield from origins(value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_file_of_results_names_its_command_and_commit(path):
    content = json.loads(path.read_text())
    found = list(origins(content))
    assert found and any("command" in origin for origin in found)
    for origin in found:
        assert re.fullmatch(r"[0-9a-f]{7,40}", origin["commit"] or ""), origin["commit"]
        assert "command" not in origin or (origin.get("hardware") or origin.get("cpu"))
    for row in content.get("arms", {}).values() if "command" in content else ():
        assert all(re.fullmatch(r"[0-9a-f]{7,40}", commit) for commit in row.get("commits", []))


# ----------------------------------------------------------------------- files, flags, claims


def test_every_file_and_picture_it_names_exists():
    named = set(re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT))
    named |= set(re.findall(r"(?:python|bash) ((?:benchmarks/)?[a-z_0-9]+\.py)", TEXT))
    named |= {name for name in re.findall(r"settings/[a-z0-9-]+\.json", TEXT)}
    assert named and not [name for name in named if not (ROOT / name).exists()]


def flags_of(script):
    """The flags a script names in its source; those of pretrain.py are the fields of Config."""
    if script == "pretrain.py":
        return {"--" + f.name.replace("_", "-") for f in fields(Config)} | {
            "--settings", "--print-config", "--check",
        }  # fmt: skip
    return set(re.findall(r'"(--[a-z][a-z-]*)"', (ROOT / script).read_text()))


def test_every_flag_it_shows_exists():
    """Commands of code blocks and of `inline code`, but for the options of torchrun itself."""
    commands = re.findall(r"^((?:python|torchrun) .*?)(?:  +#.*)?$", TEXT, re.M)
    commands += [" ".join(c.split()) for c in re.findall(r"`((?:python|torchrun) [^`]*)`", TEXT)]
    seen = 0
    for command in commands:
        if scripts := re.findall(r"(?:benchmarks/)?[a-z_0-9]+\.py", command):
            flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", command.partition(scripts[0])[2]))
            assert flags <= flags_of(scripts[0]), (command, flags)
            seen += len(flags)
    assert seen > 30


def test_verdicts_follow_from_the_files_of_results():
    rows = json.loads((ROOT / "results/claims.json").read_text())
    assert rows == {
        claim.name: json.loads(json.dumps(claims.judge(claim))) for claim in claims.CLAIMS
    }


def test_a_row_repeats_the_command_that_made_its_file():
    for claim in claims.CLAIMS:
        if claim.file and (ROOT / "results" / claim.file).exists():
            content = json.loads((ROOT / "results" / claim.file).read_text())
            if "command" not in content:  # a file of cells, each with its own
                continue
            made, repeats = (
                words[next(i for i, w in enumerate(words) if w.startswith(("bench", "-m"))) :]
                for words in map(shlex.split, (content["command"], claim.command))
            )
            assert sorted(made) == sorted(measured.essential(repeats)), claim.name


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
