"""The contract of :class:`stoker.storage.ObjectStore` as tests. A store is right when a subclass of this passes.

::

    class TestMyStore(StoreTests):
        @pytest.fixture
        def store(self):
            with MyStore(...) as store:      # an empty root of its own for each test
                yield store
"""

import itertools
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import AlreadyExists, ConfigError, KeyNotFound, ObjectChanged, UnsafeName, UnsupportedError
from ..storage import ObjectStore

__all__ = ["StoreTests"]

# Names whose order differs between a sorted list of keys and a walk through sorted folders.
_KEYS = [
    "A",
    "_a",
    "a b",
    "a+b",
    "a-b/x",
    "a-b.c",
    "a.b/c",
    "a/x",
    "a/y-1/z",
    "a/y.1",
    "a/y/z",
    "a0",
    "a=1/b@2",
    "a~",
    "aa",
    "log/0000.json",
    "log/0001.json",
    "log/0002.json",
]
_UNSAFE = [
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    "./a",
    ".hidden",
    "a/.hidden",
    "a\\b",
    "a\0b",
    "a\nb",
    "s3://b/k",
    "ä",
]


class StoreTests:
    """Subclass it, override :meth:`store`, name the subclass ``Test…``.

    Attributes:
        creates: whether the store promises exclusive creation; if not, `create` must raise UnsupportedError.
        races: rounds of eight concurrent creators; some servers settle one in a second.
        large_bytes: a size that makes the store's writer use more than one piece.
    """

    creates = True
    races = 5
    large_bytes = 3 * 2**20

    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        """A store with an empty root of its own."""
        raise NotImplementedError

    # -- put, get, head, delete

    @pytest.mark.parametrize(
        "data", [b"", b"x", b"some bytes", bytearray(b"some bytes"), memoryview(b"some bytes")[2:7]]
    )
    def test_what_is_put_is_read_back(self, store: ObjectStore, data: bytes) -> None:
        info = store.put("folder/object", data)
        assert (info.key, info.size) == ("folder/object", len(data))
        assert bytes(store.get("folder/object")) == bytes(data)
        head = store.head("folder/object")
        assert (head.key, head.size, head.version) == ("folder/object", len(data), info.version)
        assert head.modified_s > 1.6e9

    def test_a_put_replaces_the_object_as_a_whole(self, store: ObjectStore) -> None:
        store.put("object", b"a long first version")
        store.put("object", b"short")
        assert bytes(store.get("object")) == b"short"
        assert store.head("object").size == 5

    def test_an_object_of_many_pieces_is_put_and_read_back(self, store: ObjectStore) -> None:
        data = random.Random(1).randbytes(self.large_bytes)
        store.put("large", data)
        assert bytes(store.get("large")) == data
        assert bytes(store.get("large", 1_000_001, 2_000_003)) == data[1_000_001:2_000_003]

    def test_a_missing_object_is_a_key_not_found(self, store: ObjectStore) -> None:
        store.put("folder/there", b"1")
        for key in ("missing", "folder", "folder/missing", "folder/there/below"):
            with pytest.raises(KeyNotFound) as caught:
                store.get(key)
            assert key in str(caught.value)
            with pytest.raises(KeyNotFound):
                store.head(key)
            with pytest.raises(KeyNotFound):
                store.get_into(key, memoryview(bytearray(1)))
            assert not store.exists(key)
        assert store.exists("folder/there")

    def test_delete_removes_one_object_and_no_other(self, store: ObjectStore) -> None:
        for key in ("folder/one", "folder/two", "folder-one"):
            store.put(key, b"1")
        store.delete("folder/one")
        assert [info.key for info in store.list()] == ["folder-one", "folder/two"]
        store.delete("folder/one")
        store.delete("never/was")
        store.delete("folder")
        store.delete("folder/two")
        assert [info.key for info in store.list()] == ["folder-one"]
        store.put("folder/two", b"2")
        assert bytes(store.get("folder/two")) == b"2"

    def test_the_view_is_read_only_and_outlives_the_object(self, store: ObjectStore) -> None:
        store.put("object", b"some bytes")
        view = store.get("object")
        assert view.readonly and view.format == "B" and view.contiguous
        store.put("object", b"other byte")
        store.delete("object")
        assert bytes(view) == b"some bytes"

    # -- byte ranges

    @pytest.mark.parametrize(
        ("start", "end"), [(0, None), (0, 10), (3, 7), (3, None), (9, 10), (10, None), (4, 4), (10, 10)]
    )
    def test_a_range_holds_exactly_its_bytes(self, store: ObjectStore, start: int, end: int | None) -> None:
        info = store.put("object", b"0123456789")
        assert bytes(store.get("object", start, end)) == b"0123456789"[start:end]
        assert bytes(store.get("object", start, end, version=info.version)) == b"0123456789"[start:end]
        buffer = bytearray((10 if end is None else end) - start)
        store.get_into("object", memoryview(buffer), start)
        assert bytes(buffer) == b"0123456789"[start:end]

    @pytest.mark.parametrize(("start", "end"), [(0, 11), (10, 11), (11, None), (11, 11), (20, 30)])
    def test_a_range_that_the_object_does_not_hold_is_refused(
        self, store: ObjectStore, start: int, end: int | None
    ) -> None:
        store.put("object", b"0123456789")
        with pytest.raises(ObjectChanged) as caught:
            store.get("object", start, end)
        assert "object" in str(caught.value)

    def test_a_buffer_longer_than_the_rest_is_refused(self, store: ObjectStore) -> None:
        store.put("object", b"0123456789")
        with pytest.raises(ObjectChanged):
            store.get_into("object", memoryview(bytearray(5)), 6)

    @pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 2)])
    def test_a_range_that_is_none_is_refused(self, store: ObjectStore, start: int, end: int) -> None:
        store.put("object", b"0123456789")
        with pytest.raises(ConfigError):
            store.get("object", start, end)

    # -- versions

    def test_each_put_makes_a_new_version(self, store: ObjectStore) -> None:
        versions = [store.put("object", data).version for data in (b"one", b"two", b"three")]
        assert len(set(versions)) == 3
        assert store.head("object").version == versions[-1]

    def test_reading_a_version_that_was_replaced_raises_object_changed(self, store: ObjectStore) -> None:
        old = store.put("object", b"first").version
        new = store.put("object", b"other").version
        for start, end in ((0, None), (1, 3), (2, 2)):
            with pytest.raises(ObjectChanged):
                store.get("object", start, end, version=old)
        with pytest.raises(ObjectChanged):
            store.get_into("object", memoryview(bytearray(2)), version=old)
        assert bytes(store.get("object", version=new)) == b"other"

    # -- create

    def test_only_the_first_create_succeeds(self, store: ObjectStore) -> None:
        if not self.creates:
            with pytest.raises(UnsupportedError):
                store.create("object", b"first")
            assert not store.exists("object")
            return
        info = store.create("folder/object", b"first")
        assert info.size == 5
        with pytest.raises(AlreadyExists) as caught:
            store.create("folder/object", b"second")
        assert "folder/object" in str(caught.value)
        assert bytes(store.get("folder/object", version=info.version)) == b"first"
        assert [info.key for info in store.list()] == ["folder/object"]

    def test_what_was_put_or_deleted_counts_for_create(self, store: ObjectStore) -> None:
        if not self.creates:
            return
        store.put("object", b"put")
        with pytest.raises(AlreadyExists):
            store.create("object", b"created")
        store.delete("object")
        store.create("object", b"created")
        assert bytes(store.get("object")) == b"created"

    def test_of_concurrent_creators_exactly_one_wins(self, store: ObjectStore) -> None:
        if not self.creates:
            return
        creators, rounds = 8, self.races
        barrier = threading.Barrier(creators)
        other = pickle.loads(pickle.dumps(store))  # as another process would have it

        def race(creator: int) -> list[bool]:
            mine = (store, other)[creator % 2]
            won = []
            for number in range(rounds):
                barrier.wait()
                try:
                    mine.create(f"race/{number}", str(creator).encode() * 100)
                    won.append(True)
                except AlreadyExists:
                    won.append(False)
            return won

        with ThreadPoolExecutor(creators) as pool:
            results = list(pool.map(race, range(creators)))
        for number in range(rounds):
            winners = [creator for creator in range(creators) if results[creator][number]]
            assert len(winners) == 1
            assert bytes(store.get(f"race/{number}")) == str(winners[0]).encode() * 100
        other.close()

    # -- list

    def test_a_listing_is_in_lexical_order_of_keys(self, store: ObjectStore) -> None:
        for key in random.Random(2).sample(_KEYS, len(_KEYS)):
            store.put(key, key.encode())
        listed = list(store.list())
        assert [info.key for info in listed] == sorted(_KEYS)
        for info in listed:
            head = store.head(info.key)
            assert (info.size, info.version) == (len(info.key), head.version)
            assert abs(info.modified_s - head.modified_s) <= 1

    def test_prefix_start_after_and_limit_mean_text(self, store: ObjectStore) -> None:
        for key in _KEYS:
            store.put(key, b"1")
        texts = sorted({"", *_KEYS, *(key[:length] for key in _KEYS for length in range(1, len(key)))})
        cases: list[tuple[str, str, int | None]] = [(prefix, "", None) for prefix in texts]
        cases += [("", start_after, None) for start_after in texts]
        chance = random.Random(3)
        cases += [(chance.choice(texts), chance.choice(texts), chance.choice((None, 0, 1, 2, 3))) for _ in range(100)]
        for prefix, start_after, limit in cases:
            want = [key for key in sorted(_KEYS) if key.startswith(prefix) and key > start_after][:limit]
            got = [info.key for info in store.list(prefix, start_after=start_after, limit=limit)]
            assert got == want, (prefix, start_after, limit)

    def test_a_listing_of_nothing_is_empty(self, store: ObjectStore) -> None:
        assert list(store.list()) == []
        store.put("there/object", b"1")
        assert list(store.list("missing/")) == []
        assert list(store.list("there/object/below")) == []

    def test_a_listing_goes_on_over_many_pages(self, store: ObjectStore) -> None:
        keys = [f"many/{number:05d}" for number in range(1200)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
        assert [info.key for info in store.list("many/")] == keys
        assert [info.key for info in store.list("many/", start_after=keys[1100], limit=7)] == keys[1101:1108]

    # -- writers

    def _pieces(self, size: int, count: int) -> tuple[bytes, list[tuple[int, memoryview]]]:
        data = random.Random(size).randbytes(size)
        edges = [size * part // count for part in range(count + 1)]
        return data, [(a, memoryview(data)[a:b]) for a, b in itertools.pairwise(edges)]

    def test_a_writer_publishes_its_pieces_at_commit(self, store: ObjectStore) -> None:
        data, pieces = self._pieces(self.large_bytes, 7)
        with store.open_writer("folder/large", len(data)) as writer:
            for offset, piece in pieces:
                writer.write_at(offset, piece)
            assert not store.exists("folder/large")
            assert list(store.list()) == []
            info = writer.commit()
        assert (info.key, info.size) == ("folder/large", len(data))
        assert bytes(store.get("folder/large", version=info.version)) == data
        assert store.head("folder/large").version == info.version

    def test_pieces_may_come_in_any_order_and_from_several_threads(self, store: ObjectStore) -> None:
        data, pieces = self._pieces(self.large_bytes + 1, 23)
        random.Random(4).shuffle(pieces)
        with store.open_writer("large", len(data)) as writer, ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(writer.write_at, offset, piece) for offset, piece in pieces]:
                done.result()
            writer.commit()
        assert bytes(store.get("large")) == data

    @pytest.mark.parametrize("size", [0, 1, 4096, 5000])
    def test_small_objects_can_be_written_too(self, store: ObjectStore, size: int) -> None:
        data, pieces = self._pieces(size, 1)
        with store.open_writer("small", size) as writer:
            for offset, piece in pieces:
                writer.write_at(offset, piece)
            assert writer.commit().size == size
        assert bytes(store.get("small")) == data

    def test_a_writer_replaces_what_was_there_only_at_commit(self, store: ObjectStore) -> None:
        store.put("object", b"old")
        with store.open_writer("object", 3) as writer:
            writer.write_at(0, b"new")
            assert bytes(store.get("object")) == b"old"
            writer.commit()
        assert bytes(store.get("object")) == b"new"

    @pytest.mark.parametrize("size", [10, 3 * 2**20, -1], ids=["small", "medium", "large"])
    @pytest.mark.parametrize("how", ["abort", "leave", "raise"])
    def test_without_commit_nothing_is_published(self, store: ObjectStore, size: int, how: str) -> None:
        store.put("other", b"1")
        data, _ = self._pieces(self.large_bytes if size < 0 else size, 1)
        if how == "raise":
            with pytest.raises(ZeroDivisionError), store.open_writer("object", len(data)) as writer:
                writer.write_at(0, data)
                raise ZeroDivisionError
        else:
            with store.open_writer("object", len(data)) as writer:
                writer.write_at(0, data)
                if how == "abort":
                    writer.abort()
                    writer.abort()
        assert [info.key for info in store.list()] == ["other"]

    def _refused(self, call: Callable[[], object]) -> None:
        with pytest.raises(ConfigError):
            call()

    def test_a_hole_an_overlap_and_an_overrun_are_refused(self, store: ObjectStore) -> None:
        with store.open_writer("object", 10) as writer:
            writer.write_at(4, b"45")
            self._refused(lambda: writer.write_at(5, b"5"))
            self._refused(lambda: writer.write_at(3, b"34"))
            self._refused(lambda: writer.write_at(8, b"89x"))
            self._refused(lambda: writer.write_at(-1, b"x"))
            self._refused(writer.commit)
        assert not store.exists("object")

    def test_a_writer_is_used_once(self, store: ObjectStore) -> None:
        with store.open_writer("object", 2) as writer:
            writer.write_at(0, b"01")
            writer.commit()
            self._refused(writer.commit)
            self._refused(lambda: writer.write_at(0, b""))
            writer.abort()
        assert bytes(store.get("object")) == b"01"
        with store.open_writer("object", 2) as writer:
            writer.abort()
            self._refused(lambda: writer.write_at(0, b"xx"))
            self._refused(writer.commit)
        assert bytes(store.get("object")) == b"01"

    # -- names, threads, processes

    @pytest.mark.parametrize("key", _UNSAFE)
    def test_a_key_that_could_leave_the_root_is_refused(self, store: ObjectStore, key: str) -> None:
        for call in (
            lambda: store.get(key),
            lambda: store.get_into(key, memoryview(bytearray(1))),
            lambda: store.put(key, b"1"),
            lambda: store.create(key, b"1"),
            lambda: store.open_writer(key, 1),
            lambda: store.head(key),
            lambda: store.exists(key),
            lambda: store.delete(key),
        ):
            with pytest.raises(UnsafeName):
                call()
        assert list(store.list()) == []

    def test_many_threads_may_use_one_store(self, store: ObjectStore) -> None:
        def work(thread: int) -> None:
            for number in range(10):
                key = f"thread-{thread}/{number % 3}"
                data = bytes([thread, number]) * 500
                store.put(key, data)
                assert bytes(store.get(key)) == data
                assert [info.key for info in store.list(f"thread-{thread}/", limit=1)] == [f"thread-{thread}/0"]
                if number == 9:
                    store.delete(key)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert [info.key for info in store.list()] == [f"thread-{t}/{n}" for t in range(8) for n in (1, 2)]

    def test_a_pickled_store_opens_the_same_root(self, store: ObjectStore) -> None:
        store.put("object", b"some bytes")
        with pickle.loads(pickle.dumps(store)) as other:
            assert bytes(other.get("object")) == b"some bytes"
            assert repr(other) == repr(store)
