"""The process that fetches for a forked child: ``python -m stoker.storage.fetch_helper``; see :mod:`stoker.storage.fetch`."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..errors import StokerError, StoreUnavailable
from .fetch import receive, send
from .store import ObjectStore
from .urls import open_store

__all__ = ["main"]


def main() -> None:
    """Serve requests from standard input until it is closed."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not break the protocol
    stores: dict[Any, ObjectStore] = {}
    opening, sending = threading.Lock(), threading.Lock()

    def store_of(given: Any) -> ObjectStore:
        with opening:  # makes no request
            if repr(given) not in stores:
                stores[repr(given)] = open_store(given[0], **dict(given[1]))
            return stores[repr(given)]

    def serve(number: int, given: Any, method: str, arguments: tuple[Any, ...], data: memoryview) -> None:
        reply: Any = None
        sent = memoryview(b"")
        try:
            reply, sent = _answer(store_of(given), method, arguments, data)
        except StokerError as error:
            reply = error
        except Exception as error:  # noqa: BLE001 - it is raised in the process that asked
            reply = StoreUnavailable("the helper that fetches must work", value=repr(error), place="stoker-fetch")
        with sending, suppress(BrokenPipeError):
            send(replies, (number, reply), sent)

    with ThreadPoolExecutor(64, thread_name_prefix="stoker-fetch") as threads, suppress(EOFError, KeyboardInterrupt):
        while True:
            (number, (given, method, arguments)), data = receive(requests)
            threads.submit(serve, number, given, method, arguments, data)


def _answer(store: ObjectStore, method: str, arguments: tuple[Any, ...], data: memoryview) -> tuple[Any, memoryview]:
    if method == "get":
        key, start, end, version = arguments
        return None, store.get(key, start, end, version=version)
    if method == "list":
        prefix, start_after, limit = arguments
        return list(store.list(prefix, start_after=start_after, limit=limit)), memoryview(b"")
    call: Callable[..., Any] = getattr(store, method)
    return call(*arguments, data) if method in ("put", "create") else call(*arguments), memoryview(b"")


if __name__ == "__main__":
    main()
