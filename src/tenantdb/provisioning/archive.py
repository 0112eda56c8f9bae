"""The file of an export: a tar of the data and a manifest with its hash, which any tar can open.

It is written in one go and in constant memory, and gets its name when it is whole. A hash finds damage; it does not tell who made a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import UUID

from tenantdb.errors import ImportRefused

FORMAT, VERSION = "tenantdb-export", 1
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an export, its size in bytes and its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a file of `TenantDB.export` holds, as its manifest says.

    ``tenant`` is the id of the tenant whose data it is, ``revision`` what its schema was at, ``sha256`` that of the manifest, which has the
    hashes of all the rest. ``made_with`` is the program, ``path`` where the file is.
    """

    path: str
    sha256: str
    tenant: UUID
    made_at: datetime
    backend: str
    server_version: str
    made_with: str
    tenantdb_version: str
    revision: str | None
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is known about an export before and after the data is written."""

    tenant: UUID
    made_at: datetime
    backend: str
    server_version: str
    tenantdb_version: str
    revision: str | None


class _Hashing(io.RawIOBase):
    """Passes on what is written, or read, and knows its hash and size."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], object] = lambda _: None) -> None:
        self._file = file
        self._tell = tell
        self._hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        self._tell(self.size)
        return len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file under another name, mode 0600, that gets its own when the block ends well, and is gone otherwise.

    Raises: `FileExistsError` where something has the name, unless ``overwrite``; `OSError`.
    """
    if not overwrite and path.exists():
        raise FileExistsError(path.name)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            partial.replace(path)
        else:
            _name(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _name(partial: Path, path: Path) -> None:
    """Unlike a rename a link never replaces what came meanwhile; some file systems have none. Raises: `FileExistsError`, `OSError`."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(path.name) from None
        partial.rename(path)


def write(
    file: BinaryIO, path: Path, about: About, member: str, carry: Callable[[BinaryIO], str], tell: Callable[[int], object] = lambda _: None
) -> Export:
    """Write an archive: what ``carry`` writes, and the manifest. How much that is turns out at the end, so its header comes last."""
    file.write(bytes(_BLOCK))
    data = _Hashing(file, tell)
    made_with = carry(cast("BinaryIO", data))
    _pad(file, data.size)
    file.seek(0)
    file.write(_header(member, data.size, about.made_at))
    file.seek(0, os.SEEK_END)
    members = (Member(member, data.size, data.sha256),)
    manifest = _manifest(about, made_with, members)
    file.write(_header(MANIFEST, len(manifest), about.made_at))
    file.write(manifest)
    _pad(file, len(manifest))
    file.write(bytes(2 * _BLOCK))
    return _export(path, manifest)


def _header(name: str, size: int, made_at: datetime) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = size, int(made_at.timestamp()), 0o600
    return header.tobuf(tarfile.GNU_FORMAT)  # which has one block for any size


def _pad(file: BinaryIO, size: int) -> None:
    file.write(bytes(-size % _BLOCK))


def _manifest(about: About, made_with: str, members: tuple[Member, ...]) -> bytes:
    told: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **asdict(about),
        "tenant": str(about.tenant),
        "made_at": about.made_at.isoformat(),
        "made_with": made_with,
        "members": {member.name: {"size": member.size, "sha256": member.sha256} for member in members},
    }
    return json.dumps(told, indent=2, sort_keys=True).encode() + b"\n"


def _export(path: Path, manifest: bytes) -> Export:
    told = json.loads(manifest)
    if not isinstance(told, Mapping) or told.get("format") != FORMAT:
        raise ImportRefused("it is no export of tenantdb")
    if told.get("version") != VERSION:
        raise ImportRefused("a newer tenantdb made it; upgrade this one")
    texts = {name: _text(told[name]) for name in ("backend", "server_version", "made_with", "tenantdb_version")}
    revision = told["revision"]
    return Export(
        path=str(path),
        sha256=hashlib.sha256(manifest).hexdigest(),
        tenant=UUID(told["tenant"]),
        made_at=datetime.fromisoformat(told["made_at"]),
        revision=None if revision is None else _text(revision),
        members=tuple(Member(_text(name), int(each["size"]), _text(each["sha256"])) for name, each in told["members"].items()),
        **texts,
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise ValueError("no such text")
    return value


class Opened:
    """An export to be read. Its manifest is read, and nothing of it is verified yet."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found: dict[str, tuple[int, int]] = {}
                for entry in tar:
                    if entry.type != tarfile.REGTYPE or entry.issparse() or entry.name in found or len(found) > 1:
                        raise ImportRefused("it holds other things than an export of tenantdb does")
                    found[entry.name] = (entry.offset_data, entry.size)
            offset, size = found[MANIFEST]
            if size > _LARGEST_MANIFEST:
                raise ImportRefused("its manifest is too large")
            file.seek(offset)
            self.export = _export(path, file.read(size))
            (self._member,) = self.export.members
            self._offset, actual = found[self._member.name]
        except (tarfile.TarError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ImportRefused("it is no export of tenantdb, or damaged") from error
        if actual != self._member.size or set(found) != {MANIFEST, self._member.name}:
            raise ImportRefused("it is no export of tenantdb, or damaged")

    def data(self) -> BinaryIO:
        """The data from its beginning. At its end it raises `ImportRefused` where it is not what the manifest says."""
        self._file.seek(self._offset)
        return cast("BinaryIO", _Checked(self._file, self._member))

    def verify(self, tell: Callable[[int, int], object] = lambda *_: None) -> None:
        """Read all of it once. Raises: `ImportRefused` where it is not what the manifest says."""
        data, done = self.data(), 0
        while chunk := data.read(1 << 20):
            done += len(chunk)
            tell(done, self._member.size)


class _Checked:
    def __init__(self, file: BinaryIO, member: Member) -> None:
        self._file = file
        self._member = member
        self._left = member.size
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(self._left if size < 0 else min(size, self._left))
        self._hash.update(chunk)
        self._left -= len(chunk)
        if (not chunk and self._left) or (not self._left and self._hash.hexdigest() != self._member.sha256):
            raise ImportRefused(f"{self._member.name} in it is not what its manifest says: it was damaged or changed")
        return chunk


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Raises: `ImportRefused`, also for a file that is not there or cannot be read."""
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise ImportRefused(f"{path.name!r} cannot be opened on this machine ({error.strerror or type(error).__name__})") from error
    with file:
        yield Opened(file, path)
