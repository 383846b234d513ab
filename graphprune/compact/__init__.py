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
from collections.abc import Mapping
from typing import Any

from ..errors import ArtifactError, MissingExtraError
from .forms import FORMS, Streams, decode, encode, forms
from .spans import spans

MAGIC = b"GPZ1"
LEVEL = 19
TRIAL = 3  # the level that forms are compared with
LARGEST = 1 << 40  # bytes that a stream may say it holds
MOST_INDEX = 1 << 28
OTHER = "other"  # the stream of everything that is no weight

_WRONG = "this is not a compressed artifact, or it is damaged; restore it or build it again"


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
            form, width, common, found = _smallest(content[span.start : span.stop], span.width, trial)
            _extend(streams, found)
            rows.append((span.start - at, span.stop - span.start, FORMS.index(form), width, common))
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
        for skipped, size, form, width, common in rows:
            parts += [_other(streams, skipped), decode(FORMS[form], streams, size, width, common)]
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


def _smallest(content: bytes, width: int, trial: Any) -> tuple[str, int, int, dict[str, bytes]]:
    """Form, width, most common word and streams of a span, as they compress best."""
    best: tuple[int, tuple[str, int, int, dict[str, bytes]]] | None = None
    for words in (width, 0) if width == 1 else (width,):  # a byte may hold two integers of four bits
        for form in forms(words):
            streams, common = encode(form, content, words)
            size = sum(len(trial.compress(stream)) for stream in streams.values())
            if best is None or size < best[0]:
                best = size, (form, words, common, streams)
    assert best is not None
    return best[1]


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
