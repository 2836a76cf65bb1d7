"""Hypothesis strategies for state trees' plain values and for tensors cut into chunks."""

import operator
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from stoker.checkpoint.blob import DTYPES, Chunk

NATIVE_DTYPES = [name for name, dtype in DTYPES.items() if dtype.native]

# ---- plain values

_floats = st.floats(allow_nan=True, allow_infinity=True)
_torch_values = st.one_of(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")]),
    st.lists(st.integers(0, 1 << 40), max_size=4).map(torch.Size),
)
_numpy_dtypes = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    npst.unicode_string_dtypes(endianness="?", min_len=1, max_len=5),
    npst.byte_string_dtypes(min_len=1, max_len=5),
    npst.datetime64_dtypes(endianness="?"),
    npst.timedelta64_dtypes(endianness="?"),
)
_arrays = npst.arrays(_numpy_dtypes, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
_numpy_scalars = st.one_of(
    npst.arrays(_numpy_dtypes, ()).map(lambda array: array[()]),
    st.binary(max_size=4).map(np.bytes_),
    st.text(max_size=4).map(np.str_),
)
# Lone surrogates are what os.fsdecode makes of a file name that is no UTF-8.
_text = st.text(st.characters(exclude_categories=()), max_size=8)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    _floats,
    st.complex_numbers(),
    _text,
    st.binary(max_size=8),
    _torch_values,
    _numpy_scalars,
)


def _equals_itself(value: Any) -> bool:
    return not bool(operator.ne(value, value))


_hashable = st.recursive(
    st.one_of(_scalars, st.just("$tuple")).filter(_equals_itself),
    lambda inner: st.one_of(st.tuples(inner), st.tuples(inner, inner), st.frozensets(inner, max_size=2)),
    max_leaves=4,
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(_hashable, inner, max_size=4)
    named = st.dictionaries(_text, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        named,
        dicts,
        named.map(OrderedDict),
        dicts.map(OrderedDict),
        st.dictionaries(_hashable, st.integers(), max_size=4).map(Counter),
        st.tuples(st.sampled_from([list, dict, set, int, float, None]), dicts).map(lambda pair: defaultdict(*pair)),
    )


values = st.recursive(
    st.one_of(_scalars, _arrays, st.sets(_hashable, max_size=4), st.frozensets(_hashable, max_size=4)),
    _containers,
    max_leaves=12,
)
"""Any value that can be saved."""


def same(a: Any, b: Any) -> bool:
    """Whether two values have the same types throughout, the same order of keys, and are equal to the bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return bool(a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, (np.str_, np.bytes_)):
        return bool(a == b) and len(a) == len(b)
    if isinstance(a, np.generic):
        return bool(a.dtype.str == b.dtype.str and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes()
    if isinstance(a, complex):
        return np.complex128(a).tobytes() == np.complex128(b).tobytes()
    if isinstance(a, dict):
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            return False
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same(v, w) for w in b) for v in a)
    return bool(a == b)


# ---- tensors cut into chunks

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, shape


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A tensor of `shape` cut into boxes by cuts of boxes, so that they need not form a grid; some may be empty."""
    parts: list[Box] = [((0,) * len(shape), shape)]
    if shape:
        for _ in range(draw(st.integers(0, 5))):
            offsets, size = parts.pop(draw(st.integers(0, len(parts) - 1)))
            d = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(0, size[d]))
            parts.append((offsets, (*size[:d], at, *size[d + 1 :])))
            parts.append(
                ((*offsets[:d], offsets[d] + at, *offsets[d + 1 :]), (*size[:d], size[d] - at, *size[d + 1 :]))
            )
    return parts


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
names = st.one_of(
    st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,3}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
        lambda name: name != "__metadata__" and not name.startswith("__pad__.")
    ),
)


@st.composite
def tensors(draw: st.DrawFn, *, max_tensors: int = 4, dtypes: list[str] = NATIVE_DTYPES) -> list[list[Chunk]]:
    """Some tensors, each as the list of its chunks."""
    result = []
    for name in draw(st.lists(names, min_size=1, max_size=max_tensors, unique=True)):
        dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
        cut = draw(boxes(shape))
        result.append(
            [Chunk(name=name, dtype=dtype, shape=size, offsets=offsets, global_shape=shape) for offsets, size in cut]
        )
    return result
