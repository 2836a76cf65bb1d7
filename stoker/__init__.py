"""The I/O layer of PyTorch training.

A tiered cache (RAM, local NVMe, object store) serves sharded Arrow token data sets to prefetching loaders, and writes
asynchronous sharded checkpoints, so that accelerators never wait for bytes.

========================  ==========================================================
:mod:`stoker.storage`     bytes: object stores, tiers, the block cache, checksums
:mod:`stoker.loaders`     tokens: data set format, order, the loader
:mod:`stoker.checkpoint`  tensors: staging, layout, commit, restore, adapters
:mod:`stoker.bench`       answers: benchmarks beside their limits and their peers
:mod:`stoker.testing`     contract suites, faulty wrappers, pytest fixtures
:mod:`stoker.errors`      the one tree of errors
:mod:`stoker.metrics`     counters and the price table
========================  ==========================================================

Nothing is imported here: ``import stoker.storage`` pulls neither torch nor pyarrow.
"""

import sys

__version__ = "0.0.1"
__all__ = ["__version__"]

if sys.platform == "win32":  # pragma: no cover
    raise ImportError("stoker needs POSIX files, locks and shared memory, which Windows lacks: run it inside WSL2")
