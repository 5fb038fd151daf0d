"""The one file from which an interrupted demo goes on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from digits_diffusion.settings import DemoError, Settings

NAME = "checkpoint.pt"
FORMAT = 1


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that, whatever happens, either the old one or the new one is there.

    Args:
        path: where to.
        write: writes the content to the path that it is given, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files that only their owner reads; results are to be like any other file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, settings: Settings, state: dict[str, Any]) -> None:
    """Write the state of the demo.

    Args:
        path: of the checkpoint.
        settings: that the state was made with.
        state: tensors and plain values.
    """
    content = {"format": FORMAT, "settings": settings.to_dict(), "state": state}
    replace_file(path, lambda temporary: torch.save(content, temporary))


def load(path: Path, settings: Settings) -> dict[str, Any] | None:
    """Read the state of the demo; None if there is no checkpoint.

    Args:
        path: of the checkpoint.
        settings: of this run.

    Raises:
        DemoError: the file is damaged, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, saved, state = content["format"], content["settings"], content["state"]
    # What torch.load raises for a damaged file depends on where the damage is.
    except Exception as error:
        raise DemoError(
            f"{path} is not a checkpoint of this demo, or is damaged: "
            "train anew with --fresh, or choose another --out"
        ) from error
    if version != FORMAT:
        raise DemoError(
            f"{path} has format {version}, but this demo reads format {FORMAT}: "
            "train anew with --fresh, or choose another --out"
        )
    wanted = settings.to_dict()
    differing = [
        f"{name} {saved.get(name)} (now {wanted.get(name)})"
        for name in {**wanted, **saved}
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        raise DemoError(
            f"{path} was made with {', '.join(differing)}: "
            "train anew with --fresh, or choose another --out"
        )
    assert isinstance(state, dict)
    return state
