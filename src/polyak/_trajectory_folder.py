"""The folder of a trajectory: its manifest, its files, and the lock of the one who records.

A file gets its name when it is whole, the manifest names it after that, and what the manifest no
longer names is removed last. So a crash at any instant leaves what some manifest describes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from polyak._checks import ArgumentError, listed, warn_user
from polyak._file_errors import FileError, os_errors, reason
from polyak._replacing import replacing
from polyak._safetensors import LazyTensor, write_safetensors
from polyak.names import NameMismatchError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FORMAT = "polyak.Trajectory"
VERSION = 1
MANIFEST = "trajectory.json"
LOCK = "trajectory.lock"
_OURS = re.compile(r"(block-\d+-\d+|last-\d+)\.safetensors|\.polyak-[0-9a-f]{16}\.tmp")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder."""

    name: str
    size: int
    hash: str
    """BLAKE2b of 16 bytes, in hexadecimal digits."""


@dataclass(frozen=True)
class StoredBlock:
    """A block of the run, in one file."""

    start: int
    stop: int
    """The samples [start, stop)."""
    merges: int
    """How often it was merged."""
    clock: float
    """At its last sample."""
    runs: Sequence[tuple[float, float, int]]
    """The clock at its samples, as `profiles.Run`; empty where the file has it."""
    mean_norm: float
    moment_norm: float
    """‖mean‖ and ‖moment‖ over all tensors."""
    gap: float
    """‖mean − mean of the block before‖; 0 for the first."""
    file: StoredFile


@dataclass(frozen=True)
class StoredLast:
    """The weights and buffers as they were last."""

    samples: int | None
    """How many samples the run had then; None where the run went on from an earlier moment."""
    file: StoredFile


@dataclass(frozen=True)
class StoredTensor:
    """What a tensor of the model is."""

    name: str
    ties: Sequence[str]
    kind: str
    shape: Sequence[int]
    dtype: str
    averaged: bool


