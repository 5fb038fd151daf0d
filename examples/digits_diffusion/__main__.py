"""Start the demo: ``python examples/digits_diffusion``."""

import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
EXTRA = {"matplotlib", "polyak", "rich", "sklearn", "typer"}

if not __package__:
    # Run as a folder, Python puts the folder itself on the path, and the package is its parent's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    try:
        from digits_diffusion.cli import main

        sys.exit(main(started=STARTED))
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRA:
            raise
        sys.exit(f"error: the demo needs {missing.name}: pip install -e '.[demo]'")
