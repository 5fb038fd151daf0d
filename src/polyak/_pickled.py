"""Files of ``torch.save``, read without running any code that they name."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch

from polyak._file_errors import FileError, reason

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"

WAY_OUT = (
    "Loading it could run any code. Where that class is installed and the file is trusted, load "
    "it there with torch.load(..., weights_only=False) and save its state dict again, by "
    "torch.save or as safetensors"
)


class Unread:
    """Stands where a file holds an object of a class that is neither imported nor called."""

    def __new__(cls, *args: object, **kwargs: object) -> Unread:
        """Make one, whatever the object's own class would have been given."""
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__}, not read>"


# What training programs put beside the weights and no reader of weights needs: arguments, numbers
# of numpy, mmengine's log (which pickles methods of its class by getattr).
_PASSED_OVER = (
    "argparse.Namespace",
    "builtins.getattr",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)


def _stand_in(full: str) -> Any:
    module, _, name = full.rpartition(".")
    return type(name, (Unread,), {"__module__": module, "__qualname__": name})


_STAND_INS = [_stand_in(full) for full in _PASSED_OVER]
_LOCK = threading.Lock()


@contextmanager
def _stand_ins_alone() -> Iterator[None]:
    """Let torch read the stand-ins, and for that while nothing that the program trusts elsewhere.

    Which of two entries of one name torch takes is chance.
    """
    trust = torch.serialization
    with _LOCK:
        before = trust.get_safe_globals()
        trust.clear_safe_globals()
        trust.add_safe_globals(_STAND_INS)
        try:
            yield
        finally:
            # What another thread has added meanwhile stays.
            added = [one for one in trust.get_safe_globals() if one not in _STAND_INS]
            trust.clear_safe_globals()
            trust.add_safe_globals([*before, *added])


def load_torch(path: str) -> Any:
    """Load a file of ``torch.save``, its tensors mapped into memory where the file allows it.

    Raises:
        FileError: a file that needs foreign classes, is damaged, or is of another kind.
        OSError: what the operating system refuses.
    """
    with open(path, "rb") as file:
        head = file.read(len(ZIP))
    if not head:
        raise FileError(f"{path}: the file is empty; copy or save it again")
    return unpickle(path, path, mmap=head == ZIP and _can_be_mapped(path))


def unpickle(path: str, file: str | IO[bytes], *, mmap: bool = False) -> Any:
    """Load what ``torch.save`` wrote; ``path`` is for messages.

    Raises:
        FileError: foreign classes, or data that is damaged.
        OSError: what the operating system refuses.
    """
    try:
        with _stand_ins_alone(), warnings.catch_warnings():
            # That a pickle has another protocol than torch's own is no matter to the reader.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        name = foreign[1] if foreign else _first_class(file)
        if name is None:
            raise _damaged(path, error) from error
        raise FileError(
            f"{path}: refused, since it is a pickle that needs the foreign class {name}. {WAY_OUT}"
        ) from None
    except Exception as error:
        # Data that is cut or damaged can end in almost any error.
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> FileError:
    return FileError(
        f"{path}: not a file of torch.save, or it is damaged or cut short ({reason(error)}); "
        "copy or save it again"
    )


def _can_be_mapped(path: str) -> bool:
    """Whether the records of a zip archive lie there as they are.

    Raises:
        FileError: no archive of ``torch.save``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    names = {os.path.basename(record.filename) for record in records}
    if "constants.pkl" in names:
        raise FileError(
            f"{path}: is a TorchScript archive, which holds code; load it with torch.jit.load "
            "and save its state_dict()"
        )
    if "data.pkl" not in names:
        raise FileError(
            f"{path}: is a zip archive that torch.save did not write; unpack it and name the "
            "checkpoint in it"
        )
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _first_class(file: str | IO[bytes]) -> str | None:
    """Return the first class that a bare pickle names, read without unpickling."""
    if not isinstance(file, str):
        return None
    texts: list[str] = []
    with open(file, "rb") as stream:
        if stream.read(1) != PICKLE:
            return None
        stream.seek(0)
        try:
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if code.name == "STACK_GLOBAL" and len(texts) > 1:
                    return ".".join(texts[-2:])
                if isinstance(argument, str):
                    texts.append(argument)
        except Exception:
            return None
    return None
