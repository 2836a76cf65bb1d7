"""A loader inside torch's ``DataLoader``: which steps are a worker's own, and the way back from all workers' states."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

from ..errors import StateMismatch
from ._numbers import as_whole, whole
from ._state import LoaderState
from .order import SkipRanges

__all__ = ["WorkerPart", "state_after"]

_KEY = "worker"
_PLACE = "loader state"


class WorkerPart(NamedTuple):
    """Worker `number` of `workers` makes steps `number`, `number + workers`, ... from position `base` on.

    That is the order in which ``DataLoader`` takes batches from its workers, which need not know of each other.
    """

    number: int
    workers: int
    base: int

    def others_steps(self, position: int) -> int:
        """Steps of other workers between `position`, where the last own step ended, and the next own step."""
        return self.number if position == self.base else self.workers - 1

    def mark(self, record: Mapping[str, Any], *, run_end: int, segments: Any) -> dict[str, Any]:
        """A loader's state with what :meth:`of` and :func:`state_after` need besides."""
        part = {**self._asdict(), "run_end": run_end}
        return {**record, _KEY: part if segments is None else {**part, "segments": segments}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """The part that a state was taken in; None for that of a loader in the trainer's process."""
        if _KEY not in record:
            return None
        part = record[_KEY]
        numbers = [as_whole(part.get(name)) if isinstance(part, Mapping) else None for name in cls._fields]
        told = [number for number in numbers if number is not None]
        if len(told) < len(numbers):
            raise StateMismatch(f"{_KEY} must hold {', '.join(cls._fields)} as whole numbers", value=part, place=_PLACE)
        return cls(*told)


def state_after(state: Mapping[str, Any], delivered: int | None) -> LoaderState:
    """See :meth:`~stoker.loaders.TokenLoader.state_from`."""
    delivered = None if delivered is None else whole("delivered", delivered, place=_PLACE)
    records = list(_records(state))
    if not records:
        found = f"a record of {', '.join(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatch("must hold the state of a TokenLoader", value=found, place=_PLACE)
    parts = [WorkerPart.of(record) for record in records]
    if None in parts:
        return _from_one_process(LoaderState.from_dict(records[0]), state, delivered)
    handed_out = 0
    if "_snapshot" in state:
        handed_out = state["_snapshot"]["_snapshot_step"] + state["_steps_since_snapshot"]
    # A worker that is through stands at the next run already, while the others' last batches wait to be delivered.
    record = min(records, key=lambda record: record[_KEY]["base"])
    part = record[_KEY]
    if state.get("_iterator_finished") and delivered is None:
        position = run_start = part.get("run_end")
    else:
        steps = handed_out if delivered is None else delivered
        position, run_start = _after(LoaderState.from_dict(record), part["base"], steps), record["run_start"]
    if "segments" in part:
        record = {**record, "segments": [s for s in part["segments"] if s[0] < position]}
    return LoaderState.from_dict({**record, "position": position, "run_start": run_start})


def _from_one_process(record: LoaderState, state: Mapping[str, Any], delivered: int | None) -> LoaderState:
    """A loader in the trainer's process knows where it stands; `delivered` corrects what a loop fetched ahead."""
    steps = 0 if delivered is None else delivered - state.get("_num_yielded", 0)
    if steps == 0:
        return record
    if state.get("_iterator_finished"):
        raise StateMismatch(
            f"after its end an iteration has delivered all its {state['_num_yielded']} batches",
            value=f"delivered={delivered}",
            place=_PLACE,
        )
    position = _after(record, record.position, steps)
    content = dict(record.content)
    if "segments" in content:
        content["segments"] = [segment for segment in content["segments"] if segment[0] < position]
    return LoaderState.from_dict({**record.to_dict(), **content, "position": position})


def _after(record: LoaderState, position: int, steps: int) -> int:
    """Where the stream stands `steps` steps after `position`, or before it if they are negative."""
    if steps == 0:
        return position
    skip = SkipRanges(record.skip)
    rows = skip.live_before(position) + steps * record.global_batch
    if rows < 0:
        raise StateMismatch("no more steps can be taken back than there were", value=-steps, place=_PLACE)
    return skip.position_of(rows - 1) + 1 if rows else 0


def _records(state: Any) -> Iterator[Mapping[str, Any]]:
    """Every loader's state in a nested one."""
    if isinstance(state, Mapping):
        if "order_version" in state and "position" in state:
            yield state
        else:
            for value in state.values():
                yield from _records(value)
