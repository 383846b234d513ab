"""Forms in which a run of weights is smaller once a general compressor has seen it, and back, bit for bit.

A run is bytes that hold words of one width: 1, 2, 4 or 8 bytes, or half a byte (width 0). A *form* turns them
into streams of bytes. The compressor codes each byte by how often it occurs and finds repetitions, so it pays
to put bytes of one kind side by side, and to say where zeros are instead of coding every one:

- ``plain``: the bytes as they are;
- ``planes``: first bytes of all words, then second bytes …: exponents of floats are few, mantissas are noise;
- ``bitmap``: a bit for each word that says whether it is something else than the most common one, and the
  planes of those that are;
- ``gaps``: how many common words stand before each other one and at the end, a byte each (255: go on), and
  the planes of the others; for when few others are left.

Words of which there are few different ones, as floats that stand for integers of some bits, are listed once
in a :func:`palette` (Han et al., *Deep Compression*, ICLR 2016, section 3); places in it take the forms.

No form looks at a number's value: what comes back are the bytes that were there, whatever they meant.

>>> import numpy as np
>>> weights = np.array([0, 0, 1.5, 0, 0, 0, -2, 0], np.float32).tobytes()
>>> streams, common = encode("gaps", weights, 4)
>>> {name: bytes(stream) for name, stream in streams.items() if name == "gaps"}
{'gaps': b'\\x02\\x03\\x01'}
>>> decode("gaps", Streams(streams), len(weights), 4, common) == weights
True
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError

FORMS = ("plain", "planes", "bitmap", "gaps")
LONG = 255  # a gap's byte that says that more of the same gap follows
PALETTE = 256  # different words at most
GLANCE = 4096  # words that are looked at first

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.unsignedinteger]


class Streams:
    """Streams that are read from their beginning, a part after the other."""

    def __init__(self, content: Mapping[str, bytes]):
        self._content = {name: np.frombuffer(stream, np.uint8) for name, stream in content.items()}
        self._at = dict.fromkeys(content, 0)

    def take(self, name: str, count: int) -> Bytes:
        """The next ``count`` bytes. Raises ArtifactError where there are not so many."""
        part = self.rest(name)[:count]
        if len(part) < count:
            raise ArtifactError(f"stream {name!r} of a compressed artifact ends early")
        self._at[name] += count
        return part

    def rest(self, name: str) -> Bytes:
        """What was not taken yet."""
        if name not in self._content:
            raise ArtifactError(f"a compressed artifact has no stream {name!r}")
        return self._content[name][self._at[name] :]

    @property
    def finished(self) -> bool:
        """Whether everything was taken."""
        return all(at == len(self._content[name]) for name, at in self._at.items())


def forms(width: int) -> tuple[str, ...]:
    """What there is to try for words of a width: a byte has one plane, half a byte is plain as a byte is."""
    pointless = {0: "plain", 1: "planes"}.get(width)
    return tuple(form for form in FORMS if form != pointless)


def encode(form: str, content: bytes, width: int) -> tuple[dict[str, bytes], int]:
    """Stream name → bytes, and the most common word (0 where the form has no use for it).

    Args:
        form: of :data:`FORMS`.
        content: whole words.
        width: bytes of a word; 0 for half a byte.
    """
    if form == "plain":
        return {f"plain {width}": content}, 0
    words = _words(np.frombuffer(content, np.uint8), width)
    if form == "planes":
        return _planes(words, "planes", width), 0
    common = int(np.bincount(words).argmax()) if width < 2 and len(words) else 0
    other = words != common
    streams = _planes(words[other], "others", width)
    if form == "bitmap":
        return {"bitmap": np.packbits(other).tobytes(), **streams}, common
    return {"gaps": _gaps(other), **streams}, common


def decode(form: str, streams: Streams, length: int, width: int, common: int) -> bytes:
    """The inverse of :func:`encode`, which takes its part from each stream.

    Args:
        length: bytes of the run.

    Raises:
        ArtifactError: the streams hold something else.
    """
    if form == "plain":
        return streams.take(f"plain {width}", length).tobytes()
    count = length * 2 if width == 0 else length // width
    if form == "planes":
        return _bytes(_joined(streams, "planes", count, width), width)
    if form == "bitmap":
        other = np.flatnonzero(np.unpackbits(streams.take("bitmap", -(-count // 8)), count=count))
    else:
        other = _positions(streams, count)
    words = np.full(count, common, _dtype(width))
    words[other] = _joined(streams, "others", len(other), width)
    return _bytes(words, width)


def palette(content: bytes, width: int) -> tuple[bytes, bytes] | None:
    """The different words, the smallest first, and each word's place among them.

    ``None`` where there are more than :data:`PALETTE`, or words are bytes.
    """
    if width < 2 or not content:
        return None
    words = np.frombuffer(content, _dtype(width))
    if len(np.unique(words[:GLANCE])) > PALETTE:
        return None
    listed, places = np.unique(words, return_inverse=True)
    if len(listed) > PALETTE:
        return None
    return listed.tobytes(), places.reshape(-1).astype(np.uint8).tobytes()


def looked_up(places: bytes, listed: bytes, width: int) -> bytes:
    """The inverse of :func:`palette`. Raises IndexError for a place that there is not."""
    return np.frombuffer(listed, _dtype(width))[np.frombuffer(places, np.uint8)].tobytes()


def _dtype(width: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{max(width, 1)}")


def _words(content: Bytes, width: int) -> Words:
    if width == 0:
        return np.stack((content & 15, content >> 4), axis=1).reshape(-1)
    return content.view(_dtype(width))


def _bytes(words: Words, width: int) -> bytes:
    if width == 0:
        pairs = words.reshape(-1, 2)
        return (pairs[:, 0] | (pairs[:, 1] << 4)).tobytes()
    return words.tobytes()


def _planes(words: Words, kind: str, width: int) -> dict[str, bytes]:
    """Byte by byte of all words, the lowest first."""
    table = words.view(np.uint8).reshape(-1, max(width, 1))
    return {f"{kind} {width}.{i}": table[:, i].tobytes() for i in range(table.shape[1])}


def _joined(streams: Streams, kind: str, count: int, width: int) -> Words:
    planes = [streams.take(f"{kind} {width}.{i}", count) for i in range(max(width, 1))]
    return np.stack(planes, axis=1).reshape(-1).view(_dtype(width))


def _gaps(other: npt.NDArray[np.bool_]) -> bytes:
    """The gap before each other word and behind the last: as many ``LONG`` as fit, a byte for the rest."""
    gaps = np.diff(np.flatnonzero(other), prepend=-1, append=len(other)) - 1
    long = gaps // LONG
    result = np.full(len(gaps) + int(long.sum()), LONG, np.uint8)
    result[np.cumsum(long + 1) - 1] = gaps % LONG
    return result.tobytes()


def _positions(streams: Streams, count: int) -> npt.NDArray[np.intp]:
    """Where the other words of a run of ``count`` are: its gaps end where they have led past all of it."""
    ahead = streams.rest("gaps")[: count + count // LONG + 2]
    ends = ahead != LONG
    walked = np.cumsum(ahead.astype(np.int64) + ends)
    last = int(np.searchsorted(walked, count + 1))
    if last == len(walked) or walked[last] != count + 1 or not ends[last]:
        raise ArtifactError("gaps of a compressed artifact do not end where its weights do")
    streams.take("gaps", last + 1)
    positions: npt.NDArray[np.intp] = (walked[:last][ends[:last]] - 1).astype(np.intp)
    return positions
