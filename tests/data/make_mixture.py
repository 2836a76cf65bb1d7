"""Writes ``mixture-v1.json``: which source and sample stands at each position. Run again only with a new MIXTURE_VERSION."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stoker.loaders.mixed_order import MIXTURE_VERSION, MixedOrder, MixedSource
from stoker.loaders.order import Window

# Prime sizes; weights change within a row of lanes, a source joins, another leaves at its cap.
SOURCES: list[dict[str, Any]] = [
    {"name": "web", "num_samples": 211, "samples_per_block": 4},
    {"name": "code", "num_samples": 53, "samples_per_block": 2, "cap": 80},
    {"name": "math", "num_samples": 7, "samples_per_block": 1},
]
SCHEDULE: Any = [[0, {"web": 11744051, "code": 16777216}], [100, {"web": 3, "code": 2, "math": 1}]]
OPTIONS: dict[str, Any] = {"seed": 9, "stop": "all_exhausted"}
WINDOW = {"lanes": 3, "blocks": 2}


def main() -> None:
    order = MixedOrder([MixedSource(**s) for s in SOURCES], SCHEDULE, window=Window(**WINDOW), **OPTIONS)
    positions = np.concatenate([np.arange(330), 10**15 + np.arange(30)])
    sources, at = order.locate(positions)
    golden = {
        "mixture_version": MIXTURE_VERSION,
        "sources": SOURCES,
        "schedule": SCHEDULE,
        "options": OPTIONS,
        "window": WINDOW,
        "segments": [list(segment) for segment in order.segments_before(10**18)],
        "run_ends": [order.run_end(0, epochs) for epochs in (1, 2, 3)],
        "positions": positions.tolist(),
        "source": sources.tolist(),
        "own_position": at.tolist(),
        "id": order(positions).tolist(),
    }
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items())
    Path(__file__).with_name(f"mixture-v{MIXTURE_VERSION}.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
