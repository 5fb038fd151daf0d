"""The command line as a module: ``python -m polyak``."""

import sys

from polyak.cli import main

sys.exit(main())
