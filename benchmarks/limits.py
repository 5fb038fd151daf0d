"""The limits that this project has set itself, and whether a run reached them."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Verdict", "growth_verdicts", "update_limit", "verdicts"]

Record = dict[str, Any]

SOURCE = "the project's design notes, section “Limits to reach”"

UPDATE = {"resnet50": 1.15, "vit_b_16": 1.10, "24x4m": 1.05, "1000x1k": 3.0}
"""Update of float32 weights, × one flat ``lerp_`` over as many float32 elements."""

MIXED_CPU = 1.6
"""Update from bfloat16 weights into a float32 average on a CPU, × the float32 yardstick."""

MIXED_CUDA = 1.3 * 10 / 12
"""The same on a GPU: within 1.3 of the bytes' own limit. Such an update moves 10 bytes an element
(reads 2 and 4, writes 4), the yardstick 12."""

CREATION_BYTES = 4.0
"""Peak at creation, bytes per parameter: one copy, which for bfloat16 is value and low bits, or
float32. Buffers, and a module's own objects, are allowed `SLACK` more."""
SLACK = 1.02

BUCKET_BYTES = 2 * 2**20
"""An update allocates no more than one bucket, 256k float32 elements; as much again is allowed for
what Python and the allocator add, since whole pages of the process are counted."""

IMPORT = 1.1
"""``import polyak``, × ``import torch``."""

OURS = ("polyak WeightAverage", "polyak EMA", "polyak RampUpEMA")


class Verdict(NamedTuple):
    """A limit beside what was measured, both in one unit and the smaller the better."""

    what: str
    measured: float
    limit: float
    unit: str = "×"

    @property
    def reached(self) -> bool:
        """Whether the limit was reached, to the digits that are shown."""
        return round(self.measured, 2) <= round(self.limit, 2)

    @property
    def margin(self) -> float:
        """What was measured by the limit, less 1: 0.1 is a limit missed by 10 %."""
        return self.measured / self.limit - 1

    def to_dict(self) -> Record:
        """Return plain values."""
        return {
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in self._asdict().items()},
            "reached": self.reached,
        }


def update_limit(model: str, dtype: str, contender: str, device: str) -> float | None:
    """Return the limit for an update, × the yardstick, or None where there is none."""
    if contender not in OURS:
        return None
    if dtype == "float32":
        return UPDATE[model]
    # Modules in bfloat16 split every weight into halves; no limit was set for their time.
    if contender != OURS[0]:
        return None
    # Many small tensors are bound by calls, not by bytes: there the float32 limit stands.
    return max(
        MIXED_CUDA if device == "cuda" else MIXED_CPU, UPDATE[model] if model == "1000x1k" else 0
    )


def verdicts(record: Record) -> list[Verdict]:
    """Return each limit that a record of the first benchmark has something about."""
    found = []
    for cell in record["cells"]:
        if cell["operation"] != "update":
            continue
        for name, summary in cell["results"].items():
            limit = update_limit(cell["model"], cell["dtype"], name, record["device"])
            if limit is not None:
                where = f"{cell['model']}, {cell['dtype']}, {cell['threads']} thread(s)"
                found.append(Verdict(f"update, {name}, {where}", summary["ratio"], limit))
    for row in record["memory"]:
        if row["contender"] not in OURS:
            continue
        where = f"{row['contender']}, {row['model']}, {row['dtype']}"
        peak = row["creation_peak_per_parameter"]
        allowed = CREATION_BYTES * SLACK
        found.append(Verdict(f"peak at creation, {where}", peak, allowed, "bytes/parameter"))
        if row["update_peak"] is not None:
            mib = row["update_peak"] / 2**20
            found.append(Verdict(f"peak in updates, {where}", mib, BUCKET_BYTES / 2**20, "MiB"))
    if record["imports"]:
        found.append(Verdict("import polyak", record["imports"]["ratio"], IMPORT))
    return found


def growth_verdicts(record: Record) -> list[Verdict]:
    """Return the limit on several averages of one source: below as many separate updates."""
    found = []
    for point in record["points"]:
        if point["with"] == "averages" and point["at"] > 1:
            both = point["results"]
            ratio = both["together"]["ratio"] / both["separate"]["ratio"]
            what = f"{point['at']} averages, {point['dtype']}, by separate updates"
            found.append(Verdict(what, ratio, 1.0))
    return found
