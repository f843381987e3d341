"""Safetensors files: read as their own library writes them, and nothing else is accepted."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_jax.tensor_files import DTYPES, Spec, read_header, write_file


def arrays():
    draw = np.random.default_rng(0)
    return {
        "a": draw.standard_normal((3, 5)).astype(np.float32),
        "b": draw.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "c": draw.standard_normal((130, 7)).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }


def written(path):
    """A file of ours."""
    specs = [Spec(n, {"a": "F32", "b": "BF16", "c": "F8_E4M3", "scalar": "F32", "empty": "F16"}[n],
                  a.shape) for n, a in arrays().items()]  # fmt: skip
    write_file(path, specs, iter(arrays().values()))
    return path


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_files_of_the_formats_own_library_are_read_bit_for_bit(tmp_path):
    from safetensors.numpy import save_file

    plain = {k: v for k, v in arrays().items() if k not in ("b", "c")}
    save_file(plain, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert set(found) == set(plain)
    for name, array in plain.items():
        assert_same_bits(found[name].read(), array)


def test_the_formats_own_library_reads_ours(tmp_path):
    from safetensors import safe_open

    with safe_open(written(tmp_path / "x.safetensors"), "np") as file:
        assert set(file.keys()) == set(arrays())
        assert_same_bits(file.get_tensor("a"), arrays()["a"])


def test_what_is_written_is_read_back_whole_and_by_rows(tmp_path):
    found = read_header(written(tmp_path / "x.safetensors"))
    for name, array in arrays().items():
        assert_same_bits(found[name].read(), array)
    assert_same_bits(found["c"].read(slice(40, 77)), arrays()["c"][40:77])


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    def failing():
        yield np.zeros((2,), np.float32)
        raise OSError("disk full")

    specs = [Spec("a", "F32", (2,)), Spec("b", "F32", (2,))]
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "x.safetensors", specs, failing())
    assert list(tmp_path.iterdir()) == []


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": entry(), "b": entry()}, b"\0" * 8, "overlaps the one before"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "leaves a gap"),
        ({"a": entry()}, b"\0" * 12, "accounts for"),
        ({"a": entry()}, b"\0" * 4, "the file holds 4 bytes"),
        ({"a": entry(offsets=(0, 2**62))}, b"\0" * 8, "the file holds 8 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8, "needs"),
        ({"a": entry(shape=(-1,))}, b"\0" * 8, "not a short list of sizes"),
        ({"a": entry(shape=(True, 2))}, b"\0" * 8, "not a short list of sizes"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "lies at 8..0"),
        ({"a": entry(dtype="F33")}, b"\0" * 8, "unknown dtype 'F33'"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, "unknown dtype"),
        ({"a": entry() | {"more": 1}}, b"\0" * 8, "nothing else"),
        ({"a\n": entry()}, b"\0" * 8, "unprintable"),
        ({"": entry()}, b"\0" * 8, "empty"),
        ([], b"", "not a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "must map names to strings"),
        (b'{"a": {}, "a": {}}', b"", "duplicate name 'a'"),
        (b"[" * 100_000, b"", "header is damaged"),
        (b"\xff\xfe{}", b"", "header is damaged"),
        (b'{"a": NaN}', b"", "NaN is no number"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:30],
)
def test_a_wrong_header_is_one_clear_error(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        read_header(file_of(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_wrong_length_of_the_header_is_refused(tmp_path, length):
    path = file_of(tmp_path / "x.safetensors", {"a": entry()}, b"\0" * 8, length)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_header(path)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_changed_or_cut_file_is_refused_or_still_lies_within_itself(tmp_path, data):
    path = tmp_path / "x.safetensors"
    whole = bytearray(written(tmp_path / "good.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans())
                     else whole)
    try:
        found = read_header(path)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    size = path.stat().st_size
    for tensor in found.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.num_bytes <= size
        array = tensor.read()
        assert array.dtype == DTYPES[tensor.dtype] and array.nbytes == tensor.num_bytes
