"""Everything in a state tree that is no tensor, as typed JSON: no pickle, no code, the same bytes for the same value.

What JSON can say is written as JSON: None, bool, float, str, list, dict with plain string keys, and integers that every
JSON reader holds exactly (up to 2**53). Everything else is an object with one key that starts with ``$`` and names the
type:

=======================  ==========================================================================================
``$int``                 hexadecimal text, any size (decimal text of that length is slow and capped by Python)
``$float``               the 16 hexadecimal digits of an IEEE 754 double: inf, nan with its payload
``$complex``             [real, imaginary], each as in ``$float``
``$bytes``               base64
``$tuple $torch.Size``   a list
``$set $frozenset``      a list, ordered by its encoded elements, so that equal sets give equal bytes
``$dict``                [[key, value], ...] in order, when a key is no string or starts with ``$``
``$ordered_dict``        the same, as are ``$counter`` and ``$defaultdict`` ([factory, pairs])
``$numpy_scalar``        [dtype, base64]
``$numpy.str_``          text, ``$numpy.bytes_`` base64: as arrays they would lose zeros at their end
``$ndarray``             [dtype, shape, base64 of the elements in C order]
``$torch.dtype``         ``"bfloat16"``
``$torch.device``        ``"cuda:0"``
=======================  ==========================================================================================

The document around the value is ``{"format": "stoker.values", "version": 1, "value": ...}``.

Types come back exactly as they went in; a subclass (namedtuple, IntEnum, a dict of one's own) is refused rather than
flattened. Two references to one object come back as two objects.
"""

import base64
import binascii
import json
import math
import operator
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np

from ..errors import FormatError, StokerError, UnknownVersion, UnsupportedState
from ..storage._units import Buffer, format_bytes

__all__ = ["MAX_BYTES", "MAX_DEPTH", "VERSION", "dumps", "encode", "loads"]

VERSION = 1
"""Major version of the document; :func:`loads` refuses any other by name."""
MAX_BYTES = 64 << 20
"""Largest document. More than this in plain values is data, and data belongs in tensors."""
MAX_DEPTH = 64
"""Deepest nesting of containers."""

_FORMAT = "stoker.values"
_AS_IT_IS = frozenset({str, bool})
_EXACT_IN_JSON = 1 << 53  # beyond it, readers that hold numbers as doubles would round
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "list": list,
    "dict": dict,
    "int": int,
    "float": float,
    "set": set,
    "None": None,
}
_NUMPY_DTYPE = re.compile(r"[<>|](b1|i[1248]|u[1248]|f[248]|c8|c16|[mM]8(\[\d{0,9}[a-zA-Z]{1,2}\])?|[SU][1-9]\d{0,8})")
_TORCH_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PAIRED: dict[type, str] = {OrderedDict: "$ordered_dict", Counter: "$counter"}

Json: TypeAlias = Any


