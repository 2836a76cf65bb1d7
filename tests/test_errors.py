"""The tree of errors is as drawn, speaks one clear sentence and crosses process borders whole."""

import builtins
import copy
import pickle
import re

import pytest

from stoker import errors
from stoker.errors import (
    AlreadyExists,
    ConfigError,
    CorruptBlock,
    KeyNotFound,
    StokerError,
    StoreError,
    StoreFull,
)

CLASSES = sorted(
    (one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, StokerError)),
    key=lambda one: one.__name__,
)


def make(kind: type[StokerError]) -> StokerError:
    if kind is CorruptBlock:
        return CorruptBlock("data/00001.arrow", 4096, 8192, 0x01020304, 0x0A0B0C0D)
    return kind("must hold", value="what it was", place="a/key", hint="do this")


def drawn() -> dict[str, tuple[str, str | None]]:
    """Of each class in the docstring's tree: its parent and the builtin in brackets."""
    found: dict[str, tuple[str, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*)(?:[├└]── )?([A-Z]\w+)(?: \((\w+)\))?(?: |$)", line)
        if match is None:
            continue
        depth = line.index(match[2]) // 4 - 1
        path[depth:] = [match[2]]
        found[match[2]] = (path[depth - 1] if depth else "Exception", match[3])
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    tree = drawn()
    assert sorted(tree) == [one.__name__ for one in CLASSES]
    for one in CLASSES:
        parent, builtin = tree[one.__name__]
        bases = [base.__name__ for base in one.__bases__]
        assert bases == [parent, *([builtin] if builtin else [])], one
        assert builtin is None or issubclass(getattr(builtins, builtin), Exception)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_and_copying(kind: type[StokerError]) -> None:
    error = make(kind)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert vars(other) == vars(error)
        assert (other.rule, other.value, other.place, other.hint) == (error.rule, error.value, error.place, error.hint)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_message_is_one_line_with_place_rule_value_and_hint(kind: type[StokerError]) -> None:
    error = make(kind)
    assert "\n" not in str(error)
    assert (
        str(error)
        == f"{error.place}: {error.rule}, got "
        + (str(error.value) if kind is CorruptBlock else repr(error.value))
        + f" (hint: {error.hint})"
    )


def test_parts_that_are_not_given_are_not_mentioned() -> None:
    assert str(ConfigError("must hold")) == "must hold"
    assert str(ConfigError("must hold", place="here")) == "here: must hold"
    assert str(ConfigError("must hold", value=0)) == "must hold, got 0"
    assert str(ConfigError("must hold", value=None)) == "must hold, got None"
    assert ConfigError("must hold").value is None


def test_a_damaged_block_is_described_in_hexadecimal_without_quotes() -> None:
    error = CorruptBlock("data/00001.arrow", 4096, 8192, 0x01020304, 0x0A0B0C0D)
    assert str(error).startswith(
        "data/00001.arrow: bytes [4096, 8192) must have CRC32C 0x01020304, got 0x0a0b0c0d (hint: "
    )
    assert (error.key, error.start, error.end, error.expected, error.got) == (
        "data/00001.arrow",
        4096,
        8192,
        0x01020304,
        0x0A0B0C0D,
    )
    assert error.value == 0x0A0B0C0D


def test_callers_catch_what_they_would_expect() -> None:
    with pytest.raises(KeyError):
        raise KeyNotFound("no such object", place="key")
    with pytest.raises(FileExistsError):
        raise AlreadyExists("must not exist yet", place="key")
    with pytest.raises(OSError, match="^key: needs more space"):
        raise StoreFull("needs more space", place="key")
    assert issubclass(KeyNotFound, StoreError)
