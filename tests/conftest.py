"""What all tests share: one thread, fixed seeds, hypotheses that do not change from run to run."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# Runs beside other workers would fight for the same cores.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "polyak",
    # A shared machine is slow at times; the same examples are tried in every run.
    deadline=None,
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("polyak")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
