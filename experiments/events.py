"""events/: the scalars of a run as TensorBoard reads them, in its record and protobuf formats."""

import functools
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from experiments.run_directory import writing

# Fields of TensorBoard's Event, Summary, Summary.Value and SessionLog messages.
WALL_TIME, STEP, FILE_VERSION, SUMMARY, SESSION_LOG = 1, 2, 3, 5, 7
VALUE, TAG, SIMPLE_VALUE, STATUS = 1, 1, 2, 1
START = 1  # of a session: what earlier files say of this step and later ones is dropped


class Events:
    """Appends the scalars of each step to a new file; each is on disk when `write` returns."""

    def __init__(self, folder: Path, *, first_step: int):
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Not buffered: nothing is left to be written when it is closed.
            self._file = self._path.open("wb", buffering=0)
            self._append(text(FILE_VERSION, b"brain.Event:2"))
            started = text(SESSION_LOG, varint(STATUS, START))
            self._append(varint(STEP, first_step) + started)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one event of all scalars."""
        values = b"".join(
            text(VALUE, text(TAG, name.encode()) + fixed(SIMPLE_VALUE, "<f", value))
            for name, value in scalars.items()
        )
        with writing(self._path):
            self._append(varint(STEP, step) + text(SUMMARY, values))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: bytes) -> None:
        self._file.write(record(fixed(WALL_TIME, "<d", time.time()) + event))


def record(data: bytes) -> bytes:
    """Length and data, each followed by its checksum (TFRecord)."""
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecord has it."""
    crc, table = 0xFFFFFFFF, crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def crc_table() -> list[int]:
    """The CRC-32C of each byte (polynomial 0x82F63B78, bits reversed)."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


# Fields of protobuf messages: a key, which is number and wire type, and the value.


def varint(field: int, value: int) -> bytes:
    """A field that is an integer."""
    return number(field << 3) + number(value)


def text(field: int, value: bytes) -> bytes:
    """A field that is a string or a message."""
    return number(field << 3 | 2) + number(len(value)) + value


def fixed(field: int, form: str, value: float) -> bytes:
    """A field that is a float or a double, by struct's format."""
    return number(field << 3 | (1 if form == "<d" else 5)) + struct.pack(form, value)


def number(value: int) -> bytes:
    """An integer, seven bits a byte."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
