"""Where the numbers of a run come from: machine, versions, commit, command; and their file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "Record", "available_bytes", "cores", "origin", "write"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    *("torch", "polyak", "mmengine", "mmagic", "timm", "ema-pytorch", "torch-ema", "diffusers"),
    *("numpy", "safetensors"),
]

Record = dict[str, Any]


def origin(device: str) -> Record:
    """Return machine, versions, commit and command as plain values.

    Args:
        device: "cpu" or "cuda".
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": {
            "processor": _processor(),
            "cores": cores(),
            "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
            "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
    }


def write(record: Record, path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp's files are for their owner alone.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free for tensors, 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _meminfo("MemAvailable")


def _meminfo(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), 0)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # The wheel's own version leaves out what it was built for.
    found["torch"] = torch.__version__
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
