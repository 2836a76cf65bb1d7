"""docs/guarantees.md names tests that exist, and every invariant has one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_test_that_the_guarantees_name_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)
    assert len(named) > 20
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{path}::{name}"


def test_every_invariant_has_a_test() -> None:
    sections = re.split(r"\*\*(I\d+)\. ", TEXT)
    invariants = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(invariants) == [f"I{n}" for n in range(1, 12)]
    assert all("::test_" in text for text in invariants.values())
