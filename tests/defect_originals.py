"""The original libraries going wrong, one function for each row of defects that they show."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from defect_models import (
    SEED,
    Buffered,
    Complex,
    CountsCopies,
    HostReads,
    Misnamed,
    Tied,
    Vector,
    WithExtraState,
    change,
    drive,
    normed,
    weight_normed,
)

_PINNED = {"mmengine": "0.10.7", "mmagic": "1.2.0", "torch": "2.13."}
_torch_ema: Any = get_ema_multi_avg_fn(0.9998)  # type: ignore[no-untyped-call]
_torch_swa: Any = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
_EVIDENCE: dict[int, tuple[tuple[str, ...], Callable[[], None]]] = {}


def _evidence(row: int, *libraries: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(shows: Callable[[], None]) -> Callable[[], None]:
        _EVIDENCE[row] = (libraries, shows)
        return shows

    return register


@cache
def there(row: int) -> None:
    """Check that the original goes wrong as ``row`` says, where its pinned version is installed."""
    libraries, shows = _EVIDENCE[row]
    if all(_installed(library).startswith(_PINNED[library]) for library in libraries):
        shows()


@cache
def _installed(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _mmengine() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.", DeprecationWarning)
        import mmengine.model
    return mmengine.model


@cache
def _mmagic() -> Any:
    """The one file of mmagic that is needed; the package itself wants mmcv."""
    _mmengine()
    package = importlib.util.find_spec("mmagic")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "models" / "base_models" / "average_model.py"
    spec = importlib.util.spec_from_file_location("mmagic_average_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    registry = ModuleType("mmagic.registry")
    registry.MODELS = SimpleNamespace(  # type: ignore[attr-defined]
        register_module=lambda: lambda registered: registered
    )
    stubs = {"mmagic": ModuleType("mmagic"), "mmagic.registry": registry}
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module


def _ema(model: nn.Module, **kwargs: Any) -> Any:
    return _mmengine().ExponentialMovingAverage(model, **{"momentum": 0.1, **kwargs})


def _filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _step(average: Any, model: nn.Module, *weights: float) -> None:
    for weight in weights:
        average.update_parameters(_filled(model, weight))


@_evidence(1, "mmagic", "mmengine")
def _() -> None:
    model = Vector()
    average = _mmagic().RampUpEMA(model, start_iter=5, ema_rampup=None)
    _step(average, model, 1.0, 2.0)
    assert not torch.equal(average.module.weight, model.weight)


@_evidence(2, "mmagic", "mmengine")
def _() -> None:
    model = Vector()
    average = _mmagic().ExponentialMovingAverage(model)
    average.load_state_dict({"weight": torch.full((4,), 7.0)})
    _step(average, model, 1.0)
    assert torch.equal(average.module.weight, model.weight)


@_evidence(3, "mmagic", "mmengine")
def _() -> None:
    average = _mmagic().ExponentialMovingAverage(Misnamed())
    with pytest.raises(RuntimeError, match="Missing key"):
        average.load_state_dict(Misnamed().state_dict())


@_evidence(4, "mmengine")
def _() -> None:
    for move in (nn.Module.half, nn.Module.double, copy.deepcopy):
        model = Vector()
        average = _ema(model, update_buffers=True)
        _step(average, model, 1.0)
        average = move(average)
        _step(average, model, 100.0, 100.0)
        assert torch.equal(average.module.weight.float(), torch.ones(4))


@_evidence(5, "mmengine")
def _() -> None:
    model = Tied()
    average = _ema(model, update_buffers=True)
    _step(average, model, 0.0, 1.0)
    torch.testing.assert_close(average.module.head.weight, torch.full((3, 3), 0.19))


@_evidence(6, "mmengine")
def _() -> None:
    model: Any = normed()
    average = _ema(model, update_buffers=True)
    drive(average, model, 3)
    assert [int(m[1].num_batches_tracked) for m in (average.module, model)] == [3, 9]


@_evidence(7, "mmengine")
def _() -> None:
    model = Complex()
    average = _ema(model)
    _step(average, model, 1.0, 2.0, 3.0)
    assert torch.equal(average.module.phase, torch.ones(3, dtype=torch.complex64))


@_evidence(8, "mmagic", "mmengine", "torch")
def _() -> None:
    average = _mmagic().ExponentialMovingAverage(nn.BatchNorm1d(4))
    other = Vector()
    other.register_buffer("running_mean", torch.full((4,), 5.0))
    average.sync_parameters(other)
    # Parameters and buffers in one row: the mean of the source is the bias of the average.
    assert torch.equal(average.module.bias, torch.full((4,), 5.0))
    unrelated: Any = AveragedModel(nn.Linear(4, 4, bias=False))
    unrelated.update_parameters(_filled(nn.Linear(4, 4), 3.0))
    assert torch.equal(unrelated.module.weight, torch.full((4, 4), 3.0))


@_evidence(9, "mmengine")
def _() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError):
        _ema(model).update_parameters(torch.compile(model, backend="eager"))


@_evidence(10, "mmagic", "mmengine")
def _() -> None:
    model = nn.Linear(2, 2)
    average = _mmagic().RampUpEMA(model)
    _step(average, model, 1.0)
    with HostReads() as reads:
        average.update_parameters(model)
    assert reads.count >= 5 * len(list(model.parameters()))


@_evidence(11, "mmengine")
def _() -> None:
    CountsCopies.copies = 0
    with pytest.raises(AssertionError):
        _ema(CountsCopies(2, 2), momentum=2.0)
    assert CountsCopies.copies == 1


@_evidence(13, "mmengine")
def _() -> None:
    parent = nn.ModuleDict({"average": _ema(nn.Linear(2, 2), device="cpu")})
    assert {p.device.type for p in parent.to("meta").parameters()} == {"meta"}


@_evidence(14, "mmengine", "torch")
def _() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = Vector(dtype=dtype)
        stuck = [
            _ema(model, momentum=0.0002),
            AveragedModel(model, multi_avg_fn=_torch_ema),
        ]
        for average in stuck:
            _step(average, model, 1.0, *[1.5] * 500)
            assert torch.equal(average.module.weight, torch.ones(4, dtype=dtype))


@_evidence(15, "torch")
def _() -> None:
    assert all(p.requires_grad for p in AveragedModel(nn.Linear(2, 2)).parameters())


@_evidence(16, "torch")
def _() -> None:
    model = normed()
    average = AveragedModel(model, multi_avg_fn=_torch_swa, use_buffers=True)
    with pytest.raises(RuntimeError, match="Integer division with addcdiv"):
        _step(average, model, 1.0, 2.0)


@_evidence(17, "mmengine")
def _() -> None:
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        _ema(weight_normed())


@_evidence(27, "mmengine")
def _() -> None:
    model = Vector()
    average = _ema(model)
    _step(average, model, 1.0, float("nan"), *[1.0] * 10)
    assert average.module.weight.isnan().all()


@_evidence(35, "mmengine")
def _() -> None:
    average = _ema(Vector())
    average.update_parameters(average.module)
    assert average.steps == 1


@_evidence(36, "mmengine")
def _() -> None:
    model = Buffered()
    average = _ema(model, update_buffers=True)
    model.hidden.add_(5)
    average.update_parameters(model)
    assert torch.equal(average.module.hidden, torch.ones(2))


@_evidence(37, "mmengine")
def _() -> None:
    model = WithExtraState(2, 2)
    with pytest.raises(AttributeError):
        _ema(model, update_buffers=True).update_parameters(model)


@_evidence(38, "mmengine")
def _() -> None:
    model = Vector()
    average = _ema(model)
    _step(average, model, 1.0)
    average.load_state_dict(copy.deepcopy(average.state_dict()), assign=True)
    _step(average, model, 100.0)
    assert torch.equal(average.module.weight, torch.ones(4))


@_evidence(39, "mmengine")
def _() -> None:
    for kind in ("ExponentialMovingAverage", "MomentumAnnealingEMA"):
        model = Vector()
        average = getattr(_mmengine(), kind)(model).double()
        with pytest.raises(RuntimeError, match="dtype"):
            _step(average, model, 1.0, 2.0)


@_evidence(40, "mmengine")
def _() -> None:
    average = _ema(Vector(4))
    _step(average, Vector(1), 3.0)
    assert torch.equal(average.module.weight, torch.full((4,), 3.0))


@_evidence(41, "mmagic", "mmengine")
def _() -> None:
    model = Vector(64)
    average = _mmagic().ExponentialMovingAverage(model, momentum=0.0002)
    change(model, 0)
    for _ in range(5_000):
        average.update_parameters(model)
    relative = (average.module.weight / model.weight - 1).abs().max()
    assert relative > 1e-5


@_evidence(42, "mmagic", "mmengine")
def _() -> None:
    model = Vector(dtype=torch.float64)
    average = _mmagic().RampUpEMA(model, ema_kimg=0.02, ema_rampup=1.0, batch_size=4)
    _step(average, model, 0.0, 0.0, 1.0)
    wrong = abs(float(average.module.weight[0]) - SEED["ramp_up"].share(2))
    assert wrong > 1e-10


@_evidence(43, "mmengine")
def _() -> None:
    model = Vector()
    average = _ema(model, interval=0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _step(average, model, 1.0, 2.0)
    assert _ema(model, interval=-1).interval == -1


@_evidence(44, "mmengine")
def _() -> None:
    assert _mmengine().BaseAveragedModel(Vector()).steps == 0


@_evidence(45, "torch")
def _() -> None:
    model = Buffered()
    average = AveragedModel(model, multi_avg_fn=_torch_swa, use_buffers=True)
    with pytest.raises(RuntimeError):
        _step(average, model, 1.0, 2.0)


SHOWN = frozenset(_EVIDENCE)
