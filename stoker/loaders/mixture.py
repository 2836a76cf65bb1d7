"""Several data sets as one stream, each at a rate of its own that may change along the way."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, UnsupportedError
from ._mixed_rows import MixedPlan, MixedRows
from ._numbers import as_whole, exact
from ._packed import DocumentRows, RowBorders
from ._tables import Span
from .dataset import TokenDataset
from .mixed_order import WEIGHT_BITS, MixedOrder, MixedSource, SampleIds, Stop, present
from .order import ENDLESS, Shuffle, Window

__all__ = ["Mixture", "Schedule"]

Schedule: TypeAlias = Iterable[tuple[int, Mapping[str, float]]]
"""``(position, {name: weight})``: from that position of the stream on, these weights."""

_PLACE = "Mixture"
_MAX_SOURCES = 1 << 14  # a sample id has so much room for the source's number
_MAX_NAME = 64


# Guarantees: immutable but for what its data sets do; any thread may call any method.
class Mixture:
    """Mix the samples of several data sets at given rates, for :class:`~stoker.loaders.TokenLoader`.

    A weight is a source's share of the rows, relative to the others: of any stretch of the stream each source has its
    share to within a few rows, not by chance. Every source is read in an order of its own, which depends on the
    loader's seed and the source's *name*, epoch after epoch, as often as its rate asks for. So neither another source
    nor another weight changes which of its samples come, or in which order: only when they do.

    **Changing a run.** Weights change along the stream by `schedule`, which may grow while a run goes on: what stands
    before the position of a loader's state must stay as it was, what comes after it is free. A new source is one more
    entry of weight 0 that gets its weight in a segment of `schedule`; one to be left out keeps its entry and gets
    weight 0. Nothing is lost or repeated by either. The order of the entries has no effect on the stream.

    **The end.** The loader's `epochs` count how often a source is read in one run:

    - ``stop="first_exhausted"``: a run ends when the first source was read that often. A few of its samples, fewer than
      ``lanes * (1 + log2(sources))``, may not have come by then; they come first in the next run. A source needs more
      samples than that.
    - ``stop="all_exhausted"``: a run ends when every source was read that often; the others are repeated meanwhile.
    - ``stop="never"``: a run has no end, and the loader no length.

    A source with a cap leaves the mixture before it would exceed that, and the others fill its place; it ends no run then.
    When all have left, the stream ends. What a cap leaves unread, again fewer than ``lanes * (1 + log2(sources))``
    samples, is counted by ``TokenLoader.stats()``.

    A batch has one more key, ``source``: int64 ``(batch_size,)``, the number of each row's source in :attr:`names`.

    Args:
        sources: ``{name: (data set, weight)}``. The data sets are :class:`~stoker.loaders.TokenDataset` with the same
            `seq_len` and `labels`, all of them or none with borders of documents; dtypes and packings may differ. They
            stay open. A name is part of the stream: another name is another order.
        schedule: ``(position, {name: weight})`` in ascending order, where a position counts rows of the whole stream, as
            ``batch["position"]`` does, and takes effect at the next multiple of the order's lanes (48). A source that
            is not named has weight 0 from there on.
        caps: ``{name: epochs}``: how often a source may be read in all, for example 4 or 0.5.
        stop: as above.

    Raises:
        ConfigError: weights that are negative, not finite, all zero, of unknown names, or so small beside the others
            (2^-24) that the source would never come; sources that don't fit together.
        UnsupportedError: a source that is no TokenDataset, or more than 16,384 of them.

    >>> import tempfile
    >>> from stoker.loaders import TokenDataset, TokenLoader, TokenWriter
    >>> directory = tempfile.TemporaryDirectory()
    >>> for name, first in (("web", 0), ("code", 1000)):
    ...     with TokenWriter(f"{directory.name}/{name}", dtype="uint16", eos_id=None) as writer:
    ...         writer.write(range(first, first + 101))
    >>> web, code = (TokenDataset(f"{directory.name}/{name}", seq_len=4) for name in ("web", "code"))
    >>> mix = Mixture({"web": (web, 0.75), "code": (code, 0.25)}, schedule=[(8, {"web": 1, "code": 1})])
    >>> loader = TokenLoader(mix, batch_size=8, shuffle=Window(lanes=1))
    >>> next(loader)["source"].tolist(), next(loader)["source"].tolist()
    ([1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0])
    >>> mix.names
    ('web', 'code')
    >>> directory.cleanup()
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[TokenDataset, float]],
        *,
        schedule: Schedule = (),
        caps: Mapping[str, float] | None = None,
        stop: Stop = "first_exhausted",
    ) -> None:
        if not sources:
            raise ConfigError("a mixture needs at least one source", place=_PLACE)
        if len(sources) > _MAX_SOURCES:
            raise UnsupportedError(f"a mixture has at most {_MAX_SOURCES} sources", value=len(sources), place=_PLACE)
        for name in sources:
            if not isinstance(name, str) or not name or len(name) > _MAX_NAME or not name.isprintable():
                raise ConfigError(f"a name is 1 to {_MAX_NAME} printable characters", value=name, place=_PLACE)
        pairs = [_pair(name, entry) for name, entry in sources.items()]
        self.names = tuple(sources)
        self.sources = tuple(dataset for dataset, _ in pairs)
        self.stop = stop
        self._require_alike()
        first = self.sources[0]
        self.seq_len, self.documents, self.labels = first.seq_len, first.documents, first.labels
        self._schedule = self._parsed({n: w for n, (_, w) in zip(self.names, pairs, strict=True)}, schedule)
        self._caps = {name: self._cap(name, epochs) for name, epochs in (caps or {}).items()}
        self._ids = SampleIds([dataset.samples_per_block for dataset in self.sources])
        self._rows = MixedRows(self.sources, self._ids)
        self._content = self._digests()
        for dataset in self.sources:
            dataset.share(len(self.sources))
        self.order()  # raises what is wrong with the weights for any seed

    # -- what is wrong with it ----------------------------------------------------------------------------------------

    def _require_alike(self) -> None:
        for attribute in ("seq_len", "documents", "labels"):
            values = [getattr(dataset, attribute) for dataset in self.sources]
            for name, value in zip(self.names, values, strict=True):
                if value != values[0]:
                    raise ConfigError(
                        f"all sources must have the same {attribute}, which is {values[0]!r} in {self.names[0]!r}",
                        value=value,
                        place=f"{_PLACE}: {name}",
                        hint="with one packing that carries borders, open the others with documents=True"
                        if attribute == "documents"
                        else "",
                    )

    def _parsed(self, first: Mapping[str, float], schedule: Schedule) -> list[tuple[int, dict[str, int]]]:
        segments = [(0, _whole_weights(first, "the first weights"))]
        for entry in schedule:
            try:
                start, weights = entry
                items = dict(weights.items())
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError("schedule holds (position, {name: weight})", value=entry, place=_PLACE) from error
            position = as_whole(start)
            if position is None or not segments[-1][0] < position < ENDLESS:
                raise ConfigError(
                    "positions of the schedule are whole numbers, below 2^62, above 0 and ascending",
                    value=start,
                    place=_PLACE,
                )
            self._require_known(items, "schedule")
            segments.append((position, _whole_weights(items, f"the weights at position {position}")))
        return segments

    def _require_known(self, names: Iterable[str], place: str) -> None:
        for name in names:
            if name not in self.names:
                raise ConfigError(
                    f"names are those of the sources: {', '.join(self.names)}", value=name, place=f"{_PLACE} {place}"
                )

    def _cap(self, name: str, epochs: float) -> int:
        self._require_known([name], "caps")
        number = exact(epochs)
        if number is None or number <= 0:
            raise ConfigError("a cap is a number of epochs above 0", value=epochs, place=f"{_PLACE}: {name}")
        return min(ENDLESS, max(1, round(number * len(self.sources[self.names.index(name)]))))

    # -- what the loader asks -----------------------------------------------------------------------------------------

    def order(self, *, seed: int = 0, shuffle: Shuffle = "window", window: Window | None = None) -> MixedOrder:
        """The order of this mixture: which source and sample stands at which position."""
        sources = [
            MixedSource(name, len(dataset), dataset.samples_per_block, self._caps.get(name))
            for name, dataset in zip(self.names, self.sources, strict=True)
        ]
        return MixedOrder(sources, self._schedule, seed=seed, shuffle=shuffle, window=window, stop=self.stop)

    def content(self) -> dict[str, list[str]]:
        """What states know the sources by: ``{name: [digest of content and samples, packing]}``."""
        return {name: list(told) for name, told in self._content.items()}

    def _digests(self) -> dict[str, list[str]]:
        told = {}
        for name, dataset in zip(self.names, self.sources, strict=True):
            identity = json.dumps([dataset.fingerprint, len(dataset), dataset.samples_per_block])
            told[name] = [hashlib.sha256(identity.encode()).hexdigest()[:32], dataset.packing]
        return told

    @property
    def packing(self) -> str:
        """The packings of its sources."""
        return ", ".join(dict.fromkeys(dataset.packing for dataset in self.sources))

    @property
    def fingerprint(self) -> str:
        """Identity of names and contents, whatever the weights are."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()

    @property
    def samples_per_block(self) -> int:
        """The most samples of an order block of any source."""
        return self._ids.samples_per_block

    @property
    def is_local(self) -> bool:
        """Whether all sources are mapped in place."""
        return all(dataset.is_local for dataset in self.sources)

    def __len__(self) -> int:
        """Samples of all sources together."""
        return sum(len(dataset) for dataset in self.sources)

    def __repr__(self) -> str:
        return f"Mixture({', '.join(self.names)}; samples={len(self)}, segments={len(self._schedule)}, {self.stop})"

    def plan(self, samples: NDArray[np.int64]) -> MixedPlan:
        """Locate the rows of many batches, as ``TokenDataset.plan`` does; `samples` are ids of :class:`MixedOrder`."""
        return self._rows.plan(samples)

    def gather_planned(
        self, plan: MixedPlan, start: int, end: int, input_ids: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        """Fill ``(end - start, seq_len)`` arrays with rows ``[start, end)`` of a plan."""
        self._rows.gather_planned(plan, start, end, input_ids, labels)

    def gather_documents(self, plan: MixedPlan, start: int, end: int, rows: DocumentRows) -> RowBorders:
        """Fill all arrays of rows ``[start, end)`` of a plan, and tell where their pieces end."""
        return self._rows.gather_documents(plan, start, end, rows)

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Start to bring the blocks of samples near, in the background."""
        sources = self._ids.sources(samples)
        for number in present(sources):
            self.sources[number].prefetch(self._ids.samples(number, samples[sources == number]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # knows addresses in this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = MixedRows(self.sources, self._ids)

    def explain(self, sample: int) -> list[Span]:
        """The documents that a sample's tokens come from; see ``TokenDataset.explain``."""
        number, own = self.sample(sample)
        return self.sources[number].explain(own)

    def sample(self, sample: int) -> tuple[int, int]:
        """The number of a sample id's source, and its number there."""
        ids = np.array([sample], np.int64)
        number = int(self._ids.sources(ids)[0])
        return number, int(self._ids.samples(number, ids)[0])


def _pair(name: str, entry: Any) -> tuple[TokenDataset, float]:
    if not isinstance(entry, Sequence) or len(entry) != 2:
        raise ConfigError("a source is (data set, weight)", value=entry, place=f"{_PLACE}: {name}")
    dataset, weight = entry
    if not isinstance(dataset, TokenDataset):
        raise UnsupportedError(
            "the sources of a mixture are TokenDatasets", value=type(dataset).__name__, place=f"{_PLACE}: {name}"
        )
    return dataset, weight


def _whole_weights(weights: Mapping[str, float], what: str) -> dict[str, int]:
    """Weights as whole numbers, the largest 2^24; exact, so the same on every machine."""
    numbers: dict[str, Fraction] = {}
    for name, weight in weights.items():
        number = exact(weight)
        if number is None or number < 0:
            raise ConfigError(f"{what} must be finite numbers >= 0", value=weight, place=f"{_PLACE}: {name}")
        numbers[name] = number
    most = max(numbers.values(), default=Fraction(0))
    if not most:
        raise ConfigError(f"one of {what} must be above 0", value=dict(weights), place=_PLACE)
    whole = {name: round(number * (1 << WEIGHT_BITS) / most) for name, number in numbers.items()}
    for name, weight in weights.items():
        if weight and not whole[name]:
            raise ConfigError(
                f"{what} must be 2^-24 of the largest one, {max(weights.values())}, at least, or 0",
                value=weight,
                place=f"{_PLACE}: {name}",
            )
    return whole
