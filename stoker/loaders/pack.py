"""Text to tokens to a data set, with any Hugging Face tokenizer file."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeAlias, get_args

from ..errors import ConfigError, FormatError, KeyNotFound, MissingExtra
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from ._progress import create_once
from ._tables import Tables
from ._texts import Text, TextErrors, TextSources
from .format import PROGRESS_PREFIX, TokenDtype
from .verify import stored_bytes
from .writer import TokenWriter

__all__ = ["PackReport", "pack"]

PackDtype: TypeAlias = Literal["auto", "uint16", "uint32"]

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024
_INPUT_KEY = f"{PROGRESS_PREFIX}input.json"

# End-of-document tokens of the tokenizers in use, the most specific first.
_EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What :func:`pack` has written.

    Attributes:
        documents, tokens: in the data set. resumed_documents: of them, those of an earlier, stopped run.
        empty_documents: without text, left out. skipped_documents: not UTF-8, left out on request.
        source_bytes: of the files read. stored_bytes: of the data set.
        elapsed_s, tokens_per_s: of this run, resumed documents not counted.
    """

    url: str
    dtype: TokenDtype
    eos_id: int | None
    documents: int
    resumed_documents: int
    empty_documents: int
    skipped_documents: int
    tokens: int
    source_bytes: int
    stored_bytes: int
    elapsed_s: float
    tokens_per_s: float
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"ok": True, **asdict(self)}


def pack(
    sources: Sequence[str | Path],
    url: str | Path,
    *,
    tokenizer: str | Path,
    text_column: str = "text",
    glob: str = "*",
    errors: TextErrors = "strict",
    dtype: PackDtype = "auto",
    eos_token: str | None = "auto",
    shard_bytes: int | str = "256MiB",
    block_tokens: int | None = None,
    resume: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> PackReport:
    """Tokenize text files, JSON lines and Parquet and write them as one data set at `url`.

    Documents are stored in the order of `sources` and, inside a directory, of relative paths; the same input gives the
    same bytes. No special token is added but the one that ends each document. A run that was stopped goes on with
    ``resume=True`` and the same input.

    Args:
        sources: local files and directories, see :class:`~stoker.loaders._texts.TextSources`.
        tokenizer: a ``tokenizer.json`` as the package tokenizers saves it; truncation and padding in it are ignored.
        text_column: of JSON objects and Parquet rows.
        glob: which files of a directory, by name (``*.py``) or end of path (``docs/*.md``).
        errors: what to do with text that is not UTF-8: ``"strict"``, ``"replace"`` or ``"skip"``.
        dtype: ``"auto"`` takes uint16 if the vocabulary fits.
        eos_token: ends each document; ``"auto"`` looks for a customary one, None stores documents as they are.
        progress: called with the bytes of the sources as they are read.
        shard_bytes, block_tokens, resume, storage_options: as for :class:`~stoker.loaders.TokenWriter`.

    Raises:
        MissingExtra: the package tokenizers is not installed.
        KeyNotFound, EmptyInput, FormatError, DatasetError: what the input lacks, by file and line.
        ConfigError: an argument breaks its rule, or a resumed run has another input.
        What :class:`~stoker.loaders.TokenWriter` raises.
    """
    for name, value, choices in (("dtype", dtype, get_args(PackDtype)), ("errors", errors, get_args(TextErrors))):
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}", value=value, place="pack")
    began = perf_counter()
    texts = TextSources.find(sources, glob=glob, text_column=text_column, errors=errors)
    encoder, identity = _load_tokenizer(Path(tokenizer))
    eos_id = _find_eos(encoder, eos_token, Path(tokenizer))
    if dtype == "auto":
        dtype = "uint16" if encoder.get_vocab_size(with_added_tokens=True) <= 2**16 else "uint32"
    tally = {"empty": 0, "skipped": 0}
    with TokenWriter(
        url,
        dtype=dtype,
        eos_id=eos_id,
        shard_bytes=shard_bytes,
        block_tokens=block_tokens,
        tokenizer=identity,
        resume=resume,
        storage_options=storage_options,
    ) as writer:
        resumed, resumed_tokens = writer.resumed_documents, writer.tokens
        with open_store(str(url), **dict(storage_options or {})) as store:
            _pin_input(store, texts)
        for batch in _batches(texts, resumed, tally, progress):
            for encoding in encoder.encode_batch_fast([text.text for text in batch], add_special_tokens=False):
                writer.write(encoding.ids)
    elapsed_s = perf_counter() - began
    with open_store(str(url), **dict(storage_options or {})) as store:
        tables = Tables.open(store)
    return PackReport(
        url=store.url,
        dtype=dtype,
        eos_id=eos_id,
        documents=writer.documents,
        resumed_documents=resumed,
        empty_documents=tally["empty"],
        skipped_documents=tally["skipped"],
        tokens=writer.tokens,
        source_bytes=texts.size_bytes,
        stored_bytes=stored_bytes(tables),
        elapsed_s=elapsed_s,
        tokens_per_s=(writer.tokens - resumed_tokens) / elapsed_s,
        fingerprint=tables.manifest.fingerprint,
    )


def _batches(
    texts: TextSources, resumed: int, tally: dict[str, int], progress: Callable[[int], None]
) -> Iterator[list[Text]]:
    """Documents that have text, `resumed` of them left out, in portions that keep all cores busy."""
    batch: list[Text] = []
    characters = 0
    for text in texts:
        progress(text.read_bytes)
        if text.text is None:
            tally["skipped"] += 1
        elif not text.text:
            tally["empty"] += 1
        elif resumed:
            resumed -= 1
        else:
            batch.append(text)
            characters += len(text.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pin_input(store: ObjectStore, texts: TextSources) -> None:
    """Keep what the input was beside the writer's progress; compare if an earlier run has kept it."""
    key = _INPUT_KEY
    data = json.dumps({"identity": texts.identity, "files": len(texts.files)}).encode()
    try:
        before = bytes(store.get(key))
    except KeyNotFound:
        create_once(store, key, data)
        return
    if before != data:
        raise ConfigError(
            "a resumed run needs the same files, sizes, text column and errors",
            value=f"{len(texts.files)} files, {texts.size_bytes} bytes",
            place=store.url,
            hint="give the same input, or delete the directory to start over",
        )


def _load_tokenizer(path: Path) -> tuple[Any, str]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra(
            "packing text needs the package tokenizers", place="pack", hint="pip install 'stoker[demo]'"
        ) from error
    if not path.is_file():
        raise KeyNotFound("no such tokenizer file", place=str(path))
    data = path.read_bytes()
    try:
        encoder = Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises nothing more specific
        raise FormatError("must be a tokenizer.json of Hugging Face", value=str(error), place=str(path)) from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, f"sha256:{hashlib.sha256(data).hexdigest()}"


def _find_eos(encoder: Any, eos_token: str | None, path: Path) -> int | None:
    if eos_token is None:
        return None
    for token in _EOS_TOKENS if eos_token == "auto" else (eos_token,):
        found = encoder.token_to_id(token)
        if found is not None:
            return int(found)
    raise ConfigError(
        "the tokenizer must have the token that ends a document",
        value="none of " + " ".join(_EOS_TOKENS) if eos_token == "auto" else eos_token,
        place=str(path),
        hint="name it with --eos-token, or store documents without one with --eos-token none",
    )
