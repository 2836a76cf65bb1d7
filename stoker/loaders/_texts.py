"""Documents of text from files, in an order that depends on their names alone."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeAlias

from ..errors import DatasetError, EmptyInput, FormatError, KeyNotFound, UnsupportedError
from ..storage._posix import translate_os_errors

__all__ = ["Text", "TextErrors", "TextSources"]

TextErrors: TypeAlias = Literal["strict", "replace", "skip"]
"""What to do with bytes that are not UTF-8: stop, put U+FFFD there, or leave the document out."""

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_PARQUET_ROWS = 1024


class Text(NamedTuple):
    """One document.

    Attributes:
        text: None for a document that `errors` says to leave out.
        place: file, line or row, for messages.
        read_bytes: of the source since the document before; the sum over a source is its size.
    """

    text: str | None
    place: str
    read_bytes: int


class _File(NamedTuple):
    path: Path
    name: str  # below its source: what order and identity depend on
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class TextSources:
    """Files and directories to read, in the order given; inside a directory, by relative path.

    ``.jsonl``, ``.ndjson`` (also ``.gz``) and ``.json.gz`` files hold one JSON object a line, ``.parquet`` files one
    document a row, and every other file is one document. Directories are walked without following links; names that
    begin with a dot are passed by.

    Attributes:
        files: what will be read. text_column: of JSON objects and Parquet rows. errors: see :data:`TextErrors`.
    """

    files: tuple[_File, ...]
    text_column: str
    errors: TextErrors

    @classmethod
    def find(cls, sources: Sequence[str | Path], *, glob: str, text_column: str, errors: TextErrors) -> "TextSources":
        """Look for the files; `glob` chooses those inside directories, by name or by the end of the path.

        Raises:
            KeyNotFound: no such file or directory. EmptyInput: no file, or only in a directory that has none.
            UnsupportedError: a source that is a URL.
        """
        files: list[_File] = []
        for source in sources:
            if "://" in str(source):
                raise UnsupportedError(
                    "sources of text are local files and directories", value=str(source), place="pack"
                )
            path = Path(source)
            if path.is_dir():
                found = sorted(_walk(path, glob), key=lambda file: file.name)
                if not found:
                    raise EmptyInput(f"a directory needs files that match {glob!r}", value="none", place=str(path))
                files += found
            elif path.is_file():
                files.append(_File(path, path.name, path.stat().st_size))
            else:
                raise KeyNotFound("no such file or directory", place=str(path))
        if not files:
            raise EmptyInput("pack needs a source", value="none", place="pack")
        return cls(files=tuple(files), text_column=text_column, errors=errors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def identity(self) -> str:
        """Changes if names, order or sizes of files do, or what is read from them."""
        listing = [[file.name, file.size_bytes] for file in self.files]
        return hashlib.sha256(json.dumps([listing, self.text_column, self.errors]).encode()).hexdigest()

    def __iter__(self) -> Iterator[Text]:
        for file in self.files:
            with translate_os_errors(str(file.path)):
                if file.name.lower().endswith(_LINES):
                    yield from self._read_lines(file)
                elif file.name.lower().endswith(".parquet"):
                    yield from self._read_parquet(file)
                else:
                    yield Text(self._decode(file.path.read_bytes(), str(file.path)), str(file.path), file.size_bytes)

    def _decode(self, data: bytes, place: str) -> str | None:
        try:
            return data.decode("utf-8", "replace" if self.errors == "replace" else "strict")
        except UnicodeDecodeError as error:
            if self.errors == "skip":
                return None
            raise FormatError(
                "text must be UTF-8",
                value=f"byte {data[error.start]:#04x} at {error.start}",
                place=place,
                hint="choose files with --glob, or use --errors replace or skip",
            ) from error

    def _read_lines(self, file: _File) -> Iterator[Text]:
        before = 0
        with file.path.open("rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw
            try:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    place = f"{file.path}:{number}"
                    read_bytes, before = raw.tell() - before, raw.tell()
                    decoded = self._decode(line, place)
                    yield Text(None if decoded is None else self._pick(decoded, place), place, read_bytes)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise FormatError("must be a whole gzip file", value=str(error), place=str(file.path)) from error

    def _pick(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FormatError("each line must be JSON", value=str(error), place=place) from error
        if not isinstance(record, dict):
            raise FormatError("each line must be a JSON object", value=type(record).__name__, place=place)
        if self.text_column not in record:
            raise self._no_column(list(record), place)
        return self._text(record[self.text_column], place)

    def _text(self, value: Any, place: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise FormatError(f"column {self.text_column!r} must hold text", value=type(value).__name__, place=place)
        return value

    def _no_column(self, names: list[str], place: str) -> DatasetError:
        return DatasetError(
            f"needs a column {self.text_column!r}",
            value=f"columns {', '.join(names[:20])}",
            place=place,
            hint="name it with --text-column",
        )

    def _read_parquet(self, file: _File) -> Iterator[Text]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file.path) as parquet:
                if self.text_column not in parquet.schema_arrow.names:
                    raise self._no_column(parquet.schema_arrow.names, str(file.path))
                rows, row, told = max(1, parquet.metadata.num_rows), 0, 0
                for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_column]):
                    for value in batch.column(0).to_pylist():
                        reached = file.size_bytes * (row + 1) // rows
                        place = f"{file.path}: row {row}"
                        yield Text(self._text(value, place), place, reached - told)
                        row, told = row + 1, reached
        except pa.ArrowInvalid as error:
            raise FormatError("must be a Parquet file", value=str(error), place=str(file.path)) from error


def _walk(root: Path, glob: str) -> Iterator[_File]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if not name.startswith(".") and PurePosixPath(relative).match(glob) and path.is_file():
                yield _File(path, relative, path.stat().st_size)
