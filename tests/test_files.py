"""Checkpoint files: every kind is read as its own library reads it, and nothing is half-written."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import polyak
from polyak import _distributed_checkpoint, _replacing, files
from polyak._file_errors import os_errors
from polyak.files import FileError, load, open_checkpoint, save

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def assert_equal(got: Any, expected: Any) -> None:
    """Compare nested values, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor) and got.dtype == expected.dtype
        assert got.shape == expected.shape
        raw = [one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (got, expected)]
        assert torch.equal(*raw)
    elif isinstance(expected, dict):
        assert list(got) == list(expected) or sorted(got) == sorted(expected)
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    else:
        assert got == expected and type(got) is type(expected)


def mapped(tensor: Tensor) -> str:
    """Return the file that a tensor's memory is mapped from."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(one, 16) for one in fields[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return fields[5] if len(fields) > 5 else ""
    return ""


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


STATE = {
    "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()},
    "steps": torch.tensor(3),
    "list": [torch.zeros(1), 5, "text", None, True],
    "decay": 0.5,
}


# safetensors.


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.text(max_size=4)
        ),
        max_size=6,
    )
)
def test_safetensors_are_read_by_their_own_library(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[torch.dtype, list[int], str]]
) -> None:
    tensors = {}
    for index, (dtype, shape, name) in enumerate(drawn):
        count = torch.empty(shape, dtype=dtype).nbytes
        values = torch.randint(0, 2, (count,), dtype=torch.uint8).view(dtype).reshape(shape)
        tensors[f"{name}{index}"] = values
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save(path, tensors)
    assert_equal(load_file(path), tensors)
    assert_equal(load(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    begins = [load(path)[name].data_ptr() % one.dtype.itemsize for name, one in tensors.items()]
    assert not any(begins), "tensors begin at multiples of their width"


def test_a_header_of_any_length_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    begins = set()
    for length in range(0, 256, 8):
        # Of 128 bytes, and it begins as a pickle does.
        save(path, {"w" * length: torch.ones(1)})
        begins.add(path.read_bytes()[:1])
        assert list(load(path)) == ["w" * length]
    assert b"\x80" in begins


def test_what_is_no_tensor_comes_back_from_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {
        "w": torch.ones(2),
        "steps": 3,
        "decay": 0.1,
        "config": {"sizes": [1, None], "on": True},
    }
    save(path, state)
    assert_equal(load(path), state)
    assert open_checkpoint(path).metadata == {"format": "pt"}


def test_tensors_that_share_memory_or_are_views_are_written_by_their_values(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    state = {
        "tied": whole,
        "tied too": whole,
        "part": whole[3:5],
        "strided": whole.reshape(10, 100).t()[:, :2],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    expected = {name: one.detach().clone() for name, one in state.items()}
    expected["conjugate"] = torch.tensor([1 - 2j])
    expected["negative"] = torch.tensor([-2.0])
    save(tmp_path / "x.safetensors", state)
    assert_equal(load_file(tmp_path / "x.safetensors"), expected)
    save(tmp_path / "part.pt", {"part": whole[3:5], "wide": nn.Parameter(whole)[::2]})
    assert_equal(load(tmp_path / "part.pt"), {"part": whole[3:5], "wide": whole[::2]})
    assert (tmp_path / "part.pt").stat().st_size < 4 * 500 + 2000, "only what is seen of a memory"


@pytest.mark.parametrize(
    ("state", "name", "message"),
    [
        ({"a": {"b": torch.ones(1)}}, "x.safetensors", "'a.b' is nested"),
        ({"a": [torch.ones(1)]}, "x.safetensors", "'a.0' is nested"),
        ({"a": torch.ones(2).to_sparse()}, "x.safetensors", "cannot hold 'a'"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "x.safetensors", "cannot hold 'a'"),
        ({"a": torch.ones(2, device="meta")}, "x.safetensors", "cannot hold 'a'"),
        ({"__metadata__": torch.ones(2)}, "x.safetensors", "'__metadata__'"),
        ({"a": {1, 2}}, "x.safetensors", "cannot hold these values"),
        ({"a": torch.ones(2, device="meta")}, "x.pt", "'a' is on the meta device"),
        ({"a": [{"b": argparse.Namespace()}]}, "x.pt", "'a.0.b' is a Namespace"),
        ({"a": 1}, "x.zip", "must end in one of .safetensors, .pt"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    tmp_path: Path, state: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(FileError, match=message) as caught:
        save(tmp_path / name, state)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert left(tmp_path) == []


# Files of torch.save.


@pytest.mark.parametrize("suffix", files.TORCH_SUFFIXES)
def test_nested_values_are_written_as_torch_reads_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save(path, STATE)
    assert_equal(torch.load(path, weights_only=True), STATE)
    assert_equal(load(path), STATE)


def test_tensors_are_mapped_and_writing_to_them_leaves_the_file_alone(tmp_path: Path) -> None:
    state = {"w": torch.arange(5000.0)}
    for name in ("x.pt", "x.safetensors"):
        path = tmp_path / name
        save(path, state)
        loaded = load(path)["w"]
        assert mapped(loaded) == str(path)
        loaded.zero_()
        assert_equal(load(path), state)
        save(path, {"w": loaded})  # replaced while it is mapped
        assert_equal(load(path)["w"], torch.zeros(5000))


def test_old_and_compressed_files_are_read_too(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal(load(tmp_path / "old.pth"), STATE)
    torch.save(STATE, tmp_path / "new.pth")
    with (
        zipfile.ZipFile(tmp_path / "new.pth") as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    # Mapped, it would be read as the compressed bytes.
    assert_equal(load(tmp_path / "packed.pth"), STATE)


def test_the_kind_is_seen_in_the_file_not_in_its_name(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    save_file(state, tmp_path / "really-safetensors.pt")
    torch.save(state, tmp_path / "really-torch")
    shutil.copy(tmp_path / "really-safetensors.pt", tmp_path / "no-suffix")
    for path in tmp_path.iterdir():
        assert_equal(load(path), state)
    # torch.load goes by this name alone.
    (tmp_path / "really-torch").rename(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"written by torch.save; rename it to x.pt"):
        load(tmp_path / "x.safetensors")


# Classes that are not torch's.


class Foreign:
    """A class that unpickling would have to import."""


class Runs:
    """Something that runs when it is unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def write_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def write_old(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def write_old_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [write_zip, write_old, write_pickle, write_old_pickle])
