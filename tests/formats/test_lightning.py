"""Lightning's WeightAveraging, in checkpoints of a real Trainer."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import polyak
from formats.common import read_as, same
from models import Plain
from polyak.formats import FormatError, detect, read, write
from polyak.integrations.lightning import WeightAverageCallback

BATCHES = 3

pytestmark = [
    # Lightning advises more workers for a loader of eight rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning asks torch in a way that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]


@cache
def lightning() -> Any:
    return importlib.import_module("lightning.pytorch")


def module() -> Any:
    class Module(lightning().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

        test_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def _loader() -> Any:
    return DataLoader(TensorDataset(torch.arange(24.0).reshape(8, 3) / 24), batch_size=3)


def _trainer(callbacks: list[Any], **settings: Any) -> Any:
    return lightning().Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )


def _cloned(state: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in state.items()}


def read_file(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


class _Fit:
    """A run of a Trainer, its average, and what it saved while it trained."""

    def __init__(self, folder: Path, epochs: int, resume: Path | None = None) -> None:
        pl = lightning()
        self.model = module()
        self.callback = pl.callbacks.EMAWeightAveraging(decay=0.9)
        checkpoints = pl.callbacks.ModelCheckpoint(folder, filename="during", save_top_k=-1)
        self.trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.callback, checkpoints],
        )
        data = TensorDataset(torch.arange(24.0).reshape(8, 3) / 24)
        loader = DataLoader(data, batch_size=3)
        self.trainer.fit(self.model, loader, ckpt_path=resume, weights_only=True)
        self.path = folder / "during.ckpt"
        self.average: nn.Module = self.callback._average_model


@pytest.fixture
def fit(tmp_path: Path) -> _Fit:
    return _Fit(tmp_path, epochs=1)


# Each resumed run has a folder of its own.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_the_trainer(fit: _Fit, tmp_path: Path) -> None:
    checkpoint = torch.load(fit.path, weights_only=True)
    contents = read_as("lightning", checkpoint)
    averaged = fit.average.get_submodule("module").state_dict()
    assert same(contents.averages[""], averaged)
    # The fit's end has put the average into the model; what it was trained to is in the file.
    assert same(contents.raw, checkpoint["current_model_state"])
    assert not same(contents.raw, averaged) and same(fit.model.state_dict(), averaged)
    assert contents.counters == {
        "steps": BATCHES,
        "samples": BATCHES,
        "latest_update_step": BATCHES,
    }

    # Resumed from what we write, a second epoch ends as from Lightning's own file.
    written = write(contents, "lightning")
    assert set(written) == {
        "state_dict",
        "current_model_state",
        "averaging_state",
        "callbacks",
        "epoch",
        "global_step",
        "pytorch-lightning_version",
        "optimizer_states",
        "lr_schedulers",
    }
    weights = {key: value for key, value in written.items() if key.endswith(("state", "dict"))}
    assert len(weights) == 3 and all(same(weights[k], checkpoint[k]) for k in weights)
    path = tmp_path / "written.ckpt"
    torch.save({**checkpoint, **weights}, path)
    ends = []
    for name, start in (("theirs", fit.path), ("ours", path)):
        torch.manual_seed(0)
        ends.append(_Fit(tmp_path / name, epochs=2, resume=start).average.state_dict())
    assert same(ends[1], ends[0]) and int(ends[0]["n_averaged"]) == 2 * BATCHES


def test_an_average_of_ours_goes_on_in_lightning(fit: _Fit, tmp_path: Path) -> None:
    ours = polyak.ExponentialMovingAverage(fit.model, momentum=0.1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(0.5)
    ours.steps.fill_(7)
    settings: dict[str, Any] = {"raw": fit.model.state_dict()}
    contents = read(ours.state_dict())
    with pytest.raises(FormatError, match=r"needs n_averaged=.*they have 7 updates"):
        write(contents, "lightning", **settings)
    with pytest.raises(FormatError, match=r"needs raw="):
        write(contents, "lightning", n_averaged=7)
    written = write(contents, "lightning", n_averaged=7, **settings)
    assert written["callbacks"] == {}
    callback = lightning().callbacks.EMAWeightAveraging()
    other = module()
    callback.setup(fit.trainer, other, "fit")
    callback.on_load_checkpoint(fit.trainer, other, written)
    assert same(other.state_dict(), fit.model.state_dict())
    assert same(callback._average_model.module.state_dict(), ours.module.state_dict())
    assert int(callback._average_model.n_averaged) == 7
    latest = write(
        contents, "lightning", n_averaged=7, latest_update_step=9, callback="A", **settings
    )
    assert latest["callbacks"] == {"A": {"latest_update_step": 9}}
    with pytest.raises(FormatError, match=r"callback= is the name for latest_update_step="):
        write(contents, "lightning", n_averaged=7, callback="A", **settings)


def ours_for_lightning(folder: Path) -> tuple[Path, Any, Any]:
    """Write an average of ours for Lightning; return the file, the model and its average."""
    model = module()
    average = polyak.ExponentialMovingAverage(model, momentum=0.1)
    with torch.no_grad():
        for value in (1.0, 2.0):
            for parameter in model.parameters():
                parameter.fill_(value)
            average.update_parameters(model)
    contents = read(average.state_dict())
    written = write(contents, "lightning", n_averaged=2, raw=model.state_dict())
    path = folder / "ours.ckpt"
    torch.save(written, path)
    return path, model, average


def test_what_is_written_loads_into_a_module(tmp_path: Path) -> None:
    path, model, average = ours_for_lightning(tmp_path)
    loaded = type(model).load_from_checkpoint(path, weights_only=True)
    assert same(loaded.state_dict(), average.module.state_dict())
    assert any("begins at epoch 0" in note for note in read_as("lightning", read_file(path)).notes)
    trainer = _trainer([])
    other = module()
    trainer.test(other, _loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert same(other.state_dict(), average.module.state_dict())


def test_fit_goes_on_from_what_is_written(tmp_path: Path) -> None:
    path, model, _ = ours_for_lightning(tmp_path)
    begun: dict[str, Any] = {}

    class Watch(lightning().Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            begun.update(_cloned(pl_module.state_dict()))

    callback = lightning().callbacks.EMAWeightAveraging(decay=0.9)
    trainer = _trainer([callback, Watch()], max_epochs=1)
    trainer.fit(module(), _loader(), ckpt_path=path, weights_only=True)
    assert same(begun, model.state_dict())
    assert int(callback._average_model.n_averaged) == 2 + BATCHES
    # An average that was copied over would be as far away as the weights.
    own = WeightAverageCallback(polyak.Exponential(decay=0.9))
    trainer = _trainer([own], max_epochs=1)
    trainer.fit(module(), _loader(), ckpt_path=path, weights_only=True)
    assert own.average is not None and own.average.samples == 2 + BATCHES
    # Buffers are averaged there, and copied here.
    expected, found = callback._average_model.module, own.average.tensors()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found[name], value)


def test_ours_with_halves_are_read_in_float32(tmp_path: Path) -> None:
    own = WeightAverageCallback(polyak.Exponential(decay=0.9))
    trainer = _trainer([own], max_epochs=1)
    model = module().to(torch.bfloat16)
    loader = DataLoader(TensorDataset(torch.rand(9, 3, dtype=torch.bfloat16)), batch_size=3)

    class Save(lightning().Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "ours.ckpt")

    trainer.callbacks.append(Save())
    trainer.fit(model, loader)
    checkpoint = read_file(tmp_path / "ours.ckpt")
    contents = read_as("lightning", checkpoint)
    assert own.average is not None
    tensors = own.average.tensors()
    found = contents.averages[""]
    assert found.keys() == checkpoint["state_dict"].keys()
    for name, parameter in model.named_parameters():
        assert found[name].dtype == torch.float32 and parameter.dtype == torch.bfloat16
        assert torch.equal(found[name], tensors[name])
        assert torch.equal(found[name].bfloat16(), checkpoint["state_dict"][name])
    assert contents.counters["samples"] == BATCHES
    assert contents.raw is not None and contents.raw["net.first.weight"].dtype == torch.bfloat16
    assert any("read from 'weight_average'" in note for note in contents.notes)
    # Several averages are all there; before the first sample the weights are those trained.
    kept = checkpoint["weight_average"]
    one = kept["averages"]["0"]
    several = {**checkpoint, "weight_average": {**kept, "averages": {"a": one, "b": one}}}
    assert list(read(several).averages) == ["a", "b"]
    empty = {**kept, "counters": {**kept["counters"], "samples": 0}}
    fresh = read({**checkpoint, "weight_average": empty}).averages[""]
    assert same(fresh, checkpoint["state_dict"])


def test_a_checkpoint_saved_outside_fit(fit: _Fit, tmp_path: Path) -> None:
    fit.callback._average_model = None
    fit.trainer.save_checkpoint(tmp_path / "after.ckpt")
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    contents = read_as("lightning", checkpoint)
    assert contents.raw is None and contents.counters["steps"] is None
    assert any("saved outside fit" in note for note in contents.notes)
    assert same(contents.averages[""], fit.model.state_dict())
    # Without the callback's state there is no sign of an average at all.
    del checkpoint["callbacks"]
    assert detect(checkpoint) == "plain"


def test_a_half_of_the_state_is_refused(fit: _Fit) -> None:
    checkpoint = torch.load(fit.path, weights_only=True)
    del checkpoint["current_model_state"]
    with pytest.raises(FormatError, match="missing 'current_model_state'"):
        read(checkpoint)
