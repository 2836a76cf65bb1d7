"""One policy for every request to an object store: how many at once, when again, when twice, when to give up.

A call is one or more *attempts*. Each attempt runs on a thread of its own, so that the caller can stop waiting for it:
clients of object stores can't be interrupted. Only a read that ends soon by itself, and of which no second one may be
sent now, stays on its caller's thread. Around the attempts, in this order:

1. bytes in flight: one budget for the process (:class:`~stoker.storage._limits.ByteBudget`);
2. retries and the breaker, per endpoint (:class:`~stoker.storage._health.Health`), with capped exponential back-off and
   full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015);
3. requests under way, per endpoint and node (:class:`~stoker.storage._limits.RequestLimit`);
4. a second attempt for a read that is late (:class:`~stoker.storage._hedging.Hedging`).

This is the one layer that retries: the clients below it do not.
"""

import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Generic, TypeVar

from ..errors import BadReply, ConfigError, StokerError, StoreUnavailable, Throttled, Unreachable
from ..metrics import counters
from ._health import Health
from ._hedging import Hedging
from ._limits import ByteBudget, RequestLimit
from ._units import parse_bytes
from ._workers import Workers

__all__ = ["Attempt", "Network", "NetworkPolicy", "use_network"]

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_SLOWEST_BYTES_PER_S = 1 << 20
"""A request may take longer by what its bytes take at this rate."""
_BAD_REPLIES = 4
"""One may be a mistake on the way; a server that always answers so will go on."""
_FIRST_CONTACT_S = 15.0
"""An endpoint that nobody ever reached is given up sooner: its URL is more likely wrong than it is down."""


@dataclass(frozen=True, kw_only=True)
class NetworkPolicy:
    """How stoker behaves towards an object store.

    Attributes:
        connect_timeout_s: for a connection.
        stall_timeout_s: for the first byte of a reply, and between two pieces of it.
        attempt_timeout_s: for one request, and a second more for each MiB of it.
        timeout_s: for a call with all that it repeats, and a second more for each MiB of it. Multipart uploads have
            none of their own: a save or a copy has its deadline.
        max_requests: requests under way at once, of all processes of this node to one endpoint. What is really used
            begins at 32, follows what the endpoint bears, and is bounded by the callers' threads.
        hedge_share: second requests for late reads, as a share of all reads; 0 for none.

    >>> NetworkPolicy(timeout_s=0)
    Traceback (most recent call last):
        ...
    stoker.errors.ConfigError: NetworkPolicy: timeout_s must be > 0, got 0
    """

    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 10.0
    attempt_timeout_s: float = 30.0
    timeout_s: float = 120.0
    max_requests: int = 128
    hedge_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "stall_timeout_s", "attempt_timeout_s", "timeout_s", "max_requests"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0", value=getattr(self, name), place="NetworkPolicy")
        if not 0 <= self.hedge_share < 1:
            raise ConfigError("hedge_share must be in [0, 1)", value=self.hedge_share, place="NetworkPolicy")

    def request_timeout_s(self, size: int) -> float:
        """How long one request of `size` bytes may take."""
        return self.attempt_timeout_s + size / _SLOWEST_BYTES_PER_S


@dataclass(frozen=True, kw_only=True)
class Attempt(Generic[T]):
    """What a call sends, once or several times.

    Attributes:
        send: one request, on whatever thread; its argument says whether it is a second one for the same call, which
            must go over another connection. It raises typed errors: :class:`~stoker.errors.StoreUnavailable` for what
            is worth another try, anything else for an answer that stands.
        place: what it is about, for messages.
        size: bytes that it moves, as far as that is known.
        hedge: whether sending it twice at once is harmless and of use.
        ends_in_s: by when `send` ends by itself, whatever the network does.
    """

    send: Callable[[bool], T]
    place: str
    size: int = 0
    hedge: bool = False
    ends_in_s: float = inf


