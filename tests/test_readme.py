"""README.md shows what results/demo.json holds, and names files that exist."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_is_what_was_measured():
    measured = json.loads((ROOT / "results/demo.json").read_text())
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", TEXT, re.S)[1]
    for arm, row in measured["arms"].items():
        line = next(line for line in shown.splitlines() if line.startswith(arm))
        validation, test = (float(v) for v in line.split()[-3:-1])
        assert abs(validation - row["validation"][0]) < 0.051
        assert abs(test - row["test"][0]) < 0.051


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
    assert named and not [name for name in named if not (ROOT / name).exists()]
