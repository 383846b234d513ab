"""Debian packages without installing them: a private package state, unpacked into a folder.

``apt-get`` is told to keep its lists and archives in a folder of ours and to believe that nothing is
installed. So it needs no root, resolves the packages of another architecture as it does its own, checks
every signature and hash, and leaves the system as it was. Sources are the system's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BackendError

OS_RELEASE = Path("/etc/os-release")
TOOLS = ("apt-get", "apt-cache", "dpkg", "dpkg-deb")

# Ubuntu serves its foreign architectures from another host than its own, so the system's sources do not do.
_UBUNTU = {"arm64": "http://ports.ubuntu.com/ubuntu-ports", "amd64": "http://archive.ubuntu.com/ubuntu"}
_UBUNTU_KEYS = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"


def missing() -> str:
    """Why packages cannot be fetched here, or nothing."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return (
            f"{', '.join(absent)} not found: the emulator is made of Debian's packages, so this needs "
            "Debian, Ubuntu or a container of either; root is not needed"
        )
    return ""


def host_architecture() -> str:
    """Debian's name of this machine's architecture (``amd64``)."""
    return _call(["dpkg", "--print-architecture"]).strip()


def release() -> dict[str, str]:
    """The fields of ``/etc/os-release``."""
    text = OS_RELEASE.read_text() if OS_RELEASE.exists() else ""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key: value.strip().strip("\"'") for key, value in pairs}


def sources(system: Mapping[str, str], architecture: str) -> str:
    """A sources.list for ``architecture`` where the system's own does not serve it, else nothing.

    >>> print(sources({"ID": "ubuntu", "VERSION_CODENAME": "noble"}, "arm64").splitlines()[0])
    deb [arch=arm64 signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] \
http://ports.ubuntu.com/ubuntu-ports noble main universe
    >>> sources({"ID": "debian"}, "arm64")
    ''
    """
    if "ubuntu" not in (system.get("ID", ""), *system.get("ID_LIKE", "").split()):
        return ""
    code, mirror = system.get("UBUNTU_CODENAME") or system["VERSION_CODENAME"], _UBUNTU[architecture]
    return "".join(
        f"deb [arch={architecture} signed-by={_UBUNTU_KEYS}] {mirror} {code}{suffix} main universe\n"
        for suffix in ("", "-updates", "-security")
    )


class Packages:
    """Packages of one architecture, fetched into a folder of their own.

    Args:
        folder: lists and archives are kept here; an interrupted download goes on where it stopped.
        architecture: Debian's name (``arm64``).
    """

    def __init__(self, folder: Path, architecture: str):
        self.folder, self.architecture = folder.resolve(), architecture
        for part in ("lists/partial", "archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").write_bytes(b"")  # nothing is installed
        self._options = [
            f"Dir::State={self.folder}",
            f"Dir::State::status={self.folder}/status",
            f"Dir::State::lists={self.folder}/lists",
            f"Dir::Cache={self.folder}",
            f"Dir::Cache::archives={self.folder}/archives",
            f"APT::Architecture={architecture}",
            f"APT::Architectures={architecture}",
            "APT::Install-Recommends=false",
            "APT::Sandbox::User=",
            "Acquire::Retries=3",
        ]
        own = sources(release(), architecture)
        if own:
            (self.folder / "sources.list").write_text(own)
            self._options += [f"Dir::Etc::sourcelist={self.folder}/sources.list", "Dir::Etc::sourceparts=-"]

    def update(self) -> None:
        """Fetch the lists of packages; one source of several may fail.

        Raises:
            BackendError: none could be fetched; says why.
        """
        what = "fetch the lists of packages"
        # apt counts a source that does not answer as a warning.
        warned = self._apt("apt-get", "update", what=what, errors=True)
        if not any((self.folder / "lists").glob("*Packages*")):
            lines = [line.removeprefix("W: ") for line in warned.splitlines() if line.startswith("W: ")]
            raise BackendError(f"cannot {what}: {(lines or ['no source has any'])[0]} (apt-get)")

    def depends(self, package: str) -> list[str]:
        """The packages that a package depends on directly, in its own order."""
        text = self._apt("apt-cache", "depends", package, what=f"look up {package}")
        return re.findall(r"^\s*(?:Pre)?Depends: ([^<\s]+)$", text, re.MULTILINE)

    def fetch(self, *packages: str) -> list[Path]:
        """Download packages and all they depend on; the ``.deb`` files."""
        what = f"fetch {', '.join(packages)} for {self.architecture}"
        plan = self._apt("apt-get", "install", "--simulate", *packages, what=what)
        self._apt("apt-get", "install", "--download-only", "--yes", *packages, what=what)
        found = []
        # Archives of an earlier run may lie there, too, in other versions: only those of the plan count.
        for name, version in re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE):
            pattern = f"{name}_{version.replace(':', '%3a')}_*.deb"
            found += sorted((self.folder / "archives").glob(pattern))
        return found

    def fetch_alone(self, package: str) -> Path:
        """Download one package without what it depends on."""
        place = self.folder / "alone"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self._apt("apt-get", "download", package, what=f"fetch {package}", cwd=place)
        return next(place.glob("*.deb"))

    def _apt(
        self, program: str, *arguments: str, what: str, cwd: Path | None = None, errors: bool = False
    ) -> str:
        options = [part for option in self._options for part in ("-o", option)]
        return _call([program, *options, *arguments], what, cwd, errors)


def unpack(archives: Sequence[Path], folder: Path) -> None:
    """The files of ``.deb`` archives, as if ``folder`` were the root directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        _call(["dpkg-deb", "-x", str(archive), str(folder)], f"unpack {archive.name}")
    for name in ("lib", "bin"):  # what base-files has on systems that merged them into /usr
        if not (folder / name).exists() and (folder / "usr" / name).exists():
            (folder / name).symlink_to(f"usr/{name}")


def _call(command: Sequence[str], what: str = "", cwd: Path | None = None, errors: bool = False) -> str:
    """What a command prints: standard output, or with ``errors`` standard error."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        said = (lines or done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise BackendError(f"cannot {what or command[0]}: {said.removeprefix('E: ')} ({command[0]})")
    return done.stderr if errors else done.stdout
