"""A script on two ranks of this machine, as torchrun would start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import polyak


def run(script: str, folder: Path) -> list[Any]:
    """Run ``script folder`` twice and return what each rank saved in ``rank<n>.pt``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(polyak.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(folder)],
            env={**shared, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