@dataclass(frozen=True)
class Manifest:
    """All that is known of a trajectory without opening another file."""

    block: int
    dtype: str | None
    retain: str | int
    tensors: tuple[StoredTensor, ...]
    blocks: tuple[StoredBlock, ...] = ()
    last: StoredLast | None = None

    @property
    def samples(self) -> int:
        """The samples of all blocks."""
        return self.blocks[-1].stop if self.blocks else 0

    @property
    def clock(self) -> float:
        """The clock at the last sample."""
        return self.blocks[-1].clock if self.blocks else 0

    @property
    def files(self) -> set[str]:
        """The names of the files that it names."""
        last = {self.last.file.name} if self.last is not None else set()
        return {block.file.name for block in self.blocks} | last


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None where there is none.

    Raises:
        FileError: it is damaged, of a later version, or no manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    with os_errors(path, "read"):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FileError(f"{path}: damaged ({reason(error)}); copy it again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise FileError(f"{path}: its format is {found!r}, expected {FORMAT!r}")
    version = values.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise FileError(
            f"{path}: has version {version!r}, this polyak reads up to {VERSION}: update polyak"
        )
    written = values.pop("hash", None)
    if written != _hash(values):
        raise FileError(
            f"{path}: damaged: its hash is {_hash(values)}, written was {written}; copy it again"
        )
    try:
        last = values["last"]
        return Manifest(
            block=values["block"],
            dtype=values["dtype"],
            retain=values["retain"],
            tensors=tuple(StoredTensor(**one) for one in values["tensors"]),
            blocks=tuple(
                StoredBlock(**{**one, "file": _file(path, one["file"])}) for one in values["blocks"]
            ),
            last=last and StoredLast(last["samples"], _file(path, last["file"])),
        )
    except (KeyError, TypeError) as error:
        raise FileError(f"{path}: damaged: {reason(error)}; copy it again") from error


def _file(manifest: Path, values: Mapping[str, Any]) -> StoredFile:
    found = StoredFile(**values)
    if not _OURS.fullmatch(found.name):
        raise FileError(f"{manifest}: names {found.name!r}, which is no file of a trajectory")
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder, in one piece."""
    path = folder / MANIFEST
    values = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}))
    values["hash"] = _hash(values)
    with os_errors(path, "write"), replacing(path, overwrite=True) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def _hash(values: Mapping[str, Any]) -> str:
    return _hasher(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _hasher(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=16)


def write_tensors(folder: Path, name: str, state: Mapping[str, Any]) -> StoredFile:
    """Write a safetensors file that appears in one piece."""
    path = folder / name
    with os_errors(path, "write"), replacing(path, overwrite=True) as file:
        hashed = _Hashed(file)
        write_safetensors(path, hashed, state, lambda count: None)  # type: ignore[arg-type]
    return StoredFile(name, hashed.size, hashed.hasher.hexdigest())


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hasher = _hasher()
        self.size = 0

    def write(self, data: Any) -> int:
        self.hasher.update(data)
        self.size += len(data)
        return self._file.write(data)


def open_block(folder: Path, block: StoredBlock) -> dict[str, LazyTensor]:
    """`open_tensors` of a block."""
    holding = f"the block of the samples {block.start} to {block.stop} (clock to {block.clock:g})"
    return open_tensors(folder, block.file, holding)


def open_tensors(folder: Path, stored: StoredFile, holding: str) -> dict[str, LazyTensor]:
    """Check a file against the manifest, and open it to read its tensors one by one.

    Args:
        folder: the folder.
        stored: what the manifest says.
        holding: what it holds, for messages.

    Raises:
        FileError: the file is missing, or its bytes are not those that were written.
    """
    # Not at the top: importing polyak brings in nothing but torch, and this safetensors.
    from polyak import files

    path = folder / stored.name
    damaged = f"{holding} cannot be read. Copy the file again from where it is whole"
    if not path.is_file():
        raise FileError(
            f"{path}: is missing, though {MANIFEST} names it: {damaged}; if the run goes on, it "
            "may have merged the file: open the trajectory again"
        )
    with os_errors(path, "read"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != stored.size:
            raise FileError(f"{path}: has {size} bytes, written were {stored.size}: {damaged}")
        hasher = _hasher()
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    if hasher.hexdigest() != stored.hash:
        raise FileError(
            f"{path}: its hash is {hasher.hexdigest()}, written was {stored.hash}: {damaged}"
        )
    return files.open_checkpoint(path).tensors


def compare(folder: Path, found: Manifest, given: Manifest) -> None:
    """Raise if the record of a folder is another model's, or was made with other settings."""
    theirs, mine = ({t.name: t for t in one.tensors} for one in (found, given))
    problems = [f"recorded, not in the model: {name!r}" for name in theirs if name not in mine]
    problems += [f"in the model, not recorded: {name!r}" for name in mine if name not in theirs]
    for name in sorted(theirs.keys() & mine.keys()):
        there, here = (asdict(one[name]) for one in (theirs, mine))
        problems += [
            f"{name!r} has {key} {there[key]} in the record and {here[key]} in the model"
            for key in there
            if there[key] != here[key]
        ]
    if problems:
        raise NameMismatchError(
            f"{folder} has the record of another model:\n  "
            + listed(problems, "\n  ")
            + "\nChoose another folder, or record the model that it was made from."
        )
    changes = [
        f"{key}: {getattr(found, key)} recorded, {getattr(given, key)} given"
        for key in ("block", "dtype", "retain")
        if getattr(found, key) != getattr(given, key)
    ]
    if changes:
        raise ArgumentError(
            f"the settings differ from those in {folder}:\n  "
            + "\n  ".join(changes)
            + "\nGive the recorded ones to go on, or choose another folder."
        )


def until(folder: Path, manifest: Manifest, clock: float) -> Manifest:
    """Return the manifest without the blocks that end after ``clock``."""
    kept = tuple(block for block in manifest.blocks if block.clock <= clock)
    if len(kept) == len(manifest.blocks):
        return manifest
    cut = manifest.blocks[len(kept)]
    begin = kept[-1].clock if kept else 0
    if cut.merges and begin < clock:
        raise ArgumentError(
            f"resume_at={clock:g} is inside of a merged block of {folder}, from clock {begin:g} to "
            f"{cut.clock:g}: go on from one of these, or with retain='all' in another folder"
        )
    last = manifest.last and replace(manifest.last, samples=None)
    return replace(manifest, blocks=kept, last=last)


def strays(folder: Path, manifest: Manifest | None) -> list[Path]:
    """Return the files of trajectories that the manifest does not name."""
    named = manifest.files if manifest is not None else set()
    with os_errors(folder, "read"):
        found = sorted(folder.iterdir())
    return [path for path in found if _OURS.fullmatch(path.name) and path.name not in named]


def remove(paths: Sequence[Path]) -> None:
    """Remove files, as far as that is possible; what stays is removed when recording resumes."""
    for path in paths:
        # On Windows a file that someone reads cannot be removed.
        with suppress(OSError):
            path.unlink()


def lock(folder: Path) -> int:
    """Make the folder, and lock it for this recorder until the descriptor is closed.

    The system closes it when the process ends, in whatever way.

    Raises:
        FileError: another recorder has the folder, or it cannot be made.
    """
    path = folder / LOCK
    with os_errors(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    with os_errors(path, "write"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            owner = ""
            with suppress(OSError):
                # The first byte is what Windows locks.
                os.lseek(descriptor, 1, os.SEEK_SET)
                owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise FileError(
                f"{folder}: another recorder writes to this folder ({owner or 'not known'}); "
                "close it first, or choose another folder"
            ) from error
        warn_user(f"{path}: cannot be locked here ({error.strerror}); let one recorder alone write")
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f" process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
