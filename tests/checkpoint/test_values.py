"""Plain values as typed JSON: exactly what went in, or a refusal that names the place."""

import dataclasses
import datetime
import enum
import json
import math
import random
import re
import struct
import subprocess
import sys
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.checkpoint import values as module
from stoker.checkpoint.values import MAX_DEPTH, dumps, loads
from stoker.errors import FormatError, UnknownVersion, UnsupportedState
from tests.checkpoint.strategies import same, values

SIGNALLING_NAN = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]


@settings(max_examples=300)
@given(values)
@example({1: "a", "1": "b", 1.5: "c", None: "d", ("x", 2): "e", b"f": "g"})
@example([1 << 63, 1 << 64, -(1 << 4000), (1 << 53) + 1, 10**5000])
@example([float("inf"), float("-inf"), -0.0, 5e-324, SIGNALLING_NAN, complex(-0.0, float("nan"))])
@example({"$set": 1, "$": 2, "": 3})
@example(Counter({"b": 1, "a": 2}))
@example(defaultdict(list, {"a": [1]}))
@example([np.float64(1.5), np.bool_(True), np.str_("a\0"), np.bytes_(b"a\0"), np.datetime64("NaT")])
@example([random.Random(3).getstate(), np.random.default_rng(5).bit_generator.state])
def test_every_value_comes_back_with_its_type_and_its_bits(value: Any) -> None:
    data = dumps(value, place="tree")
    back = loads(data, place="tree")
    assert same(value, back), (value, back)
    assert dumps(back, place="tree") == data


@given(st.sets(st.integers() | st.text()))
def test_equal_sets_give_equal_bytes(elements: set[Any]) -> None:
    shuffled = list(elements)
    random.Random(0).shuffle(shuffled)
    assert dumps(elements, place="") == dumps(set(shuffled), place="")


def test_the_document_is_plain_json_whose_numbers_any_reader_holds_exactly() -> None:
    state = {"step": 3, "seed": 1 << 64, "lr": 0.1, "loss": math.inf, "names": ("a", b"\0")}
    assert json.loads(dumps(state, place="")) == {
        "format": "stoker.values",
        "version": 1,
        "value": {
            "step": 3,
            "seed": {"$int": "0x10000000000000000"},
            "lr": 0.1,
            "loss": {"$float": "7ff0000000000000"},
            "names": {"$tuple": ["a", {"$bytes": "AA=="}]},
        },
    }


def test_arrays_come_back_writable_in_c_order_and_of_their_byte_order() -> None:
    array = np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3))
    back = loads(dumps(array, place=""), place="")
    assert back.flags.writeable and back.flags.c_contiguous and back.dtype.str == ">i4"
    assert np.array_equal(back, array)


class _Point(namedtuple("_Point", "x y")):
    pass


class _Color(enum.IntEnum):
    RED = 1


class _Dict(dict[str, int]):
    pass


@dataclasses.dataclass
class _Data:
    x: int = 1


class _Stateful:
    def state_dict(self) -> dict[str, Any]:
        return {}


