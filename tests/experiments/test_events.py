"""TensorBoard's files, read by a reader of our own that follows the published formats."""

import struct

import pytest

from experiments import events
from experiments.events import Events
from tests.experiments import runs


def crc32c(data):
    """Bit by bit, over the polynomial as it is printed (0x1EDC6F41)."""
    flip = lambda value, bits: int(f"{value:0{bits}b}"[::-1], 2)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= flip(byte, 8) << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x1EDC6F41 if crc >> 31 else 0)) & 0xFFFFFFFF
    return flip(crc, 32) ^ 0xFFFFFFFF


def fields(message):
    """(number, value) of each field of a protobuf message; strings and messages are bytes."""
    found, at = [], 0

    def integer():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            value = integer()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or integer()
            value, at = message[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def read(path):
    """The messages of a file, checksums verified."""
    data, messages = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        message, (one,) = data[12 : 12 + size], struct.unpack("<I", data[8:12])
        (two,) = struct.unpack("<I", data[12 + size : 16 + size])
        for mask, part in ((one, data[:8]), (two, message)):
            crc = crc32c(part)
            assert mask == ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
        messages.append(fields(message))
        data = data[16 + size :]
    return messages


def test_the_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283


def test_scalars_of_each_step_are_read_back(tmp_path):
    log = Events(tmp_path / "events", first_step=300)
    log.write(300, {"loss": 0.25, "tokens": 3e9})
    [path] = (tmp_path / "events").glob("events.out.tfevents.*")
    version, start, step = (dict(message) for message in read(path))  # while it is open
    assert version[3] == b"brain.Event:2" and 0 < struct.unpack("<d", version[1])[0]
    assert start[2] == 300 and fields(start[7]) == [(1, 1)]
    assert step[2] == 300
    values = [dict(fields(value)) for _, value in fields(step[5])]
    found = {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}
    assert found == {"loss": 0.25, "tokens": 3e9}
    log.close()
    assert events.number(300) == b"\xac\x02"  # the example of protobuf's documentation


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    log = Events(tmp_path / "events", first_step=1)
    with runs.files_limited_to(20), pytest.raises(OSError, match="tfevents.* could not be written"):
        log.write(1, {"loss": 0.25})
    log.close()
