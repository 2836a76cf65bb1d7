"""Incremental saves: a file that is the same as in the newest step is referred to, not written again.

The unit is the blob. Tensors that no optimizer of the tree changes (frozen parameters, buffers, plain tensors) have blobs
of their own, one or more for each item, apart from what every step of an optimizer changes. Which tensors these are is
only a guess at what will stay the same: what is referred to is decided by the bytes. A blob is compared with the one of
the same path in the newest committed step, by the SHA-256 of the whole file: one digest, which any ``sha256sum`` computes,
and which also holds the header, so that equal digests mean equal names, shapes and places. Checksums alone would take two
different blocks for equal once in 2^32; they serve to skip the digest of what has changed.

A reference names the directory where the blob was written, never another reference. It counts only if the newest record of
the log has that blob; the commit checks the same once more.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import CorruptionError, FormatError, KeyNotFound
from ..metrics import counters
from ..storage.store import ObjectStore
from ._columns import writer_of
from .log import CheckpointLog, Record, step_directory
from .manifest import BlobInfo
from .reader import read_manifest
from .stage import BlobSave
from .tree import TreeView

__all__ = ["BlobReuse", "settled_groups"]

logger = logging.getLogger(__name__)

_MIN_GROUP_BYTES = 1 << 20
"""Below this, a file costs more than its bytes."""


def settled_groups(tree: Mapping[str, Any], view: TreeView) -> dict[str, str]:
    """The group of each tensor that no optimizer of the tree changes, by name: one for each item, one for its buffers.

    The same on every rank that has the same tensors.
    """
    stepped = {
        id(parameter)
        for thing in tree.values()
        if isinstance(thing, torch.optim.Optimizer)
        for group in thing.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    groups: dict[str, str] = {}
    sizes: dict[str, int] = {}
    items = {item.name: item.kind for item in view.items.values()}
    for name, tensor in view.tensors.items():
        item = name.partition(".")[0]
        if items.get(item) == "optimizer" or id(tensor) in stepped:
            continue
        groups[name] = f"{item} buffers" if name in view.buffers else item
        sizes[groups[name]] = sizes.get(groups[name], 0) + tensor.numel() * tensor.element_size()
    return {name: group for name, group in groups.items() if sizes[group] >= _MIN_GROUP_BYTES}


@dataclass(frozen=True, kw_only=True)
class _Newest:
    """What the newest committed step has under this rank's paths."""

    directory: str
    blobs: Mapping[str, BlobInfo]

    def home_of(self, blob: BlobInfo) -> str:
        """Where one of them lies."""
        return blob.home or self.directory


# Guarantees: find() and committed() are called by one thread at a time, in the order of the saves.
class BlobReuse:
    """Finds, for one rank, the blobs of a save that need not be written."""

    def __init__(self, store: ObjectStore, log: CheckpointLog, *, rank: int) -> None:
        self._store, self._log, self._rank = store, log, rank
        self._newest: _Newest | None = None

    def find(self, save: BlobSave, *, full: bool) -> dict[str, BlobInfo]:
        """The blobs that `save` holds back, by path: with their SHA-256 where one is needed, and their home if they have one.

        Call it when everything is staged, and no save before this one is under way.

        Args:
            full: refer to none.
        """
        head = self._log.head()
        newest = self._find_newest(head)
        infos = save.infos
        found: dict[str, BlobInfo] = {}
        for index in save.held:
            info = infos[index]
            before = newest.blobs.get(info.path) if newest is not None else None
            if before is not None and not _may_be_equal(before, info):
                found[info.path] = info  # it changes from save to save: nobody will look for its digest
                continue
            with save.image_of(index) as image:
                info = replace(info, sha256=hashlib.sha256(image).hexdigest())
            if head is None or newest is None or before is None or before.sha256 != info.sha256 or full:
                pass
            elif self._is_there(head, newest.home_of(before), info):
                info = replace(info, home=newest.home_of(before))
                counters.add("ckpt.save.reused_bytes", info.size_bytes)
            found[info.path] = info
        return found

    def _is_there(self, head: Record, home: str, info: BlobInfo) -> bool:
        if not head.has(home, info.path):
            return False
        try:
            return self._store.head(f"{home}/{info.path}").size == info.size_bytes
        except KeyNotFound:
            return False

    def _find_newest(self, head: Record | None) -> _Newest | None:
        if head is None or head.latest is None:
            return None
        live = head.live[head.latest]
        directory = step_directory(head.latest, live.nonce)
        if self._newest is None or self._newest.directory != directory:
            try:
                self.committed(directory, read_manifest(self._store, directory, live).blobs.values())
            except (CorruptionError, FormatError, KeyNotFound) as error:
                logger.warning("%s: everything is written, since the newest step can't be read: %s", directory, error)
                return None
        return self._newest

    def committed(self, directory: str, blobs: Iterable[BlobInfo]) -> None:
        """A step was committed with these blobs, and perhaps those of other ranks."""
        own = {blob.path: blob for blob in blobs if writer_of(blob.path) == self._rank}
        self._newest = _Newest(directory=directory, blobs=own)


def _may_be_equal(before: BlobInfo, info: BlobInfo) -> bool:
    return before.size_bytes == info.size_bytes and np.array_equal(before.crcs, info.crcs)
