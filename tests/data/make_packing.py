"""Writes ``packing-v1.json``: what each packing makes of some lengths. Run again only with a new PLAN_VERSION."""

import json
from pathlib import Path

import numpy as np

from stoker.loaders.packing import PLAN_VERSION, BestFit, Concat, Packer, Pad, WindowTable


def main() -> None:
    lengths = np.maximum(1, np.random.default_rng(6).lognormal(np.log(30), 1.1, 60).astype(np.int64))
    packers: list[Packer] = [
        Concat(),
        *(kind(long=long) for kind in (BestFit, Pad) for long in ("split", "truncate", "drop")),
    ]
    plans = []
    for packer in packers:
        windows = packer.windows(seq_len=64, rows=1 << 20, tokens=int(lengths.sum()))
        if isinstance(windows, WindowTable):
            windows.update(lengths)
            windows = windows.rows
        plan = packer.plan(lengths, seq_len=64, rows=windows)
        columns = {name: column.tolist() for name, column in plan._asdict().items()}
        plans.append({"packing": packer.name, "seq_len": 64, "rows": windows, "plan": columns})
    golden = {"version": PLAN_VERSION, "lengths": lengths.tolist(), "plans": plans}
    Path(__file__).with_name(f"packing-v{PLAN_VERSION}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
