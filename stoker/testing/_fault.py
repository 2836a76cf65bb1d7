"""A fault that a proxy applies to a request, with its checks; :mod:`stoker.testing.proxy` has the table of them."""

import re
from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal, get_args

from ..errors import ConfigError

__all__ = ["BREAKS", "Fault", "FaultKind", "check_rate"]

FaultKind = Literal[
    "status",
    "redirect",
    "reset",
    "close",
    "stall",
    "lost_reply",
    "flip",
    "truncate",
    "wrong_bytes",
    "wrong_content_range",
    "delay",
    "drip",
]

_FIELDS: dict[str, set[str]] = {
    "status": {"status", "code", "headers"},
    "redirect": {"status", "location"},
    "reset": {"at_byte"},
    "close": {"at_byte"},
    "stall": {"at_byte"},
    "lost_reply": set(),
    "flip": {"at_byte"},
    "truncate": {"at_byte"},
    "wrong_bytes": {"shift_bytes"},
    "wrong_content_range": {"shift_bytes"},
    "delay": set(),
    "drip": {"bytes_per_s"},
}
_NEEDED = {"redirect": "location", "delay": "delay_s", "drip": "bytes_per_s"}
BREAKS = ("reset", "close", "stall")
_BODY_KINDS = ("flip", "truncate", "wrong_bytes", "wrong_content_range", "drip")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; the table of :mod:`stoker.testing.proxy` says which kind takes which settings.

    A place past the end of a body means its last byte, so the fault strikes whatever the size.

    Attributes:
        kind: one of :data:`FaultKind`.
        status: of the proxy's own answer.
        code: in its XML body.
        headers: added to it, such as ``(("Retry-After", "1"),)``.
        location: scheme, host and port of a redirect.
        at_byte: of the body, from 0.
        shift_bytes: by how much a range is wrong.
        bytes_per_s: of a body that drips.
        delay_s: how long the request is held back first.

    Raises:
        ConfigError: no such kind, a setting that the kind does not have, one that is missing or out of range.
    """

    kind: FaultKind
    _: KW_ONLY
    status: int | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] | None = None
    location: str | None = None
    at_byte: int | None = None
    shift_bytes: int | None = None
    bytes_per_s: float | None = None
    delay_s: float | None = None

    def __post_init__(self) -> None:
        place = f"Fault({self.kind!r})"
        if self.kind not in _FIELDS:
            raise ConfigError(f"kind must be one of {', '.join(get_args(FaultKind))}", value=self.kind, place="Fault")
        given = {f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) is not None}
        allowed = _FIELDS[self.kind] | {"delay_s"}
        if foreign := sorted(given - allowed):
            raise ConfigError(f"takes only {', '.join(sorted(allowed))}", value=", ".join(foreign), place=place)
        if (needed := _NEEDED.get(self.kind)) and needed not in given:
            raise ConfigError(f"needs {needed}", place=place)
        if self.status is not None and not 200 <= self.status <= 599:
            raise ConfigError("status must be in [200, 599]", value=self.status, place=place)
        if self.location is not None and not re.fullmatch(r"https?://[^/\s]+/?", self.location):
            raise ConfigError("location must be http(s)://host[:port]", value=self.location, place=place)
        for name, least in (("at_byte", 0), ("shift_bytes", 1), ("delay_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be >= {least}", value=value, place=place)
        check_rate(self.bytes_per_s, place)

    @property
    def _own_answer(self) -> bool:
        return self.kind in ("status", "redirect")

    @property
    def _before_reply(self) -> bool:
        return self.kind in BREAKS and self.at_byte is None

    @property
    def _in_body(self) -> bool:
        return self.kind in _BODY_KINDS or (self.kind in BREAKS and self.at_byte is not None)


def check_rate(bytes_per_s: float | None, place: str) -> None:
    if bytes_per_s is not None and bytes_per_s <= 0:
        raise ConfigError("bytes_per_s must be > 0", value=bytes_per_s, place=place)
