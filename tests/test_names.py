"""Canonical names, ties, selection, and strict pairing with errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from models import Mixed, Nasty, Parent, Plain, Tied, Unknown, named
from polyak import ArgumentError, NameMismatchError, names
from polyak.names import canonical, collect, match_keys, pair, select, unwrap


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def checkpointed(model: Any) -> nn.Module:
    model.first = checkpoint_wrapper(model.first)
    model.last = compiled(model.last)
    return model  # type: ignore[no-any-return]


WRAPPERS: dict[str, Any] = {
    "none": lambda model: model,
    "compile": compiled,
    "data parallel": nn.DataParallel,
    "compile inside": lambda model: nn.DataParallel(compiled(model)),
    "compile outside": lambda model: compiled(nn.DataParallel(model)),
    "checkpoint": checkpoint_wrapper,
    "parts": checkpointed,
    "all": lambda model: compiled(nn.DataParallel(checkpointed(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_plain_model(wrap: str) -> None:
    plain = Plain()
    tensors = named(plain)
    entries = collect(WRAPPERS[wrap](plain))
    assert list(entries) == list(collect(Plain()))
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        assert entry.name == name
        assert entry.tensor is tensors[name], name


@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if wrap != "parts"])
def test_unwrap(wrap: str) -> None:
    plain = Plain()
    assert unwrap(WRAPPERS[wrap](plain)) is plain


def test_unwrap_leaves_alone_what_is_no_wrapper() -> None:
    for model in (Nasty(), Unknown(Plain()), nn.Sequential(), nn.ModuleList(), Parent(Plain())):
        assert unwrap(model) is model


def test_kinds_of_tensors() -> None:
    entries = collect(Mixed())
    kinds = {name: (entry.kind, entry.persistent) for name, entry in entries.items()}
    parameters = dict.fromkeys(["weight", "scale", "empty", "phase", "frozen"], ("parameter", True))
    buffers = dict.fromkeys(["wave", "ring", "count", "mask"], ("buffer", True))
    assert kinds == {**parameters, **buffers, "cache": ("buffer", False)}


def test_a_tied_tensor_stands_once_under_its_first_name() -> None:
    model = Tied()
    entries = collect(model)
    assert list(entries) == ["embed.weight"]
    assert entries["embed.weight"].ties == ["head.weight"]
    shared = nn.Linear(2, 2)
    entries = collect(nn.Sequential(shared, nn.Sequential(shared, nn.Linear(1, 1)), shared))
    assert list(entries) == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    assert entries["0.weight"].ties == ["1.0.weight", "2.weight"]


def test_absent_tensors_and_children_are_passed_over() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("gone", None)
    model.register_module("never", None)
    assert list(collect(model)) == ["weight"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("weight", "weight"),
        ("_orig_mod.weight", "weight"),
        ("a._checkpoint_wrapped_module.b._fsdp_wrapped_module._orig_mod.c", "a.b.c"),
        ("module.weight", "module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mod_.weight", "_orig_mod_.weight"),
    ],
)
def test_canonical(name: str, plain: str) -> None:
    assert canonical(name) == plain


# Selection.


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (None, None, "first.weight first.bias norm.weight norm.bias last.weight last.bias"),
        ("*.weight", None, "first.weight norm.weight last.weight"),
        (["first.*", "last.*"], "*.bias", "first.weight last.weight"),
        (None, ["*.bias", "norm.*"], "first.weight last.weight"),
        ("first.weight", None, "first.weight"),
        ("[fl]*.b?as", None, "first.bias last.bias"),
        (("*",), None, "first.weight first.bias norm.weight norm.bias last.weight last.bias"),
    ],
)
def test_select(include: Any, exclude: Any, chosen: str) -> None:
    entries = {n: e for n, e in collect(Plain()).items() if e.kind == "parameter"}
    assert list(select(entries, include, exclude)) == chosen.split()


def test_globs_know_capitals_and_match_whole_names() -> None:
    class Capital(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.Weight = nn.Parameter(torch.ones(1))
            self.weight = nn.Parameter(torch.ones(1))

    assert list(select(collect(Capital()), "W*", None)) == ["Weight"]
    assert list(select(collect(Capital()), None, "w*")) == ["Weight"]
    for glob in ("weigh", "eight", "*.weight"):
        with pytest.raises(ArgumentError, match="matches no name"):
            select(collect(Capital()), glob, None)


@pytest.mark.parametrize("role", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(role: str) -> None:
    given: dict[str, Any] = {"include": None, "exclude": None, role: ["first.*", "frist.*"]}
    with pytest.raises(ArgumentError) as caught:
        select(collect(Plain()), **given)
    message = str(caught.value)
    assert message.startswith(f"{role} has the pattern 'frist.*', which matches no name")
    assert "'first.weight', 'first.bias'" in message and "and 1 more" in message


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"nothing is left.*exclude='\*'"):
        select(collect(Plain()), None, "*")


@pytest.mark.parametrize("value", [3, ["a", 3], [None], b"weight"])
def test_patterns_of_a_wrong_type(value: Any) -> None:
    with pytest.raises((ArgumentError, TypeError)) as caught:
        names.patterns("include", value)
    assert isinstance(caught.value, ArgumentError), "the argument is to be named"
    assert "include" in str(caught.value) and repr(value) in str(caught.value)


def test_a_tied_tensor_is_judged_by_each_of_its_names() -> None:
    entries = collect(Tied())
    assert list(select(entries, "head.*", None)) == ["embed.weight"]
    assert list(select(entries, "embed.*", None)) == ["embed.weight"]
    with pytest.raises(ArgumentError, match="nothing is left"):
        select(entries, None, "head.*")


# Pairing.


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_pair_finds_each_tensor_by_name(wrap: str, reverse: bool) -> None:
    mine, model = Plain(), Plain()
    tensors, sources = named(mine), named(model)
    wrapped = WRAPPERS[wrap](mine if reverse else model)
    pairs = pair(collect(wrapped if reverse else mine), model if reverse else wrapped)
    assert [p.name for p in pairs] == list(collect(Plain()))
    for p in pairs:
        assert p.target is tensors[p.name] and p.source is sources[p.name]
        assert p.kind == ("parameter" if isinstance(p.target, nn.Parameter) else "buffer")


@pytest.mark.parametrize("kind", [Plain, Tied, Mixed, Nasty])
def test_a_wrapper_that_nobody_knows_is_seen_through(kind: type[nn.Module]) -> None:
    mine, model = kind(), kind()
    sources = named(model)
    for p in pair(collect(mine), Unknown(model)):
        assert p.source is sources[p.name], p.name


def test_a_wrapper_with_tensors_of_its_own_is_refused_by_their_names() -> None:
    wrapper = Unknown(Plain())
    wrapper.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(NameMismatchError, match="not expected by the average: 'temperature'"):
        pair(collect(Plain()), wrapper)


def test_names_are_seen_through_for_all_or_for_none() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)

    other = nn.Module()
    other.a = nn.Linear(1, 1)
    other.module = nn.Module()
    other.module.b = nn.Linear(1, 1)
    with pytest.raises(NameMismatchError, match=r"missing in the model: 'b\.weight', 'b\.bias'"):
        pair(collect(Flat()), other)


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    assert {p.name for p in pair(collect(Nasty()), Nasty())} == named(Nasty()).keys()
    both = nn.Sequential()
    both.module = nn.Linear(2, 2)
    assert list(collect(nn.DataParallel(both))) == ["module.weight", "module.bias"]
    with pytest.raises(NameMismatchError, match=r"missing in the model: 'module\.weight'"):
        pair(collect(both), nn.Linear(2, 2))


def shaped(**shapes: tuple[int, ...]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return model


@pytest.mark.parametrize(
    ("mine", "theirs"), [((2, 3), (3, 2)), ((2, 3), (1, 3)), ((1,), ()), ((0,), (1,)), ((4,), (5,))]
)
def test_shapes(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(NameMismatchError) as caught:
        pair(collect(shaped(a=(1,), w=mine)), shaped(a=(1,), w=theirs))
    assert f"'w' has shape {mine} in the average and {theirs} in the model" in str(caught.value)
    assert "'a'" not in str(caught.value)


def test_every_kind_of_mismatch_is_in_one_message_with_the_remedy() -> None:
    target = shaped(gone=(1,), w=(2,), same=(1,))
    target.register_parameter("z", nn.Parameter(torch.ones(1, dtype=torch.complex64)))
    source = shaped(new=(1,), w=(3,), same=(1,), z=(1,))
    with pytest.raises(NameMismatchError) as caught:
        pair(collect(target), source)
    assert str(caught.value).splitlines() == [
        "the model does not match the average:",
        "  not expected by the average: 'new'",
        "  missing in the model: 'gone'",
        "  'w' has shape (2,) in the average and (3,) in the model",
        "  'z' is torch.complex64 in the average and torch.float32 in the model",
        "Use the model that the average was built from, or build a new average.",
    ]
    assert isinstance(caught.value, ValueError)


def test_long_lists_are_cut() -> None:
    many = {f"w{index}": (1,) for index in range(30)}
    with pytest.raises(NameMismatchError, match=r"'w7', … and 22 more\n") as caught:
        pair(collect(shaped(**many)), shaped())
    assert "'w8'" not in str(caught.value)
    with pytest.raises(NameMismatchError, match="… and 22 more"):
        pair(collect(shaped(**many)), shaped(**dict.fromkeys(many, (2,))))


def test_a_tie_that_was_cut_is_refused_and_one_that_was_made_is_not() -> None:
    cut: Any = Tied()
    cut.head.weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(
        NameMismatchError,
        match=r"'embed\.weight' and 'head\.weight' are one tensor in the average and two",
    ):
        pair(collect(Tied()), cut)
    model = Tied()
    pairs = pair(collect(cut), model)
    assert [p.name for p in pairs] == ["embed.weight", "head.weight"]
    assert all(p.source is model.embed.weight for p in pairs)
    lost = nn.Module()
    lost.embed = nn.Embedding(4, 3)
    with pytest.raises(NameMismatchError, match=r"missing in the model: 'head\.weight'"):
        pair(collect(Tied()), lost)


def test_the_first_name_of_a_tie_may_differ() -> None:
    turned = nn.Module()
    turned.head = nn.Linear(3, 4, bias=False)
    turned.embed = nn.Embedding(4, 3)
    turned.embed.weight = turned.head.weight
    (found,) = pair(collect(Tied()), turned)
    assert found.name == "embed.weight" and found.source is turned.head.weight


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_average_itself_is_no_source(wrap: str) -> None:
    mine = Plain()
    entries = collect(mine)
    with pytest.raises(NameMismatchError, match=r"the source is the average itself: 'first\.weig"):
        pair(entries, WRAPPERS[wrap](mine))


def test_another_view_of_the_same_memory_is_the_average_itself() -> None:
    mine, alias = shaped(w=(3,)), nn.Module()
    alias.w = nn.Parameter(named(mine)["w"].detach())
    assert named(alias)["w"] is not named(mine)["w"]
    with pytest.raises(NameMismatchError, match="the same memory in both"):
        pair(collect(mine), alias)


def test_empty_and_meta_tensors_are_not_taken_for_the_same_memory() -> None:
    assert len(pair(collect(shaped(w=(0, 2))), shaped(w=(0, 2)))) == 1
    with torch.device("meta"):
        assert len(pair(collect(Plain()), Plain())) == len(collect(Plain()))


def test_a_partial_average_expects_only_its_own() -> None:
    entries = select(collect(Plain()), "first.*", None)
    pairs = pair(entries, Plain(), lambda entry: entry.name.startswith("first."))
    assert [p.name for p in pairs] == ["first.weight", "first.bias"]
    with pytest.raises(NameMismatchError, match=r"not expected by the average: 'norm\.weight'"):
        pair(entries, Plain())


# Keys of a state dict.


@pytest.mark.parametrize(
    ("keys", "own", "matched"),
    [
        ("steps module.w", "w", {"module.w": "w"}),
        ("w", "w", {"w": "w"}),
        ("steps w", "w", {"w": "w"}),
        ("steps w", "w steps", {"steps": "steps", "w": "w"}),
        ("steps module.w module.steps", "w steps", {"module.w": "w", "module.steps": "steps"}),
        ("module.w", "module.w", {"module.w": "module.w"}),
        ("module.module.w", "module.w", {"module.module.w": "module.w"}),
        ("module.w w", "module.w w", {"module.w": "module.w", "w": "w"}),
        (
            "module.w module.module.w",
            "module.w w",
            {"module.w": "w", "module.module.w": "module.w"},
        ),
        ("module._orig_mod.w", "w", {"module._orig_mod.w": "w"}),
        ("_orig_mod.w", "w", {"_orig_mod.w": "w"}),
        ("module_list.w", "w", {}),
        ("", "w", {}),
    ],
)
def test_match_keys(keys: str, own: str, matched: dict[str, str]) -> None:
    assert match_keys(keys.split(), own.split(), "module.") == matched
