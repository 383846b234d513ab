"""Setting the emulator up, with scripts in the place of Debian's tools and of pip."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from graphprune.emulation import debian, install, wheels
from graphprune.errors import BackendError
from tests.emulation.machines import MODELS

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
ORT = version("onnxruntime")

APT = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
options = [arguments[i + 1] for i, a in enumerate(arguments) if a == "-o"]
asked = [a for i, a in enumerate(arguments) if a != "-o" and (i == 0 or arguments[i - 1] != "-o")]
with open({log!r}, "a") as log:
    print("apt-get", *asked, file=log)
broken = pathlib.Path({log!r} + ".broken")
if broken.exists():
    sys.exit("Ign:1 something\\nE: Failed to fetch http://mirror/x.deb\\nE: " + broken.read_text())
place = pathlib.Path(dict(o.split("=", 1) for o in options)["Dir::Cache::archives"])
offline = pathlib.Path({log!r} + ".offline")
if asked[0] == "update":
    if offline.exists():
        sys.exit(print("W: Failed to fetch http://mirror  Could not resolve 'mirror'", file=sys.stderr))
    (place.parent / "lists/mirror_Packages").write_text("")
if asked[0] == "install":
    if "--simulate" in asked:
        print("NOTE: a simulation")
        print("Inst libc6 (2.36-9 Debian:12/stable [arm64])\\nInst {name} (1:1 Debian:12/stable [arm64])")
    else:
        for name in ("libc6_2.36-9_arm64.deb", "{name}_1%3a1_arm64.deb", "libc6_2.0_arm64.deb"):
            (place / name).write_text(name)
if asked[0] == "download":
    pathlib.Path("qemu_1_amd64.deb").write_text("qemu")
"""
CACHE = "#!/bin/sh\necho 'python3\n  PreDepends: python3-minimal\n  Depends: {name}\n  Depends: <x>'\n"
DEB = """#!{python}
import pathlib, sys
archive, root = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
binaries = root / "usr/bin"
binaries.mkdir(parents=True, exist_ok=True)
if archive.name.startswith("qemu"):
    for name in ("qemu-aarch64-static", "qemu-sparc"):
        (binaries / name).write_text({qemu!r})
        (binaries / name).chmod(0o755)
else:
    (root / "usr/lib").mkdir(exist_ok=True)
    (binaries / "{name}").write_text("")
"""
QEMU = f'#!/bin/sh\nif [ "$2" = help ]; then echo {MODELS}; else echo onnxruntime {ORT}; fi\n'