# Guarantees: call() may be called from any thread.
class Network:
    """The state of one endpoint in this process, shared by all stores that speak to it with one policy."""

    def __init__(self, name: str, policy: NetworkPolicy) -> None:
        self.policy = policy
        self.limit = RequestLimit(name, policy.max_requests)
        self.health = Health()
        self._hedging = Hedging(policy.hedge_share)
        self.workers = Workers("stoker-network")
        self._reached = False

    def call(self, attempt: Attempt[T]) -> T:
        """The result of `attempt`, by the policy's deadline.

        Raises:
            StoreUnavailable: no usable answer by then. A write may have been done, or may still be.
            StokerError: what the store answered.
        """
        began = monotonic()
        deadline = began + self.policy.timeout_s + attempt.size / _SLOWEST_BYTES_PER_S
        with bytes_in_flight.reserved(attempt.size, deadline, attempt.place):
            failures = 0
            # Not the error itself: its traceback holds this frame, and such circles would keep stores alive.
            kind: type[StoreUnavailable] = StoreUnavailable
            found: object = "nothing, to no request of this process"
            while (turn := self.health.turn(deadline, again=failures > 0)) is not None:
                sent_at = monotonic()
                try:
                    with self.limit.slot(deadline):
                        sent_at = monotonic()
                        result = self._race(attempt, deadline)
                except StoreUnavailable as error:
                    if isinstance(error, Throttled) and turn == "go":
                        self.limit.throttled(sent_at)
                    self.health.failed(turn)
                    failures, kind, found = failures + 1, type(error), error.value
                    if isinstance(error, BadReply) and failures >= _BAD_REPLIES:
                        break
                    if not isinstance(error, Unreachable):
                        self._reached = True
                    elif not self._reached:
                        deadline = min(deadline, began + _FIRST_CONTACT_S)
                except StokerError:
                    self.health.answered(turn)
                    self._reached = True
                    raise
                except BaseException:
                    self.health.failed(turn)
                    raise
                else:
                    self.health.answered(turn)
                    self.limit.succeeded()
                    self._reached = True
                    return result
                counters.add("store.retries")
                pause_s = random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures, 10)))
                if monotonic() + pause_s >= deadline:
                    break
                if not self.health.is_open:  # the breaker has pauses of its own
                    time.sleep(pause_s)
        raise kind(
            "the store must answer",
            value=f"{found}, {failures} times in {monotonic() - began:.1f} s",
            place=attempt.place,
        ) from None

    def _race(self, attempt: Attempt[T], deadline: float) -> T:
        """The first success of a request and, if it is late, a second one."""
        began = monotonic()
        delay_s = self._hedging.sent(attempt.size) if attempt.hedge else None
        # Another thread costs a tenth of the processor time of a 4 MiB read, so none where nobody would stop waiting for
        # it. Never the main one: Ctrl-C does not interrupt a client.
        stays = delay_s is None and began + attempt.ends_in_s <= deadline
        if stays and threading.current_thread() is not threading.main_thread():
            result = attempt.send(False)
            self._hedging.won(attempt.size, monotonic() - began)
            return result
        deadline = min(deadline, began + self.policy.request_timeout_s(attempt.size))
        finished: queue.SimpleQueue[_Finished[T]] = queue.SimpleQueue()
        self._begin(attempt, finished, second=False)
        running = 1
        while True:
            left_s = deadline - monotonic()
            late = delay_s is not None and running == 1 and delay_s < left_s
            try:
                done = finished.get(timeout=max(0.0, delay_s if late and delay_s is not None else left_s))
            except queue.Empty:
                if late and self._hedging.allow():
                    counters.add("store.hedges")
                    self._begin(attempt, finished, second=True)
                    running += 1
                elif not late:
                    raise StoreUnavailable("the store must answer", value="timed out", place=attempt.place) from None
                delay_s = None
                continue
            if done.error is None:
                if done.second:
                    counters.add("store.hedges.won")
                    self._hedging.paid_off()
                if attempt.hedge:
                    self._hedging.won(attempt.size, done.seconds)
                return done.result  # type: ignore[return-value]  # set where error is not
            running -= 1
            # A failure does not decide a race while the other may still win, but an answer does.
            if not running or not isinstance(done.error, StoreUnavailable):
                try:
                    raise done.error
                finally:
                    del done  # or the error and this frame hold each other

    def _begin(self, attempt: Attempt[T], finished: "queue.SimpleQueue[_Finished[T]]", *, second: bool) -> None:
        def run() -> None:
            began = monotonic()
            result, error = None, None
            try:
                result = attempt.send(second)
            except BaseException as raised:  # noqa: BLE001 - raised again by the caller
                error = raised
            finished.put(_Finished(result, error, monotonic() - began, second))
            error = None  # or it and this frame hold each other

        self.workers.run(run)

    def map(self, tasks: "list[Callable[[], None]]") -> None:
        """Run `tasks` side by side; raises the first error once all have ended."""
        finished: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run(task: Callable[[], None]) -> None:
            try:
                task()
            except BaseException as raised:  # noqa: BLE001 - raised again by the caller
                finished.put(raised)
            else:
                finished.put(None)

        for task in tasks:
            self.workers.run(lambda task=task: run(task))  # type: ignore[misc]
        ended = [finished.get() for _ in tasks]
        failed = next(filter(None, ended), None)
        del ended
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # or the error and this frame hold each other


