"""A directory, or a file, that is either the old one or the new one, whenever the power goes.

Files are written into a hidden sibling and flushed to disk, then the two directories change places in one
step (``renameat2`` with ``RENAME_EXCHANGE``, Linux). Where the system has no such call, the old directory is
renamed aside first; should the process end between the two renames, :func:`standing` finds it there, and the
next write puts it back. What a killed write left behind is ignored by readers and removed by the next write;
a writer holds a lock on what it writes, so nobody removes the work of another that is still at it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: leftovers cannot be told from work in progress, and stay
    fcntl = None  # type: ignore[assignment]

_EXCHANGE = 2
_HERE = -100  # AT_FDCWD: paths are relative to the working directory


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make ``directory`` hold exactly ``files`` (content by file name), replacing it if it exists.

    Raises:
        OSError: something could not be written; the directory is as it was and nothing else is left.
    """
    made = [p for p in (directory.parent, *directory.parent.parents) if not p.exists()]
    partial = _sibling(directory, "partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        clean_up(directory)
        partial.mkdir()
        with _locked(partial):
            for name, content in files.items():
                with open(partial / name, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _flush(partial)
            _put_in_place(partial, directory)
        _flush(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    # The exchange left the old directory under the partial name. It is no longer anybody's.
    shutil.rmtree(partial, ignore_errors=True)


def attempt(path: Path) -> None:
    """See whether ``path`` could be written: something is made beside it, or beside the first parent that it
    lacks, and removed again.

    Raises:
        OSError: nothing can be made there; names ``path``.
    """
    with _naming(path):
        lacking = [p for p in (path, *path.parents) if not os.path.lexists(p.parent)]
        partial = _sibling(lacking[-1].parent if lacking else path, "partial")
        partial.mkdir()
        partial.rmdir()


def write_file(path: Path, content: bytes) -> None:
    """Make the file ``path`` hold exactly ``content``, its parents included.

    Raises:
        OSError: it could not be written; what was there is as it was and nothing else is left. It names
            ``path``.
    """
    with _naming(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)  # a device or a pipe, which cannot be replaced
        else:
            _replace(path.resolve(), content)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(path, "partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def standing(directory: Path) -> Path:
    """Where the directory's content is now: itself, or where an interrupted replacement put it aside."""
    if directory.exists():
        return directory
    return next((path for path, kind in _leftovers(directory) if kind == "old"), directory)


def clean_up(directory: Path) -> None:
    """Finish what killed writes of ``directory`` began: put the old one back, remove the rest."""
    aside = standing(directory)
    if aside != directory:
        os.rename(aside, directory)
    for path, _ in _leftovers(directory):
        with _locked(path) as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the path that was given, not what is made on the way to it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


def _sibling(directory: Path, kind: str) -> Path:
    return directory.parent / f".{directory.name}.{kind}-{uuid.uuid4().hex}"


def _leftovers(directory: Path) -> list[tuple[Path, str]]:
    """Siblings that writes of ``directory`` made, with their kind."""
    pattern = re.compile(rf"\.{re.escape(directory.name)}\.(partial|old)-[0-9a-f]{{32}}")
    if not directory.parent.is_dir():
        return []
    found = [(path, pattern.fullmatch(path.name)) for path in sorted(directory.parent.iterdir())]
    return [(path, match[1]) for path, match in found if match]


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the directory's lock; yields ``False`` when a living writer holds it (or nobody can tell)."""
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _flush(directory: Path) -> None:
    """Flush a directory's entries to disk where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, directory: Path) -> None:
    if not directory.exists():
        try:
            os.rename(partial, directory)
            return
        except OSError as error:  # somebody else was first
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    if not _exchange(partial, directory):
        aside = _sibling(directory, "old")
        os.rename(directory, aside)
        try:
            os.rename(partial, directory)
        except BaseException:
            os.rename(aside, directory)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change places in one step; ``False`` where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(second))