@pytest.fixture
def system(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A Debian of scripts; gives the calls of apt-get and pip so far."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    log.write_text("")
    values = {"python": sys.executable, "log": str(log), "qemu": QEMU, "name": PYTHON}
    for name, text in (("apt-get", APT), ("apt-cache", CACHE), ("dpkg-deb", DEB)):
        (tools / name).write_text(text.format(**{**values, "qemu": QEMU}))
    (tools / "dpkg").write_text("#!/bin/sh\necho amd64\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(install, "QEMU", ("qemu-aarch64-static",))
    found = install.shutil.which
    monkeypatch.setattr(
        install.shutil, "which", lambda name: None if name == "qemu-aarch64-static" else found(name)
    )
    monkeypatch.setattr(debian, "OS_RELEASE", tmp_path / "os-release")
    monkeypatch.setattr(wheels, "wanted", lambda: {"onnxruntime": ORT})

    def download(packages, folder, python, glibc, flags=()):
        assert glibc == (2, 36)  # not that of the older archive beside it
        with log.open("a") as file:
            print("pip", *(f"{k}=={v}" for k, v in packages.items()), *flags, file=file)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"onnxruntime-{packages['onnxruntime']}-cp311-cp311-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("onnxruntime/__init__.py", "")
        return [path]

    monkeypatch.setattr(wheels, "download", download)
    return lambda: log.read_text().splitlines()


def test_from_nothing(system, tmp_path) -> None:
    said: list[str] = []
    machine = install.install(tmp_path / "arm", pip_flags=["--no-cache-dir"], say=said.append)
    assert machine.python == PYTHON.removeprefix("python")
    assert machine.versions == {"onnxruntime": ORT}
    assert machine.qemu == str(tmp_path / "arm/qemu/usr/bin/qemu-aarch64-static")
    assert sorted(p.name for p in (tmp_path / "arm").iterdir()) == [
        ".lock", "emulator.json", "qemu", "root", "site",
    ]  # fmt: skip
    assert not (tmp_path / "arm/qemu/usr/bin/qemu-sparc").exists()
    assert (tmp_path / "arm/root/lib").resolve() == tmp_path / "arm/root/usr/lib"
    calls = system()
    assert f"apt-get install --download-only --yes {PYTHON} libstdc++6 libgomp1" in calls
    assert calls[-1] == f"pip onnxruntime=={ORT} --no-cache-dir"
    assert len(said) == 5


def test_again_does_nothing(system, tmp_path) -> None:
    install.install(tmp_path / "arm")
    before, said = system(), []
    install.install(tmp_path / "arm", say=said.append)
    assert system() == before
    assert said == []


def test_a_new_runtime_fetches_only_its_wheels(system, tmp_path, monkeypatch) -> None:
    install.install(tmp_path / "arm")
    count = len(system())
    monkeypatch.setattr(wheels, "wanted", lambda: {"onnxruntime": "99.0"})
    with pytest.raises(BackendError, match="the emulated Python answers"):  # the script says what it is
        install.install(tmp_path / "arm")
    assert system()[count:] == ["pip onnxruntime==99.0"]
    assert json.loads((tmp_path / "arm/emulator.json").read_text())["ready"] is False


def test_it_goes_on_where_it_was_interrupted(system, tmp_path, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            install.install(tmp_path / "arm")
    count = len(system())
    assert count > 0
    install.install(tmp_path / "arm")
    assert [line.split()[0] for line in system()[count:]] == ["pip"]


def test_an_interrupted_unpacking_is_not_taken_for_a_whole_one(system, tmp_path, monkeypatch) -> None:
    def half(archives, folder):
        (folder / "usr/bin").mkdir(parents=True)
        (folder / "usr/bin" / PYTHON).write_text("")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(debian, "unpack", half)
        with pytest.raises(OSError, match="No space"):
            install.install(tmp_path / "arm")
    assert not (tmp_path / "arm/root").exists()
    assert install.install(tmp_path / "arm").versions


def test_apt_says_why(system, tmp_path) -> None:
    Path(f"{tmp_path}/log.broken").write_text("Unable to fetch some archives")
    with pytest.raises(BackendError, match=r"^cannot fetch the lists of packages: Unable to fetch") as caught:
        install.install(tmp_path / "arm")
    assert "\n" not in str(caught.value)


def test_without_a_network(system, tmp_path) -> None:
    Path(f"{tmp_path}/log.offline").write_text("")
    with pytest.raises(
        BackendError, match=r"^cannot fetch the lists of packages: Failed to fetch http://mir"
    ):
        install.install(tmp_path / "arm")


def test_without_apt(system, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(
        BackendError, match=r"apt-get, apt-cache, dpkg, dpkg-deb not found: .*root is not need"
    ):
        install.install(tmp_path / "arm")


def test_without_pip(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(wheels.importlib.metadata, "distributions", lambda **_: [])
    with pytest.raises(BackendError, match="no pip"):
        wheels.download({"onnxruntime": ORT}, tmp_path, "3.11", (2, 36))


def test_no_such_wheel(tmp_path, monkeypatch) -> None:
    calls: list[list[str]] = []

    class Done:
        returncode, stderr = 1, "WARNING: x\nERROR: No matching distribution found for onnxruntime==9\n"

    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **options: calls.append(command) or Done())
    with pytest.raises(
        BackendError, match=r"no wheel of onnxruntime==9 for aarch64 and Python 3\.11: No mat"
    ):
        wheels.download({"onnxruntime": "9"}, tmp_path, "3.11", (2, 28))
    platforms = [a.removeprefix("--platform=") for a in calls[0] if a.startswith("--platform")]
    assert platforms[0] == "manylinux_2_28_aarch64"
    assert platforms[-1] == "manylinux2014_aarch64"
    with pytest.raises(BackendError, match=r"no wheel of numpy==1"):
        wheels.download({"numpy": "1"}, tmp_path, "3.11", (2, 28))
    assert [call[-1] for call in calls] == ["onnxruntime==9", "numpy==1", "numpy"]


def test_versions_are_this_hosts() -> None:
    found = wheels.wanted()
    assert found["onnxruntime"] == ORT
    assert found["numpy"] == version("numpy")


def test_ubuntu_serves_arm_from_elsewhere() -> None:
    text = debian.sources({"ID": "ubuntu", "VERSION_CODENAME": "noble"}, "arm64")
    assert [line.split()[-3] for line in text.splitlines()] == ["noble", "noble-updates", "noble-security"]
    assert "ports.ubuntu.com" in text
    assert "archive.ubuntu.com" in debian.sources(
        {"ID_LIKE": "ubuntu debian", "UBUNTU_CODENAME": "n"}, "amd64"
    )
