"""Files in a compact form: weights rearranged, everything through zstd, and back bit for bit.

:func:`pack` asks :mod:`.spans` where the files hold weights and tries for each which of :mod:`.forms` comes
out smallest behind the compressor; streams of one kind are then compressed together. :func:`unpack` believes
nothing that the SHA-256 in the header does not vouch for.

The bytes, in order: ``MAGIC``; SHA-256 of all that follows (32 bytes); length of the index (4 bytes, little
endian); the index, JSON through zstd; the streams, a zstd frame each.

>>> files = {"model.bin": bytes(100_000), "notes.txt": b"none"}
>>> packed = pack(files)
>>> len(packed) < 400, unpack(packed) == files
(True, True)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError, InputError, MissingExtraError
from .forms import FORMS, Streams, decode, encode, forms, looked_up, palette
from .spans import spans

MAGIC = b"GPZ1"
LEVEL = 19
TRIAL = 3  # the level that forms are compared with
LARGEST = 1 << 40  # bytes that a stream may say it holds
MOST_INDEX = 1 << 28
OTHER = "other"  # the stream of everything that is no weight

_WRONG = "this is not a compressed artifact, or it is damaged; restore it or build it again"


def check_compression(compress: str | None) -> None:
    """Whether files can be stored so; ``None`` is as they are.

    Raises:
        InputError: there is no such compression.
        MissingExtraError: ``zstandard`` is not installed.
    """
    if compress not in (None, "zstd"):
        raise InputError(f"compress={compress!r} is not known; give 'zstd', or None")
    if compress:
        _library()


def pack(files: Mapping[str, bytes], *, level: int = LEVEL) -> bytes:
    """Content by name as one sequence of bytes; equal files give equal bytes.

    Args:
        level: zstd's, 1 to 22.

    Raises:
        MissingExtraError: ``zstandard`` is not installed.
    """
    trial, final = _compressor(TRIAL), _compressor(level)
    streams: dict[str, bytearray] = {}
    listed = []
    for name, content in files.items():
        rows = []
        at = 0
        for span in spans(name, content, files):
            _extend(streams, {OTHER: content[at : span.start]})
            found = _smallest(content[span.start : span.stop], span.width, trial)
            _extend(streams, found.streams)
            how = (FORMS.index(found.form), found.width, found.common, found.words)
            rows.append((span.start - at, span.stop - span.start, *how))
            at = span.stop
        _extend(streams, {OTHER: content[at:]})
        listed.append((name, len(content), rows))
    frames = {name: final.compress(bytes(stream)) for name, stream in sorted(streams.items()) if stream}
    sizes = [(name, len(streams[name]), len(frame)) for name, frame in frames.items()]
    index = final.compress(json.dumps([listed, sizes], separators=(",", ":")).encode())
    body = len(index).to_bytes(4, "little") + index + b"".join(frames.values())
    return MAGIC + hashlib.sha256(body).digest() + body


def unpack(content: bytes) -> dict[str, bytes]:
    """The inverse of :func:`pack`.

    Raises:
        ArtifactError: it is damaged, or was never packed.
        MissingExtraError: ``zstandard`` is not installed.
    """
    start = len(MAGIC) + 32
    body = content[start:]
    if not content.startswith(MAGIC) or content[len(MAGIC) : start] != hashlib.sha256(body).digest():
        raise ArtifactError(_WRONG)
    try:
        return _unpacked(body)
    except (ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{_WRONG} ({error})") from error


def _unpacked(body: bytes) -> dict[str, bytes]:
    begin = 4 + int.from_bytes(body[:4], "little")
    listed, sizes = json.loads(_expanded(body[4:begin], MOST_INDEX))
    raw: dict[str, bytes] = {}
    for name, length, packed in sizes:
        raw[name] = _expanded(body[begin : begin + packed], length)
        begin += packed
    streams = Streams(raw)
    files: dict[str, bytes] = {}
    for name, length, rows in listed:
        parts = []
        for skipped, size, form, width, common, words in rows:
            parts += [_other(streams, skipped), _span(streams, size, FORMS[form], width, common, words)]
        parts.append(_other(streams, length - sum(map(len, parts))))
        files[name] = b"".join(parts)
    if begin != len(body) or not streams.finished:
        raise ValueError("it holds more than its files")
    return files


def _other(streams: Streams, count: int) -> bytes:
    return streams.take(OTHER, count).tobytes() if count else b""


def _extend(streams: dict[str, bytearray], parts: Mapping[str, bytes]) -> None:
    for name, part in parts.items():
        streams.setdefault(name, bytearray()).extend(part)


def _span(streams: Streams, size: int, form: str, width: int, common: int, words: int) -> bytes:
    if not words:
        return decode(form, streams, size, width, common)
    listed = streams.take(f"palette {width}", words * width).tobytes()
    return looked_up(decode(form, streams, size // width, 1, common), listed, width)


@dataclass(frozen=True)
class _Coded:
    """A span as streams.

    Attributes:
        form, width, common: what :func:`.forms.decode` asks for.
        words: how many words are listed in a palette, and what is coded are places in it; 0 for none.
    """

    form: str
    width: int
    common: int
    words: int
    streams: Mapping[str, bytes]


def _smallest(content: bytes, width: int, trial: Any) -> _Coded:
    """The span as it compresses best."""

    def size(coded: _Coded) -> int:
        return sum(len(trial.compress(stream)) for stream in coded.streams.values())

    return min(_coded(content, width), key=size)


def _coded(content: bytes, width: int) -> Iterator[_Coded]:
    for words in (width, 0) if width == 1 else (width,):  # a byte may hold two integers of four bits
        for form in forms(words):
            streams, common = encode(form, content, words)
            yield _Coded(form, words, common, 0, streams)
    found = palette(content, width)
    if found is not None:
        listed, places = found
        for form in forms(1):
            streams, common = encode(form, places, 1)
            coded = {f"palette {width}": listed, **streams}
            yield _Coded(form, width, common, len(listed) // width, coded)


def _compressor(level: int) -> Any:
    zstd = _library()
    return zstd.ZstdCompressor(level=level, write_content_size=False)


def _expanded(frame: bytes, most: int) -> bytes:
    """A frame's content, of ``most`` bytes at most."""
    zstd = _library()
    if not 0 <= most <= LARGEST:
        raise ValueError(f"a stream of {most} bytes")
    try:
        content: bytes = zstd.ZstdDecompressor().decompress(frame, max_output_size=most)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from error
    return content


def _library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "compress", "a compressed artifact") from error
    return zstandard
