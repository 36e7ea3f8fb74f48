"""The safetensors layout, written and read as a stream.

`safetensors` itself takes a path and the whole of the tensors, so it can neither hash what it writes as it writes it,
nor copy a file into another with a second header, nor read from an open file into memory that nobody else can change or
cut. That is all that is done here; what is written, `safetensors.safe_open` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from vllm_armt.memories.errors import Damaged

Spec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of each tensor, by name."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20
MAX_DATA = 1 << 48
UNKNOWN = "0" * 64


def spec_of(tensors: Mapping[str, torch.Tensor]) -> Spec:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Header:
    """Of a tensor file.

    Attributes:
        spec: the tensors in their order in the file: of falling element size, then of names, so that each is aligned.
        metadata: text by name. "sha256" is that of all the rest: of the header without it, and of the data.
    """

    spec: Spec
    metadata: dict[str, str]

    @classmethod
    def of(cls, spec: Spec, metadata: dict[str, str]) -> Header:
        """Raises: ValueError: a dtype that the layout has no word for."""
        for name, (dtype, _) in spec.items():
            if dtype not in _CODES:
                raise ValueError(f"{name} is {dtype}; a page holds {', '.join(map(str, _CODES))}.")
        order = sorted(spec, key=lambda name: (-spec[name][0].itemsize, name))
        return Header({name: spec[name] for name in order}, metadata)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in self.spec.items()}

    @property
    def data_bytes(self) -> int:
        return sum(self.sizes.values())

    def with_metadata(self, **metadata: str) -> Header:
        return Header(self.spec, self.metadata | metadata)

    def encode(self) -> bytes:
        """The file up to its data. Its length does not depend on the checksum."""
        table: dict[str, Any] = {"__metadata__": dict(sorted(self.metadata.items()))}
        end = 0
        for (name, (dtype, shape)), size in zip(self.spec.items(), self.sizes.values(), strict=True):
            table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @classmethod
    def decode(cls, text: bytes) -> Header:
        """Of the header's JSON text; strict: it must be what `encode` writes.

        Raises:
            ValueError: it isn't.
        """
        try:
            table = json.loads(text)
            metadata = table.pop("__metadata__")
            spec = {name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in table.items()}
            if not all(type(size) is int and size >= 0 for _, shape in spec.values() for size in shape):
                raise ValueError("a shape holds something else than sizes")
            if not all(type(value) is str for value in metadata.values()):
                raise ValueError("metadata that is no text")
            header = Header.of(spec, metadata)
            if header.data_bytes >= MAX_DATA:
                raise ValueError(f"{header.data_bytes} bytes of data are more than can be")
            same = header.encode()[8:] == text
        except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"it is no header of tensors ({type(error).__name__})") from None
        if not same:
            raise ValueError("the order or the offsets of its tensors are not those that are written here")
        return header

    def digest(self) -> Any:
        """A SHA-256 that has seen this header without its checksum, and goes on with the data."""
        return hashlib.sha256(self.with_metadata(sha256=UNKNOWN).encode())


def read_header(read: Any, what: str) -> Header:
    """The header of a stream of bytes, bounded before anything is allocated.

    Args:
        read: gives at most n bytes, fewer at the end, as a file's `read` does.
        what: named in errors.

    Raises:
        Damaged: there is none, or none of ours.
    """
    length = int.from_bytes(read_fully(read, 8, what), "little")
    if not 2 <= length <= MAX_HEADER:
        raise Damaged(f"{what} is damaged: a header of {length} bytes is not between 2 and {MAX_HEADER}.")
    try:
        return Header.decode(read_fully(read, length, what))
    except ValueError as error:
        raise Damaged(f"{what} is damaged: {error}.") from None


def read_fully(read: Any, length: int, what: str) -> bytes:
    """`length` bytes of a stream. Raises: Damaged: it ends before."""
    parts: list[bytes] = []
    missing = length
    while missing:
        part = read(min(missing, 1 << 20))
        if not part:
            raise Damaged(f"{what} is cut: {missing} bytes of {length} are missing.")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def data_of(header: Header, tensors: Mapping[str, torch.Tensor]) -> Iterable[memoryview]:
    """The bytes of tensors in the file's order; copied one at a time only if they are not contiguous on the host."""
    for name in header.spec:
        if tensors[name].numel():
            yield host_bytes(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8))


def host_bytes(data: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the host, which may be written through it."""
    return memoryview(cast(Any, data.numpy()))


def tensors_of(header: Header, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of a page's data.

    Args:
        data: uint8 `[header.data_bytes]`.
    """
    parts = data.split(list(header.sizes.values())) if header.spec else ()
    return {
        name: part.view(dtype).reshape(shape)
        for (name, (dtype, shape)), part in zip(header.spec.items(), parts, strict=True)
    }