def dumps(value: Any, *, place: str, encoded: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Encode `value`; equal values of equal types and equal order give equal bytes.

    If `value` is a dict, `encoded` may have more of its entries, which :func:`encode` made of their values before.

    Raises:
        UnsupportedState: something in it can't be represented exactly. The error's place is `place` with the path inside
            `value` behind it, its hint says what to store instead.

    >>> dumps({"epoch": 3, 4: (1.5, None)}, place="trainer").decode()
    '{"format":"stoker.values","version":1,"value":{"$dict":[["epoch",3],[4,{"$tuple":[1.5,null]}]]}}'
    >>> dumps({"model": {"hook": [len]}}, place="trainer")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    stoker.errors.UnsupportedState: trainer.model.hook[0]: ... (hint: code is not state: keep its name and look it up ...
    """
    # ensure_ascii carries lone surrogates, which os.fsdecode makes, through UTF-8 unharmed.
    text = _compact({"format": _FORMAT, "version": VERSION, "value": _Encoder(place).encode(value)})
    for key, more in encoded.items():
        text = f"{text[:-2]}{',' if value else ''}{_compact(key)}:{more}}}}}"
    if len(text) > MAX_BYTES:
        raise UnsupportedState(
            f"plain values may take {format_bytes(MAX_BYTES)} at most",
            value=format_bytes(len(text)),
            place=place,
            hint="turn large arrays into tensors",
        )
    return text.encode("ascii")


def encode(value: Any, *, place: str) -> str:
    """`value` as the JSON that stands for it in a document; raises as :func:`dumps` does.

    >>> dumps({"a": 1}, place="", encoded={"b": encode((2,), place="")}) == dumps({"a": 1, "b": (2,)}, place="")
    True
    """
    return _compact(_Encoder(place).encode(value))


def loads(data: Buffer, *, place: str) -> Any:
    """Decode what :func:`dumps` made. Arrays own their memory, are writable and in C order.

    Imports torch only if the document holds one of torch's types. Builds nothing but the types in the table above.

    Raises:
        FormatError: no such document, an unknown ``$`` type, a duplicate key, too large or too deep.
        UnknownVersion: written by a newer major version.

    >>> loads(dumps({"epoch": 3, 4: (1.5, None)}, place=""), place="")
    {'epoch': 3, 4: (1.5, None)}
    """
    if len(data) > MAX_BYTES:
        raise _bad(f"a document of plain values has {format_bytes(MAX_BYTES)} at most", len(data), place)
    try:
        document = json.loads(
            bytes(data).decode("ascii"), object_pairs_hook=_object_of, parse_constant=_no_constant, parse_float=_finite
        )
    except StokerError as error:
        raise _bad(error.rule, error.value, place) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _bad("must be JSON", str(error) or "too deep", place) from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise FormatError(f"must be a document of {_FORMAT}", place=place)
    version = document.get("version")
    if version != VERSION or type(version) is not int:
        raise UnknownVersion(
            f"this version of stoker reads {_FORMAT} {VERSION}", value=version, place=place, hint="update stoker"
        )
    if set(document) != {"format", "version", "value"}:
        raise _bad("a document has format, version and value", sorted(document), place)
    return _Decoder(place).decode(document["value"])


def _compact(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, check_circular=False)


def _bad(rule: str, value: object, place: str) -> FormatError:
    return FormatError(rule, value=str(value)[:200], place=place)


def _object_of(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError("an object must not have a key twice", value=next(k for k in keys if keys.count(k) > 1))
    return result


def _no_constant(name: str) -> Json:
    raise FormatError("a number must be finite JSON", value=name)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else cast(float, _no_constant(text))


class _Path:
    """Where in the tree the walk is; text is made only for an error."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._steps: list[tuple[bool, Any]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def push(self, step: Any, *, key: bool = False) -> None:
        self._steps.append((key, step))

    def pop(self) -> None:
        self._steps.pop()

    def __str__(self) -> str:
        text = self._place
        for is_key, step in self._steps:
            text += f".{step}" if is_key and isinstance(step, str) and step.isidentifier() else f"[{step!r:.80}]"
        return text


class _Encoder:
    def __init__(self, place: str) -> None:
        self._path = _Path(place)
        self._open: set[int] = set()  # containers around the current value: meeting one again is a cycle

    def encode(self, value: Any) -> Json:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_EXACT_IN_JSON <= value <= _EXACT_IN_JSON else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if kind is complex:
            return {"$complex": [struct.pack(">d", part).hex() for part in (value.real, value.imag)]}
        if kind in (list, tuple, dict, set, frozenset, OrderedDict, Counter, defaultdict):
            return self._container(value, kind)
        if kind is np.ndarray:
            return {"$ndarray": [self._dtype(value.dtype), list(value.shape), _base64(value)]}
        if kind is np.str_:
            return {"$numpy.str_": "".join(value)}  # str() of it drops zeros at the end
        if kind is np.bytes_:
            return {"$numpy.bytes_": base64.b64encode(value).decode("ascii")}
        if isinstance(value, np.generic):
            return {"$numpy_scalar": [self._dtype(value.dtype), _base64(value)]}
        torch = sys.modules.get("torch")  # not imported: then no value can be torch's
        if torch is not None:
            if kind is torch.Size:
                return {"$torch.Size": list(value)}
            if kind is torch.dtype:
                return {"$torch.dtype": str(value).removeprefix("torch.")}
            if kind is torch.device:
                return {"$torch.device": str(value)}
        raise self._refused(value)

    def _container(self, value: Any, kind: type) -> Json:
        if len(self._open) >= MAX_DEPTH:
            raise UnsupportedState(f"values may be nested {MAX_DEPTH} deep at most", place=str(self._path))
        if id(value) in self._open:
            raise UnsupportedState(
                "a value must not contain itself", place=str(self._path), hint="break the cycle before saving"
            )
        self._open.add(id(value))
        try:
            if kind is list:
                return self._items(value)
            if kind is tuple:
                return {"$tuple": self._items(value)}
            if kind is dict:
                if all(type(key) is str and not key.startswith("$") for key in value):
                    return {
                        key: item if item is None or type(item) in _AS_IT_IS else self._at(key, item)
                        for key, item in value.items()
                    }
                return {"$dict": self._pairs(value)}
            if kind is set or kind is frozenset:
                elements = [self._key(element) for element in value]
                return {f"${kind.__name__}": sorted(elements, key=_compact)}
            if kind is defaultdict:
                return {"$defaultdict": [self._factory(value), self._pairs(value)]}
            return {_PAIRED[kind]: self._pairs(value)}
        finally:
            self._open.remove(id(value))

    def _items(self, values: Iterable[Any]) -> list[Json]:
        result = []
        for i, value in enumerate(values):
            if value is None or type(value) in _AS_IT_IS:  # most of all values: they need no path
                result.append(value)
                continue
            self._path.push(i)
            result.append(self.encode(value))
            self._path.pop()
        return result

    def _at(self, key: Any, value: Any) -> Json:
        self._path.push(key, key=True)
        result = self.encode(value)
        self._path.pop()
        return result

    def _pairs(self, value: dict[Any, Any]) -> list[list[Json]]:
        return [[self._key(key), self._at(key, item)] for key, item in value.items()]

    def _key(self, key: Any) -> Json:
        self._path.push(key, key=True)
        if _holds_nan(key):
            raise UnsupportedState(
                "a key or an element of a set must equal itself", value="nan", place=str(self._path), hint="use None"
            )
        result = self.encode(key)
        self._path.pop()
        return result

    def _factory(self, value: "defaultdict[Any, Any]") -> str:
        for name, factory in _FACTORIES.items():
            if value.default_factory is factory:
                return name
        raise UnsupportedState(
            "a defaultdict's factory must be list, dict, set, int, float or None",
            value=getattr(value.default_factory, "__qualname__", type(value.default_factory).__name__),
            place=str(self._path),
            hint="save dict(x): a factory of one's own is code, and code is not saved",
        )

    def _dtype(self, dtype: "np.dtype[Any]") -> str:
        # Extension types (ml_dtypes.bfloat16) show the code of another type: only a dtype that its code gives back.
        if not _NUMPY_DTYPE.fullmatch(dtype.str) or np.dtype(dtype.str) != dtype:
            raise UnsupportedState(
                "numpy values must have a plain dtype of fixed width",
                value=str(dtype),
                place=str(self._path),
                hint="turn it into numbers or a list; structured arrays field by field",
            )
        return dtype.str

    def _refused(self, value: Any) -> UnsupportedState:
        return UnsupportedState(
            "plain values, containers of them and numpy arrays can be saved",
            value=_type_name(value),
            place=str(self._path),
            hint=_hint(value),
        )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _hint(value: Any) -> str:
    """What to store instead of an object that has no representation."""
    if isinstance(value, Enum):
        return "store its .value and call the enum with it after restore"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "a namedtuple would come back as a tuple: store x._asdict()"
    if isinstance(value, np.ma.MaskedArray):
        return "store x.data and x.mask"
    if isinstance(value, np.ndarray):
        return "a subclass would come back as a plain array: store numpy.asarray(x)"
    for base in (str, bytes, bool, int, float, complex, tuple, list, set, frozenset, dict):
        if isinstance(value, base):
            return f"a subclass would come back as a plain {base.__name__}: store {base.__name__}(x)"
    if isinstance(value, (bytearray, memoryview)):
        return "store bytes(x)"
    if hasattr(value, "bit_generator"):
        return "store x.bit_generator.state"
    if hasattr(value, "state_dict"):
        return "store x.state_dict(), or make the object an item of the tree itself"
    if hasattr(value, "__fspath__"):
        return "store str(x)"
    if hasattr(value, "isoformat"):
        return "store x.isoformat()"
    if hasattr(value, "__dataclass_fields__"):
        return "store dataclasses.asdict(x)"
    if callable(value):
        return "code is not state: keep its name and look it up after restore"
    return "store plain values, or give it state_dict() and load_state_dict() and make it an item of the tree"


def _holds_nan(key: Any) -> bool:
    if isinstance(key, (tuple, frozenset)):
        return any(_holds_nan(part) for part in key)
    return isinstance(key, (float, complex, np.generic)) and bool(operator.ne(key, key))


def _base64(value: "np.ndarray[Any, Any] | np.generic") -> str:
    return base64.b64encode(value.tobytes()).decode("ascii")


class _Decoder:
    def __init__(self, place: str) -> None:
        self._path = _Path(place)
        self._tags: dict[str, Callable[[Json], Any]] = {
            "$int": self._int,
            "$float": self._float,
            "$complex": self._complex,
            "$bytes": self._bytes,
            "$tuple": lambda body: tuple(self._items(body)),
            "$set": lambda body: set(self._elements(body)),
            "$frozenset": lambda body: frozenset(self._elements(body)),
            "$dict": lambda body: self._pairs(body, {}),
            "$ordered_dict": lambda body: self._pairs(body, OrderedDict()),
            "$counter": lambda body: self._pairs(body, Counter()),
            "$defaultdict": self._defaultdict,
            "$numpy_scalar": self._numpy_scalar,
            "$numpy.str_": lambda body: np.str_(self._text(body)),
            "$numpy.bytes_": lambda body: np.bytes_(self._bytes(body)),
            "$ndarray": self._ndarray,
            "$torch.Size": self._torch_size,
            "$torch.dtype": self._torch_dtype,
            "$torch.device": self._torch_device,
        }

    def decode(self, value: Json) -> Any:
        if isinstance(value, list):
            return self._items(value)
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return self._object(value)
        decode = self._tags.get(tag)
        if decode is None or len(value) != 1:
            raise self._bad("a type must be one that this version of stoker knows", ", ".join(value))
        return decode(value[tag])

    def _bad(self, rule: str, value: object) -> FormatError:
        return _bad(rule, value, str(self._path))

    def _step(self, step: Any, value: Json, *, key: bool = False) -> Any:
        if len(self._path) >= MAX_DEPTH:
            raise self._bad(f"values must not be nested deeper than {MAX_DEPTH}", "more")
        self._path.push(step, key=key)
        result = self.decode(value)
        self._path.pop()
        return result

    def _list(self, body: Json, length: int | None = None) -> list[Json]:
        if not isinstance(body, list) or (length is not None and len(body) != length):
            raise self._bad(f"must be a list{'' if length is None else f' of {length}'}", body)
        return body

    def _text(self, body: Json) -> str:
        if not isinstance(body, str):
            raise self._bad("must be text", body)
        return body

    def _items(self, body: Json) -> list[Any]:
        return [self._step(i, value) for i, value in enumerate(self._list(body))]

    def _object(self, body: dict[str, Json]) -> dict[str, Any]:
        for key in body:
            if key.startswith("$"):
                raise self._bad("a key that starts with $ belongs in $dict", key)
        return {key: self._step(key, value, key=True) for key, value in body.items()}

    def _hashable(self, step: int, body: Json) -> Hashable:
        key = self._step(step, body)
        try:
            hash(key)
        except TypeError:
            raise self._bad("a key or an element of a set must be hashable", type(key).__name__) from None
        if _holds_nan(key):
            raise self._bad("a key or an element of a set must equal itself", "nan")
        return key  # type: ignore[no-any-return]

    def _elements(self, body: Json) -> list[Hashable]:
        elements = [self._hashable(i, value) for i, value in enumerate(self._list(body))]
        if len(set(elements)) != len(elements):
            raise self._bad("a set must not have an element twice", "duplicates")
        return elements

    def _pairs(self, body: Json, result: dict[Any, Any]) -> dict[Any, Any]:
        pairs = [self._list(pair, 2) for pair in self._list(body)]
        for i, (key, value) in enumerate(pairs):
            result_key = self._hashable(i, key)
            if result_key in result:
                raise self._bad("a dict must not have a key twice", repr(result_key))
            result[result_key] = self._step(result_key, value, key=True)
        return result

    def _defaultdict(self, body: Json) -> Any:
        name, pairs = self._list(body, 2)
        if self._text(name) not in _FACTORIES:
            raise self._bad("a defaultdict's factory must be one of the known ones", name)
        return self._pairs(pairs, defaultdict(_FACTORIES[name]))

    def _int(self, body: Json) -> int:
        try:
            return int(self._text(body), 16)
        except ValueError:
            raise self._bad("must be a hexadecimal number", body) from None

    def _float(self, body: Json) -> float:
        try:
            return float(struct.unpack(">d", bytes.fromhex(self._text(body)))[0])
        except (ValueError, struct.error):
            raise self._bad("must be the 16 hexadecimal digits of a double", body) from None

    def _complex(self, body: Json) -> complex:
        real, imaginary = self._list(body, 2)
        return complex(self._float(real), self._float(imaginary))

    def _bytes(self, body: Json) -> bytes:
        try:
            return base64.b64decode(self._text(body), validate=True)
        except (binascii.Error, ValueError):
            raise self._bad("must be base64", body) from None

    def _numpy(self, dtype: Json, shape: Sequence[int], data: Json) -> "np.ndarray[Any, Any]":
        if not _NUMPY_DTYPE.fullmatch(self._text(dtype)):
            raise self._bad("must be a numpy dtype of fixed width", dtype)
        raw = bytearray(self._bytes(data))
        try:
            kind = np.dtype(dtype)
        except TypeError:
            raise self._bad("must be a numpy dtype of fixed width", dtype) from None
        if len(raw) != math.prod(shape) * kind.itemsize:
            raise self._bad(f"{list(shape)} of {dtype} has {math.prod(shape) * kind.itemsize} bytes", len(raw))
        try:
            return np.ndarray(tuple(shape), kind, raw)
        except ValueError as error:
            raise self._bad("must be the shape of a numpy array", error) from None

    def _numpy_scalar(self, body: Json) -> Any:
        dtype, data = self._list(body, 2)
        return self._numpy(dtype, (), data)[()]

    def _ndarray(self, body: Json) -> "np.ndarray[Any, Any]":
        dtype, shape, data = self._list(body, 3)
        return self._numpy(dtype, self._sizes(shape), data)

    def _sizes(self, body: Json) -> list[int]:
        if any(type(size) is not int or not 0 <= size < 1 << 63 for size in self._list(body)):
            raise self._bad("must be a shape", body)
        return cast(list[int], body)

    def _torch_size(self, body: Json) -> Any:
        import torch

        return torch.Size(self._sizes(body))

    def _torch_dtype(self, body: Json) -> Any:
        import torch

        dtype = getattr(torch, body, None) if _TORCH_NAME.fullmatch(self._text(body)) else None
        if not isinstance(dtype, torch.dtype):
            raise self._bad("must be a dtype of torch", body)
        return dtype

    def _torch_device(self, body: Json) -> Any:
        import torch

        try:
            return torch.device(self._text(body))
        except RuntimeError:
            raise self._bad("must be a device of torch", body) from None
