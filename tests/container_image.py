"""A container image made of what this machine has: its Python, the emulated engine, nothing else.

No registry is asked. The image runs `python3 -m pytest_llmserve.emulator` or any other script.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from importlib.metadata import files, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# What the emulated engine imports beside the standard library, by the names it is installed under.
DISTRIBUTIONS = ("httptools", "msgspec", "prometheus-client", "pyyaml")
_LEFT_OUT = re.compile(r"/(site-packages|test|tests|__pycache__|idlelib|tkinter|ensurepip)(/|$)")


def write_rootfs(path: Path) -> None:
    """Write a tar of a root file system with this Python as /usr/bin/python3."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = Path(sys.executable).resolve()
    packages = [package for name in _closure(DISTRIBUTIONS) for package in _locations(name)]
    extensions = [*stdlib.glob("lib-dynload/*.so")]
    for package in packages:
        extensions += package.rglob("*.so") if package.is_dir() else ()
    with tarfile.open(path, "w") as tar:
        for library in sorted({lib for binary in (python, *extensions) for lib in _needs(binary)}):
            tar.add(library.resolve(), str(library)[1:])
        tar.add(python, str(python)[1:])
        tar.add(stdlib, str(stdlib)[1:], filter=_wanted)
        for package in packages:
            tar.add(package, f"app/{package.name}", filter=_wanted)
        tar.add(ROOT / "pytest_llmserve", "app/pytest_llmserve", filter=_wanted)
        tar.add(Path(__file__).with_name("fake_server.py"), "app/fake_server.py")
        for name, target in (("python3", python), ("python", python)):
            link = tarfile.TarInfo(f"usr/bin/{name}")
            link.type, link.linkname, link.mode = tarfile.SYMTYPE, str(target), 0o777
            tar.addfile(link)
        for folder in ("tmp", "proc", "sys", "dev"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(entry)


def _closure(names: Iterable[str]) -> list[str]:
    """These distributions and what this Python's installations of them require."""
    found: list[str] = []
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.append(name)
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return sorted(found)


def _locations(name: str) -> set[Path]:
    """The packages, modules and extensions that a distribution puts beside each other."""
    at_top = {
        Path(file.locate()).parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
        for file in files(name) or ()
        if file.suffix in (".py", ".so")
    }
    assert at_top, name
    return {Path(path) for path in at_top}


def _needs(binary: Path) -> list[Path]:
    told = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    return [Path(word) for word in re.findall(r"(/\S+\.so\S*)", told.stdout)]


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if _LEFT_OUT.search(f"/{entry.name}") else entry
