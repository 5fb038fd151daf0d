"""The average of an adapter alone, saved so that PEFT loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from reference import exponential_mass, recursion, shares

peft = pytest.importorskip("peft")

HALF_LIFE = 2.0


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["0", "2"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["0"], use_dora=True),
    "with a head": lambda: peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["0", "2"]),
    "ia3": lambda: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def train(model: nn.Module, average: polyak.WeightAverage, steps: int) -> list[dict[str, Tensor]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    handle = average.attach(optimizer)
    seen = []
    for _ in range(steps):
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(weights(model))
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_averaged_adapter_loads_through_from_pretrained(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), CONFIGS[kind]())
    schedule = polyak.Exponential(half_life=HALF_LIFE)
    average = polyak.WeightAverage(model, schedule, trainable_only=True)
    seen = train(model, average, 5)
    tensors = average.tensors()
    assert set(tensors) == {name for name, p in model.named_parameters() if p.requires_grad}
    taken = [float(s) for s in shares(exponential_mass(half_life=HALF_LIFE), [1, 2, 3, 4, 5])]
    for name, tensor in tensors.items():
        samples = [step[name] for step in seen]
        expected = torch.as_tensor(recursion(samples[0], samples, taken))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    with average.applied_to(model):
        model.save_pretrained(tmp_path)
        expected_output = model(torch.ones(1, 4))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    found = weights(loaded)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert torch.equal(loaded(torch.ones(1, 4)), expected_output)
    # The adapter that is trained is as it was.
    for name, value in weights(model).items():
        assert torch.equal(value, seen[-1][name]), name


def test_one_of_two_adapters_is_averaged_and_saved_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), CONFIGS["lora"](), adapter_name="first")
    model.add_adapter("second", CONFIGS["lora"]())
    model.set_adapter("second")
    schedule = polyak.Exponential(half_life=HALF_LIFE)
    average = polyak.WeightAverage(model, schedule, include="*lora_*.second.*")
    train(model, average, 3)
    # To train the other for a while changes nothing of the average.
    model.set_adapter("first")
    with average.applied_to(model):
        model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = weights(
        peft.PeftModel.from_pretrained(base(), tmp_path / "second", adapter_name="second")
    )
    assert average.tensors()
    for name, tensor in average.tensors().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_state_resumes_bit_for_bit() -> None:
    def built() -> tuple[Any, polyak.WeightAverage]:
        torch.manual_seed(3)
        model = peft.get_peft_model(base(), CONFIGS["lora"]())
        schedule = polyak.Exponential(half_life=HALF_LIFE)
        return model, polyak.WeightAverage(model, schedule, trainable_only=True)

    model, average = built()
    train(model, average, 3)
    state = average.state_dict()
    # Adapters only, however large the model below them is.
    assert all("lora_" in name for name in state["averages"]["0"]["tensors"])
    assert not state["copies"]
    again, resumed = built()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for one, other in ((model, average), (again, resumed)):
        train(one, other, 2)
    assert resumed.clock == average.clock == 5
    for name, tensor in average.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name