def test_foreign_classes_are_refused_by_name_and_not_run(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    path = tmp_path / "x.pkl"
    write({"model": Foreign()}, path)
    with pytest.raises(FileError, match=r"needs the foreign class \S*test_files.Foreign") as caught:
        load(path)
    for part in (str(path), "could run any code", "save its state dict", "safetensors"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    write({"model": Runs(f"touch {tmp_path / 'ran'}")}, path)
    with pytest.raises(FileError, match=r"needs the foreign class (posix|os)\.system"):
        load(path)
    assert left(tmp_path) == ["x.pkl"]


@pytest.mark.parametrize("write", [write_zip, write_old])
def test_what_trainers_put_beside_weights_is_passed_over(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    history = pytest.importorskip("mmengine.logging").HistoryBuffer([1.0, 2.0], [1, 1])
    beside = {
        "args": argparse.Namespace(lr=1.0),
        "log": {"loss": history},
        "metric": numpy.float64(0.5),
        "table": numpy.ones((2, 2)),
        "folder": Path("runs"),
    }
    write({"state_dict": {"w": torch.ones(2)}, **beside}, tmp_path / "x.pth")
    state = load(tmp_path / "x.pth")
    assert_equal(state["state_dict"], {"w": torch.ones(2)})
    found = files.unread(state)
    assert set(found) == {"args", "log.loss", "metric", "table", "folder"}
    assert found["args"] == "argparse.Namespace"
    # They are stand-ins, not objects of those classes, and they cannot be written.
    assert not isinstance(state["args"], argparse.Namespace) and not vars(state["args"])
    with pytest.raises(FileError, match="'args' is a Namespace"):
        save(tmp_path / "y.pth", state)


def test_code_is_refused(tmp_path: Path) -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(FileError, match="TorchScript"):
        load(path)


# Damage.


def small_files(folder: Path) -> Iterator[Path]:
    state = {"w": torch.arange(40.0), "n": torch.tensor(3)}
    for name in ("x.pt", "x.safetensors"):
        save(folder / name, state)
        yield folder / name
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    yield folder / "old.pt"


def load_or_refuse(path: Path) -> None:
    message = ""
    try:
        load(path)
    except FileError as error:
        message = str(error)
    assert "\n" not in message


def test_files_that_are_cut_short_are_named_with_the_remedy(tmp_path: Path) -> None:
    for path in small_files(tmp_path):
        data = path.read_bytes()
        for length in (0, 1, 7, 8, 20, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(FileError) as caught:
                load(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and "\n" not in message
            assert "copy or save it again" in message, (path, length)


def test_damaged_bytes_are_an_error_of_the_file_or_none(tmp_path: Path) -> None:
    chance = random.Random(0)
    for path in small_files(tmp_path):
        data = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(chance.randint(1, 3)):
                damaged[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(damaged)
            load_or_refuse(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, this is a text file", "neither safetensors nor written by torch.save"),
        (pickle.dumps([1, 2]), "not a file of torch.save"),
        (b"PK\x03\x04", "cut short"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        load(path)


def test_a_zip_or_a_value_of_another_kind_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("model.pt", b"")
    with pytest.raises(FileError, match=r"zip archive that torch.save did not write"):
        load(tmp_path / "x.zip")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(FileError, match=r"holds a list and no dictionary"):
        load(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("error", "doing", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "?"), "read", "no such file or folder; check the path"),
        (FileNotFoundError(errno.ENOENT, "?"), "write", "create its folder first"),
        (NotADirectoryError(errno.ENOTDIR, "?"), "read", "is a file and no folder"),
        (PermissionError(errno.EACCES, "?"), "read", "permission denied; make it readable"),
        (PermissionError(errno.EACCES, "?"), "write", "denied; choose a folder that you may write"),
        (FileExistsError(errno.EEXIST, "?"), "write", "exists already and was left as it is"),
        (OSError(errno.ENOSPC, "No space left"), "write", "No space left; free some space"),
        (OSError(errno.EIO, "Input/output error"), "read", "cannot read it: Input/output error"),
    ],
)
def test_errors_of_the_system_say_what_to_do(error: OSError, doing: str, message: str) -> None:
    with pytest.raises(FileError, match=f"^x.pt: .*{message}"), os_errors("x.pt", doing):
        raise error


def test_paths_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file or folder"):
        load(tmp_path / "none.pt")
    with pytest.raises(FileError, match=r"holds no checkpoint: no \*.safetensors, no \*.pt"):
        load(tmp_path)
    with pytest.raises(FileError, match="create its folder first"):
        save(tmp_path / "none" / "x.pt", {})
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileError, match="it is a folder"):
        save(tmp_path / "folder.pt", {})
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(FileError, match="not a regular file"):
        save(tmp_path / "pipe.pt", {})


# Folders of Hugging Face.


def test_shards_of_transformers_are_read_as_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert_equal(load(tmp_path / "one"), expected)
    assert_equal(load(tmp_path / "many"), expected)
    opened = open_checkpoint(tmp_path / "many" / "model.safetensors.index.json")
    assert opened.kind == "shards"
    assert_equal({name: one.read() for name, one in opened.tensors.items()}, expected)


# diffusers' own: its from_pretrained calls what it has deprecated.
@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning")
def test_a_folder_of_diffusers_is_its_two_files(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")
    options = {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1}
    model = diffusers.UNet2DModel(
        sample_size=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        **options,
    )
    ema = training_utils.EMAModel(
        model.parameters(), decay=0.75, model_cls=diffusers.UNet2DModel, model_config=model.config
    )
    for _ in range(3):
        nn.init.normal_(next(model.parameters()))
        ema.step(model.parameters())
    ema.save_pretrained(tmp_path / "ema")
    state = load(tmp_path / "ema")
    assert open_checkpoint(tmp_path / "ema").kind == "diffusers folder"
    assert state["config.json"]["optimization_step"] == 3
    assert state["config.json"]["decay"] == 0.75
    named = dict(model.named_parameters())
    for name, expected in zip(named, ema.shadow_params, strict=True):
        assert_equal(state["diffusion_pytorch_model.safetensors"][name], expected)

    # And back: diffusers reads what is written.
    save(tmp_path / "again", state)
    assert left(tmp_path / "again") == ["config.json", "diffusion_pytorch_model.safetensors"]
    read = training_utils.EMAModel.from_pretrained(tmp_path / "again", diffusers.UNet2DModel)
    assert read.optimization_step == 3 and read.decay == 0.75
    assert_equal(read.shadow_params, ema.shadow_params)
    with pytest.raises(FileError, match="exists already"):
        save(tmp_path / "again", state, overwrite=False)
    model.save_pretrained(tmp_path / "plain")
    assert open_checkpoint(tmp_path / "plain").kind == "safetensors"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.safetensors", "a/../../x.safetensors", "..\\x", "C:\\x", "\\\\h\\x", ""],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "x.safetensors", {"w": torch.ones(1)})
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")
    with pytest.raises(FileError, match="not inside its folder"):
        load(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list and no object"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {"w": "none.safetensors"}}', "no such shard, but"),
        ('{"weight_map": {"v": "x.safetensors"}}', "has no tensor 'v'"),
        ('{"weight_map": {"v": 3}}', "no such shard"),
        ('{"weight_map": {"v": "model.safetensors.index.json"}}', "no such shard"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    save(tmp_path / "x.safetensors", {"w": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(FileError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_one_checkpoint_is_that_and_of_several_is_none(tmp_path: Path) -> None:
    save(tmp_path / "epoch-3.pt", {"w": torch.ones(1)})
    assert_equal(load(tmp_path), {"w": torch.ones(1)})
    save(tmp_path / "epoch-4.pt", {"w": torch.ones(1)})
    with pytest.raises(FileError, match=r"holds 2 checkpoints \(epoch-3.pt, epoch-4.pt"):
        load(tmp_path)


# torch.distributed.checkpoint.


def save_distributed(state: dict[str, Any], folder: Path) -> None:
    with pytest.warns(UserWarning, match="torch.distributed is"):
        state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)


def test_distributed_checkpoints_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = polyak.WeightAverage(model, [polyak.Uniform(), polyak.Exponential(half_life=5)])
    average.update(model)
    state = {"model": model.state_dict(), "average": average.state_dict(), **STATE}
    save_distributed(state, tmp_path / "dcp")
    # Ours and nobody else's, as the format of that file is torch's own.
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "theirs.pt")
    expected = torch.load(tmp_path / "theirs.pt", weights_only=True)
    assert_equal(load(tmp_path / "dcp"), expected)
    assert_equal(load(tmp_path / "dcp")["state_dict"], STATE["state_dict"])
    assert_equal(load(tmp_path / "dcp" / ".metadata"), expected)


RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
values = torch.arange(35.0).reshape(5, 7)
dcp.save({"rows": distribute_tensor(values, mesh, [Shard(0)]),
          "columns": distribute_tensor(values, mesh, [Shard(1)]), "whole": values},
         checkpoint_id=f"{folder}/dcp")
dist.destroy_process_group()
"""


def test_parts_that_two_processes_wrote_are_put_together(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor")
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    values = torch.arange(35.0).reshape(5, 7)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    assert_equal(load(tmp_path / "dcp"), dict.fromkeys(("rows", "columns", "whole"), values))
    # A file that is cut: named.
    part = next((tmp_path / "dcp").glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(FileError, match="cut short") as caught:
        load(tmp_path / "dcp")
    assert str(part) in str(caught.value)


def test_tensors_of_a_distributed_checkpoint_are_read_one_at_a_time(tmp_path: Path) -> None:
    state = {"model": {f"w{i}": torch.full((100,), float(i)) for i in range(4)}, "n": 7}
    save_distributed(state, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.kind == "distributed checkpoint" and opened.outline["n"] == 7
    assert opened.outline["model"]["w1"].is_meta
    assert opened.outline["model"]["w1"].shape == (100,)
    kept = [weakref.ref(one.read()) for one in opened.tensors.values()]
    assert all(ref() is None for ref in kept), "nothing holds what was read"
    assert_equal(opened.tensors["model.w3"].read(), torch.full((100,), 3.0))
    assert opened.tensors["model.w3"].nbytes == 400


def test_an_index_with_other_classes_is_refused_and_not_run(tmp_path: Path) -> None:
    save_distributed({"w": torch.ones(2)}, tmp_path)
    index = tmp_path / ".metadata"
    for hostile in (Runs(f"touch {tmp_path / 'ran'}"), Foreign(), nn.Linear(1, 1)):
        index.write_bytes(pickle.dumps({"state_dict_metadata": hostile}))
        with pytest.raises(FileError, match="needs the foreign class"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../x.distcp"}, "not inside its folder"),
        ({"relative_path": "/etc/passwd"}, "not inside its folder"),
        ({"relative_path": "none.distcp"}, "no such file"),
        ({"relative_path": "a\0b"}, "no file can be called"),
        ({"relative_path": "a\ud800b"}, "no file can be called"),
        ({"length": 10**9}, "cut short"),
        ({"offset": -5}, "damaged"),
        ({"transform_descriptors": ["stream.zstd/1"]}, "transformed by"),
    ],
)
def test_an_index_that_is_wrong_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_distributed({"w": torch.ones(2)}, tmp_path)
    index = tmp_path / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for place in metadata.storage_data.values():
        vars(place).update(change)
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(FileError, match=message):
        load(tmp_path)


def test_a_tensor_with_a_missing_part_is_refused(tmp_path: Path) -> None:
    save_distributed({"w": torch.ones(2, 3)}, tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["w"].size = torch.Size([4, 3])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FileError, match=r"parts of 'w' do not make up its shape \(4, 3\)"):
        load(tmp_path)


Parts = list[tuple[tuple[Any, ...], tuple[Any, ...]]]


def dcp_of_parts(folder: Path, shape: tuple[Any, ...], parts: Parts) -> Path:
    """Write a folder whose index says that a tensor has these parts, all of the same numbers."""
    save_distributed({"w": torch.arange(4.0).reshape(2, 2)}, folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    ((key, place),) = metadata.storage_data.items()
    one = metadata.state_dict_metadata["w"]
    one.size = shape
    kind, one.chunks = type(one.chunks[0]), []
    for offsets, sizes in parts:
        one.chunks.append(kind(offsets=offsets, sizes=sizes))
        metadata.storage_data[type(key)(fqn="w", offset=offsets, index=None)] = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))]),
        ((4, 2), [((0, 0), (2, 2)), ((1, 0), (2, 2))]),
        ((4, 2), [((0, 0), (2, 2)), ((3, 0), (2, 2))]),
        ((4, 4), [((0, 0), (2, 2)), ((2, 2), (2, 2)), ((0, 2), (2, 2)), ((1, 1), (2, 2))]),
        ((2, 2), [((1, 0), (2, 2))]),
        ((2, 2), [((-1, 0), (2, 2))]),
        ((2, 2), [((0,), (2, 2))]),
        ((2, 2), [((0, 0), (-2, -2))]),
        ((2, 2), [((0, 0), (2.0, 2))]),
        ((-2, -2), [((0, 0), (2, 2))]),
        ((2.0, 2), [((0, 0), (2, 2))]),
        ((2**62, 4), [((0, 0), (2**62, 4))]),
        ((2**62, 2**62, 0), [((0, 0, 0), (2**62, 2**62, 0))]),
        ((2**59,), [((0,), (2**59,))]),
        ((2**58, 2), [((0, 0), (2**58, 1)), ((0, 1), (2**58, 1))]),
    ],
    ids=str,
)
def test_parts_that_do_not_tile_a_tensor_are_refused(
    tmp_path: Path, shape: tuple[Any, ...], parts: Parts
) -> None:
    dcp_of_parts(tmp_path, shape, parts)
    with pytest.raises(FileError):
        load(tmp_path)
    with pytest.raises(FileError):
        open_checkpoint(tmp_path).tensors["w"].read()


def test_parts_that_tile_a_tensor_in_any_order_are_put_together(tmp_path: Path) -> None:
    corners = [(2, 2), (0, 0), (2, 0), (0, 2)]
    dcp_of_parts(tmp_path, (4, 4), [(at, (2, 2)) for at in corners])
    assert_equal(load(tmp_path), {"w": torch.arange(4.0).reshape(2, 2).repeat(2, 2)})


def test_damaged_distributed_checkpoints_are_an_error_of_the_file_or_none(tmp_path: Path) -> None:
    save_distributed({"w": torch.arange(9.0), "n": 3}, tmp_path)
    chance = random.Random(0)
    for path in [tmp_path / ".metadata", *tmp_path.glob("*.distcp")]:
        data = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            damaged[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(damaged)
            load_or_refuse(tmp_path)
        path.write_bytes(data)


def test_stand_ins_cannot_be_changed_from_a_file() -> None:
    # A pickle may set attributes of whatever it names; of a class, that would outlive the file.
    module = "torch.distributed.checkpoint.metadata"
    data = b"\x80\x04" + f"c{module}\nMetadata\n".encode() + b"}(X\x04\x00\x00\x00evilK\x01ub."
    with pytest.raises((TypeError, AttributeError)):
        _distributed_checkpoint._Reader(io.BytesIO(data), "x").load()
    assert not hasattr(_distributed_checkpoint._CLASSES["Metadata"], "evil")


# In one piece, or not at all.


@pytest.fixture(params=["nameless", "named"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing: into a file without a name, and where the system knows none."""
    if request.param == "named":
        monkeypatch.setattr(_replacing, "_nameless", lambda folder: None)
    return str(request.param)


class StoppedError(Exception):
    pass


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
def test_after_a_failure_the_old_file_stands_and_nothing_else(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def stop(count: int) -> None:
        raise error

    for before in ([], [name]):
        with pytest.raises(error):
            save(tmp_path / name, {"w": torch.ones(10_000)}, progress=stop)
        assert left(tmp_path) == before
        save(tmp_path / name, {"w": torch.zeros(2)})
    assert_equal(load(tmp_path / name), {"w": torch.zeros(2)})


@pytest.mark.usefixtures("either_way")
def test_a_file_that_is_there_is_left_alone_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    save(path, {"n": 1}, overwrite=False)
    with pytest.raises(FileError, match="exists already and was left as it is"):
        save(path, {"n": 2}, overwrite=False)
    assert load(path) == {"n": 1}
    path.unlink()

    def meanwhile(count: int) -> None:
        path.write_bytes(b"of another program")

    with pytest.raises(FileError, match="exists already"):
        save(path, {"n": 2}, overwrite=False, progress=meanwhile)
    monkeypatch.setattr(os, "link", no_links(os.link))
    with pytest.raises(FileError, match="exists already"):
        save(path, {"n": 2}, overwrite=False, progress=meanwhile)
    assert path.read_bytes() == b"of another program" and left(tmp_path) == ["x.pt"]
    path.unlink()
    save(path, {"n": 3}, overwrite=False)
    assert load(path) == {"n": 3} and left(tmp_path) == ["x.pt"]


def no_links(link: Callable[..., None]) -> Callable[..., None]:
    """A file system without links, but for a file that has no name."""

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if not str(source).startswith("/proc/"):
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target, **options)

    return refuse


@pytest.mark.usefixtures("either_way")
def test_modes_follow_the_umask_and_links_are_followed(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path / "x.pt", {"n": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.pt").stat().st_mode) == 0o640
    (tmp_path / "link.pt").symlink_to("x.pt")
    save(tmp_path / "link.pt", {"n": 2})
    assert (tmp_path / "link.pt").is_symlink() and load(tmp_path / "x.pt") == {"n": 2}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FileError, match="free some space or choose another folder") as caught:
            save(tmp_path / name, {"w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(tmp_path / name) in str(caught.value) and left(tmp_path) == []


def pretrained(weight: Tensor, config: Any) -> dict[str, Any]:
    return {"config.json": config, "diffusion_pytorch_model.safetensors": {"w": weight}}


@pytest.mark.usefixtures("either_way")
def test_a_folder_is_left_as_it_was_after_a_failure(tmp_path: Path) -> None:
    good, folder = pretrained(torch.zeros(2), {"decay": 0.5}), tmp_path / "ema"
    bad_weights = pretrained(torch.ones(1, dtype=torch.complex128), {})
    for bad in (bad_weights, pretrained(torch.ones(1), {"decay": torch})):
        with pytest.raises(FileError, match=str(folder)):
            save(folder, bad)
        assert left(tmp_path) == []
        # One's own folder, empty: still there.
        folder.mkdir()
        with pytest.raises(FileError, match=str(folder)):
            save(folder, bad)
        assert left(tmp_path) == ["ema"] and left(folder) == []
        save(folder, good)
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(FileError):
            save(folder, bad)
        assert (folder / "notes.txt").read_text() == "mine" and len(left(folder)) == 3
        assert json.loads((folder / "config.json").read_text()) == {"decay": 0.5}
        assert_equal(load(folder), {"w": torch.zeros(2)})
        shutil.rmtree(folder)


@pytest.mark.usefixtures("either_way")
def test_a_folder_appears_when_both_files_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    save(
        tmp_path / "ema",
        pretrained(torch.zeros(2), {}),
        progress=lambda count: seen.append((tmp_path / "ema").exists()),
    )
    assert seen and not any(seen) and left(tmp_path) == ["ema"]
    replace = os.replace
    renamed: list[str] = []

    def told(source: Any, target: Any) -> None:
        if not renamed:
            # All is written by now, even the file that takes its name last.
            assert load_file(source)["w"].tolist() == [1.0, 1.0]
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", told)
    save(tmp_path / "ema", pretrained(torch.ones(2), {"n": 1}))
    assert renamed == ["diffusion_pytorch_model.safetensors", "config.json"]
    assert left(tmp_path / "ema") == sorted(renamed)


KILLED = """
import os, signal, sys, torch
from polyak.files import save
def kill(count):
    os.kill(os.getpid(), signal.SIGKILL)
save(sys.argv[1], {"w": torch.ones(100_000)}, progress=kill)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="needs files without a name")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_kill_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path / name, {"w": torch.zeros(2)})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / name)], timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert left(tmp_path) == [name]
    assert_equal(load(tmp_path / name), {"w": torch.zeros(2)})
