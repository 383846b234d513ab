"""The file that an iterative run goes on from, and the directory it is kept in.

The file is a line with the SHA-256 of what follows, and what ``torch.save`` writes of tensors, numbers and
text; nothing else is unpickled. The digest is checked before anything is read, because a flipped bit in a
weight would be another network that nobody notices. The file is replaced in one step
(:mod:`graphprune.atomic`), so a run that is killed while it writes goes on from the one before.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphprune import atomic
from graphprune.errors import GraphpruneError, InputError
from graphprune.plans.plan import Plan

from .rounds import Round, table

try:
    import fcntl
except ImportError:  # not POSIX: nobody is kept from starting a run twice
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
HEADER = b"graphprune iterative run, SHA-256 "
FILE, TABLE, LOCK = "state.pt", "rounds.md", "lock"


@dataclass(frozen=True)
class Saved:
    """Where a run stands.

    Attributes:
        settings: what it was started with; another run's state is refused by them.
        before: see :class:`~graphprune.train.rounds.Iterated`.
        done: rounds that are through.
        current: the round that is being trained, its epochs left out.
        tensors: of the network in that round before training; of the last one, when no round is left.
        training: ``finetune``'s state in it, ``None`` before its first epoch is through.
    """

    settings: Mapping[str, Any]
    before: tuple[int, int, float | None]
    done: tuple[Round, ...] = ()
    current: Round | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    @property
    def plans(self) -> list[Plan]:
        """Every plan so far, in order."""
        rounds = [*self.done, *([self.current] if self.current is not None else [])]
        return [Plan.from_json(r.plan) for r in rounds]

    def write(self, directory: Path | None) -> None:
        """Replace the state in the directory, and the table beside it; without one, do nothing.

        Raises:
            InputError: it holds what could not be read again.
            GraphpruneError: the disk is full or failed; what was written last stands.
        """
        if directory is None:
            return
        content = {
            "format": FORMAT,
            "settings": dict(self.settings),
            "before": list(self.before),
            "done": [asdict(r) for r in self.done],
            "current": None if self.current is None else asdict(self.current),
            "tensors": {name: value.detach() for name, value in self.tensors.items()},
            "training": self.training,
        }
        _readable(content)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getbuffer()
        _replace(directory / FILE, b"".join((HEADER, _digest(payload), b"\n", payload)))
        self.write_table(directory)

    def write_table(self, directory: Path | None) -> None:
        """Make the table that of this state, where it is not: a run may be killed between the two files."""
        if directory is None:
            return
        path, text = directory / TABLE, f"{table(self.done, self.before)}\n".encode()
        if not path.exists() or path.read_bytes() != text:
            _replace(path, text)

    @staticmethod
    def read(directory: Path | None) -> Saved | None:
        """The state in a directory, ``None`` where there is none.

        Raises:
            InputError: the file cannot be read, is damaged, or not of this version.
        """
        if directory is None or not (directory / FILE).exists():
            return None
        path = directory / FILE
        payload = _checked(path)
        try:
            content = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
            version = content["format"]
            if version > FORMAT:
                raise InputError(f"it has format {version}, this version reads up to {FORMAT}")
            macs, parameters, score = content["before"]
            return Saved(
                content["settings"], (macs, parameters, score), tuple(_round(r) for r in content["done"]),
                None if content["current"] is None else _round(content["current"]),
                content["tensors"], content["training"],
            )  # fmt: skip
        except (InputError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
            # The bytes are those that were written: by another version, or by something else.
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{path} is not the state of an iterative run that this version reads ({reason}); give "
                "another directory, or remove the file to start again"
            ) from error


def _replace(path: Path, content: bytes) -> None:
    try:
        atomic.write_file(path, content)
    except OSError as error:
        raise GraphpruneError(
            f"cannot write {path}: {error.strerror or error}; the state that was written last stands: make "
            "room, and the same call goes on from it"
        ) from error


def _readable(content: Any) -> None:
    """Raise unless ``torch.load`` reads every leaf without unpickling code; it would refuse too late."""
    for path, leaf in pytree.tree_flatten_with_path(content)[0]:
        if not isinstance(leaf, torch.Tensor) and type(leaf) not in (bool, int, float, str, NoneType):
            raise InputError(
                f"the state of the run cannot be kept: {pytree.keystr(path)} is a {type(leaf).__name__}, and "
                "only tensors, numbers and text are read again; give the optimizer plain ones: float(lr)"
            )


def _digest(payload: bytes | memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()


def _checked(path: Path) -> bytes:
    """What stands behind the header of a state, when it is what was written.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            line, payload = file.readline(), file.read()
    except OSError as error:
        raise InputError(f"cannot read the state of the run, {path}: {error.strerror or error}") from error
    if not line:
        reason = "it is empty"
    elif not line.startswith(HEADER):
        reason = "it does not begin as the state of an iterative run does"
    elif line != HEADER + _digest(payload) + b"\n":
        reason = "its checksum is not that of its content: cut short, or changed after it was written"
    else:
        return payload
    raise InputError(
        f"{path}, the state of a run, is damaged: {reason}; put a copy of it back, or remove it to start "
        "again"
    )


def _round(values: Mapping[str, Any]) -> Round:
    Plan.from_json(values["plan"])  # an error here can still name the file
    return Round(**{**values, "losses": tuple(values["losses"]), "scores": tuple(values["scores"])})


@contextmanager
def held(directory: Path | None) -> Iterator[None]:
    """Keep a directory to this process, and remove what killed writes left in it.

    Raises:
        InputError: it cannot be written, or another process runs in it.
    """
    if directory is None:
        yield
        return
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(directory / LOCK, "ab"))
            if not os.access(directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if fcntl is not None:
                # Not flock: what the data forked would hold it for seconds after this process was killed.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in (FILE, TABLE):
                    for left in directory.glob(f".{name}.partial-*"):
                        left.unlink(missing_ok=True)
        except BlockingIOError:
            raise InputError(
                f"another process runs in {directory}; wait for it, or give another directory"
            ) from None
        except OSError as error:
            raise InputError(
                f"the state of the run cannot be kept in {directory}: {error.strerror or error}; give a "
                "directory that can be written"
            ) from error
        yield