REFUSED = {
    "namedtuple": (_Point(1, 2), "_asdict"),
    "enum": (_Color.RED, ".value"),
    "dict of one's own": (_Dict(a=1), "dict(x)"),
    "str of one's own": (type("Name", (str,), {})("a"), "str(x)"),
    "dataclass": (_Data(), "asdict"),
    "stateful": (_Stateful(), "state_dict"),
    "function": (len, "code is not state"),
    "lambda": (lambda: 0, "code is not state"),
    "class": (int, "code is not state"),
    "path": (Path("/tmp"), "str(x)"),
    "datetime": (datetime.datetime(2020, 1, 1), "isoformat"),
    "bytearray": (bytearray(b"a"), "bytes(x)"),
    "generator of random numbers": (np.random.default_rng(0), "bit_generator.state"),
    "object": (object(), "plain values"),
    "masked array": (np.ma.masked_array([1], [True]), "x.mask"),
    "matrix": (np.array([[1]]).view(np.matrix), "numpy.asarray"),
    "array of objects": (np.array([None]), "fixed width"),
    "structured array": (np.zeros(1, [("a", "i4")]), "fixed width"),
    "long double": (np.zeros(1, np.longdouble), "fixed width"),
    "void": (np.void(b"abcd"), "fixed width"),
    "defaultdict of code": (defaultdict(lambda: 1), "dict(x)"),
    "tensor": (torch.zeros(1), "plain values"),
    "nan as a key": ({float("nan"): 1}, "equal itself"),
    "nan in a tuple as a key": ({(1, np.float32("nan")): 1}, "equal itself"),
    "nan in a set": ({float("nan")}, "equal itself"),
    "an object as a key": ({object(): 1}, "plain values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_come_back_as_something_else_is_refused_with_its_place_and_a_hint(name: str) -> None:
    value, hint = REFUSED[name]
    with pytest.raises(UnsupportedState, match=re.escape(hint)) as caught:
        dumps({"model": ["a", {"extra": value}]}, place="trainer")
    assert caught.value.place.startswith("trainer.model[1].extra")
    assert isinstance(caught.value, TypeError)


def test_the_place_names_every_step_of_the_path() -> None:
    with pytest.raises(UnsupportedState) as caught:
        dumps({"a": [{"not a name": {(1, 2): [object()]}}]}, place="tree")
    assert caught.value.place == "tree.a[0]['not a name'][(1, 2)][0]"


def test_a_cycle_is_refused_and_a_shared_value_is_not() -> None:
    shared = [1]
    assert loads(dumps([shared, shared], place=""), place="") == [[1], [1]]
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(UnsupportedState, match="must not contain itself") as caught:
        dumps(loop, place="tree")
    assert caught.value.place == "tree[1].again"


def _nested(depth: int) -> Any:
    value: Any = 0
    for i in range(depth):
        value = [{"a": value}, (value,), {1: value}][i % 3] if i % 4 else [value]
    return value


def test_values_may_be_nested_as_deep_as_the_limit_and_no_deeper() -> None:
    assert loads(dumps(_nested(MAX_DEPTH), place=""), place="") == _nested(MAX_DEPTH)
    with pytest.raises(UnsupportedState, match="64 deep"):
        dumps(_nested(MAX_DEPTH + 1), place="")
    text = '{"format":"stoker.values","version":1,"value":' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}"
    with pytest.raises(FormatError, match="deeper than 64"):
        loads(text.replace("[]", "[0]").encode(), place="")


def test_more_than_the_limit_is_refused_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dumps(np.zeros(100_000), place="")
    monkeypatch.setattr(module, "MAX_BYTES", len(data) - 1)
    with pytest.raises(UnsupportedState, match="turn large arrays into tensors"):
        dumps(np.zeros(100_000), place="")
    with pytest.raises(FormatError):
        loads(data, place="")


def _document(value: str) -> bytes:
    return b'{"format":"stoker.values","version":1,"value":%b}' % value.encode()


BAD = {
    "no json": b"\x80\x04pickle",
    "no object": b"[]",
    "another format": b'{"format":"x","version":1,"value":1}',
    "too many keys": b'{"format":"stoker.values","version":1,"value":1,"code":2}',
    "a key twice": _document('{"a":1,"a":2}'),
    "an unknown type": _document('{"$pickle":"gASV"}'),
    "a type and more": _document('{"$int":"0x1","a":1}'),
    "a dollar key": _document('{"a":1,"$b":2}'),
    "NaN": _document("NaN"),
    "a float beyond all": _document("1e999"),
    "a number with too many digits": _document("1" * 5000),
    "int of no digits": _document('{"$int":"x"}'),
    "float of few digits": _document('{"$float":"00"}'),
    "bytes of no base64": _document('{"$bytes":"*"}'),
    "complex of one": _document('{"$complex":["0000000000000000"]}'),
    "an unhashable key": _document('{"$dict":[[[1],2]]}'),
    "equal keys": _document('{"$dict":[[1,2],[1.0,3]]}'),
    "an element twice": _document('{"$set":[1,1]}'),
    "nan in a set": _document('{"$set":[{"$float":"7ff8000000000000"}]}'),
    "pairs of three": _document('{"$dict":[[1,2,3]]}'),
    "a factory of code": _document('{"$defaultdict":["os.system",[]]}'),
    "an array of objects": _document('{"$ndarray":["|O",[1],"AAAAAAAAAAA="]}'),
    "an array of too few bytes": _document('{"$ndarray":["<i4",[2],"AAAAAA=="]}'),
    "an array of huge shape": _document('{"$ndarray":["<i4",[0,4611686018427387904,4611686018427387904],""]}'),
    "an array of 65 dimensions": _document('{"$ndarray":["|i1",[1' + ",1" * 64 + '],"AA=="]}'),
    "a negative shape": _document('{"$ndarray":["<i4",[-1],""]}'),
    "a strange unit of time": _document('{"$ndarray":["<M8[xx]",[0],""]}'),
    "a dtype that is none": _document('{"$torch.dtype":"load"}'),
    "a dtype with a dot": _document('{"$torch.dtype":"nn.Module"}'),
    "a device that is none": _document('{"$torch.device":"os"}'),
    "a size of too many bits": _document('{"$torch.Size":[9223372036854775808]}'),
    "a size that is none": _document('{"$torch.Size":[1.5]}'),
    "deep brackets": b"[" * 200_000,
}


@pytest.mark.parametrize("name", BAD)
def test_what_dumps_never_writes_is_refused_and_names_the_file(name: str) -> None:
    with pytest.raises(FormatError, match="state/rank-0.json"):
        loads(BAD[name], place="state/rank-0.json")


def test_a_newer_version_is_refused_by_name() -> None:
    data = dumps(1, place="").replace(b'"version":1', b'"version":2')
    with pytest.raises(UnknownVersion, match=r"x\.json.*got 2"):
        loads(data, place="x.json")


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda s: (
            st.lists(s)
            | st.dictionaries(
                st.sampled_from(["$int", "$set", "$dict", "$ndarray", "$tuple", "$counter", "$torch.Size", "a"]),
                s,
                max_size=1,
            )
        ),
    )
)
def test_any_json_ends_in_a_value_or_a_format_error(value: Any) -> None:
    text = json.dumps({"format": "stoker.values", "version": 1, "value": value})
    with suppress(FormatError):
        loads(text.encode(), place="x")


def test_reading_needs_torch_only_for_torchs_own_types() -> None:
    data = dumps({"a": [1, (2,)], "b": np.zeros(2)}, place="")
    program = (
        "import sys; from stoker.checkpoint.values import loads; "
        f"loads({data!r}, place=''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
