"""Other libraries' layouts of averaged checkpoints, read from and written to plain dicts."""

from polyak.formats._contents import Contents, FormatError
from polyak.formats._registry import FORMATS, WRITABLE, detect, read, write

__all__ = ["FORMATS", "WRITABLE", "Contents", "FormatError", "detect", "read", "write"]
