"""Rows on disk, a file for each cell: OUT/rows/<cell>.json. What tables and figures show is computed from them."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .cell import Cell, Protocol
from .statistics import wilson

Row = dict[str, Any]
PARTS = {"cell", "protocol", "layers", "history", "seconds", "made"}
FOUND = {"clean", "robust", "norms"}  # of a network that was trained to the end; of the others "diverged" says when
OF_THE_RUN = ("seeds", "preset")  # fields of a protocol that may differ from row to row


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which then takes the file's place at once, or never."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield new
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def forget_partial(file: Path) -> None:
    """What ``replacing`` leaves behind when it is killed."""
    for left in file.parent.glob(f".{file.name}.*"):
        left.unlink(missing_ok=True)


def path(out: Path, cell: Cell) -> Path:
    return out / "rows" / f"{cell.name}.json"


def write(out: Path, cell: Cell, row: Row) -> None:
    with replacing(path(out, cell)) as new:
        new.write_text(json.dumps(row, allow_nan=False) + "\n")


def read(out: Path) -> list[Row]:
    """All rows, by name."""
    return [read_one(file) for file in sorted((out / "rows").glob("*.json"))]


def read_one(file: Path) -> Row:
    try:
        row = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"row {str(file)!r} is damaged: {error}") from None
    if not (isinstance(row, dict) and row.keys() >= PARTS and ("diverged" in row or row.keys() >= FOUND)):
        raise ValueError(f"row {str(file)!r} is none: it must have {', '.join(sorted(PARTS | FOUND))}")
    return row


def missing(out: Path, cells: Sequence[Cell], protocol: Protocol) -> list[Cell]:
    """The cells without a row. Rows of another protocol in the same folder are an error."""
    for row in read(out):
        check_same(row["protocol"], protocol, f"folder {str(out)!r} has rows")
    return [cell for cell in cells if not path(out, cell).exists()]


def check_same(theirs: dict[str, Any], protocol: Protocol, what: str) -> None:
    ours = as_json(protocol)
    for name, value in ours.items():
        if name not in OF_THE_RUN and theirs.get(name) != value:
            raise ValueError(f"{what} of another protocol, with {name} {theirs.get(name)!r} and not {value!r}")


def as_json(protocol: Protocol) -> dict[str, Any]:
    """As it is read back from a file."""
    return json.loads(json.dumps(asdict(protocol)))


def from_json(protocol: dict[str, Any]) -> Protocol:
    return Protocol(**protocol | {"attacks": tuple(protocol["attacks"])})


def counted(right: np.ndarray) -> dict[str, Any]:
    """What a row says of the images that a network names right.

    >>> counted(np.array([True, True, False]))["accuracy"]
    0.6667
    """
    images, count = len(right), int(right.sum())
    which = base64.b64encode(np.packbits(right).tobytes()).decode()
    interval = [round(end, 4) for end in wilson(count, images)]
    return {
        "images": images,
        "right": count,
        "accuracy": round(count / images, 4),
        "interval": interval,
        "which": which,
    }


def flags(part: dict[str, Any]) -> np.ndarray:
    """Image by image, from what ``counted`` made.

    >>> flags(counted(np.array([True, True, False])))
    array([ True,  True, False])
    """
    bits = np.frombuffer(base64.b64decode(part["which"]), np.uint8)
    return np.unpackbits(bits, count=part["images"]).astype(bool)
