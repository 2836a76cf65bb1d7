"""A mixture as a small TOML or JSON file, for the command line."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError
from .dataset import TokenDataset
from .mixture import Mixture

__all__ = ["MixtureFile"]

_KEYS = ("sources", "schedule", "stop")
_SOURCE_KEYS = ("url", "weight", "cap", "packing")
_SEGMENT_KEYS = ("position", "weights")


@dataclass(frozen=True, kw_only=True)
class MixtureFile:
    """What a file says.

    As TOML (JSON has the same names)::

        stop = "all_exhausted"                  # as Mixture takes it; may be left out

        [sources.web]
        url = "/data/web"
        weight = 0.7
        packing = "best_fit"                    # may be left out: as on the command line

        [sources.code]
        url = "s3://bucket/code"
        weight = 0.3
        cap = 4                                 # epochs; may be left out

        [[schedule]]                            # any number of them
        position = 1_000_000
        weights = { web = 0.5, code = 0.5 }

    Attributes:
        urls, weights, caps, packings: by name of source. schedule, stop: as :class:`Mixture` takes them.
    """

    path: Path
    urls: dict[str, str]
    weights: dict[str, float]
    caps: dict[str, float]
    packings: dict[str, str]
    schedule: list[tuple[int, dict[str, float]]]
    stop: Any

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file; what its values must be is :class:`Mixture`'s to say.

        Raises:
            ConfigError: it can't be read, or is something else.
        """
        place = str(path)
        try:
            data = path.read_bytes()
            body = json.loads(data) if path.suffix == ".json" else tomllib.loads(data.decode())
        except OSError as error:
            raise ConfigError("must be a file that can be read", value=error.strerror, place=place) from error
        except ValueError as error:
            raise ConfigError("must be TOML, or JSON if it ends in .json", value=str(error), place=place) from error
        body = _table(body, _KEYS, ("sources",), place)
        sources = body["sources"]
        if not isinstance(sources, dict):
            raise ConfigError("sources is a table of tables", value=sources, place=place)
        tables = {
            name: _table(table, _SOURCE_KEYS, ("url", "weight"), f"{place}: {name}") for name, table in sources.items()
        }
        segments = body.get("schedule", [])
        if not isinstance(segments, list):
            raise ConfigError("schedule is a list of tables", value=segments, place=place)
        schedule = [_table(segment, _SEGMENT_KEYS, _SEGMENT_KEYS, f"{place}: schedule") for segment in segments]
        for name, table in tables.items():
            if not isinstance(table["url"], str):
                raise ConfigError("url is text", value=table["url"], place=f"{place}: {name}")
        return cls(
            path=path,
            urls={name: table["url"] for name, table in tables.items()},
            weights={name: table["weight"] for name, table in tables.items()},
            caps={name: table["cap"] for name, table in tables.items() if "cap" in table},
            packings={name: str(table["packing"]) for name, table in tables.items() if "packing" in table},
            schedule=[(segment["position"], segment["weights"]) for segment in schedule],
            stop=body.get("stop", "first_exhausted"),
        )

    def mix(self, datasets: Mapping[str, TokenDataset]) -> Mixture:
        """The mixture of opened data sets."""
        return Mixture(
            {name: (datasets[name], weight) for name, weight in self.weights.items()},
            schedule=self.schedule,
            caps=self.caps,
            stop=self.stop,
        )


def _table(value: Any, known: tuple[str, ...], needed: tuple[str, ...], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"must be a table with {', '.join(needed)}", value=value, place=place)
    for name in value:
        if name not in known:
            raise ConfigError(f"must hold no more than {', '.join(known)}", value=name, place=place)
    for name in needed:
        if name not in value:
            raise ConfigError(f"must hold {', '.join(needed)}", value=f"no {name}", place=place)
    return value