class _Finished(Generic[T]):
    """How one attempt ended."""

    __slots__ = ("error", "result", "second", "seconds")

    def __init__(self, result: T | None, error: BaseException | None, seconds: float, second: bool) -> None:
        self.result, self.error, self.seconds, self.second = result, error, seconds, second


bytes_in_flight = ByteBudget(parse_bytes("512MiB", place="bytes in flight"))
"""Of all stores of this process: enough for 64 requests of 8 MiB."""

_networks: dict[tuple[str, NetworkPolicy], tuple[Network, int]] = {}
"""Each network with the number of its users. `_networks_lock` guards it."""
_networks_lock = threading.Lock()
_left: "deque[tuple[tuple[str, NetworkPolicy], Network]]" = deque()
"""Networks that a user has left. A finalizer may run on any thread at any moment, also on one that holds the lock: it
notes here that it was there, and does the rest only if the lock is free; the next one who takes the lock does it otherwise.
"""


def use_network(name: str, policy: NetworkPolicy) -> tuple[Network, Callable[[], None]]:
    """The one network of this process for an endpoint and a policy, and what its user calls, once, when it is done."""
    key = (name, policy)
    fresh: Network | None = None
    while True:
        with _networks_lock:
            network, users = _networks.get(key, (fresh, 0))
            if network is not None:
                _networks[key] = (network, users + 1)
                break
        fresh = Network(name, policy)  # not under the lock: it takes a while, and finalizers may run in it
    if fresh is not None and fresh is not network:
        fresh.limit.close()
    _close_left()

    def leave() -> None:
        _left.append((key, network))
        _close_left()

    return network, leave


def _close_left() -> None:
    """Close the networks that their last users have left, unless somebody else is at it."""
    while _left and _networks_lock.acquire(blocking=False):
        unused = []
        try:
            while _left:
                key, network = _left.popleft()
                found, users = _networks.get(key, (None, 0))
                if found is not network:  # made before a fork
                    continue
                if users > 1:
                    _networks[key] = (network, users - 1)
                    continue
                del _networks[key]
                unused.append(network)
        finally:
            _networks_lock.release()
        for network in unused:
            network.limit.close()
            network.workers.close()


def _forget_in_child() -> None:
    global _networks_lock
    _networks_lock = threading.Lock()
    _networks.clear()  # their threads stayed with the parent
    _left.clear()


os.register_at_fork(after_in_child=_forget_in_child)
