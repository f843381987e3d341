"""Communication read off a profile: synthetic traces of a GPU, and programs as compilers print."""

import gzip
import json

import pytest

from experiments.bench.exposed import Collective, collectives, merged, waits
from experiments.bench.kernels import read_trace

MESH = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
PROGRAM = """HloModule step

%async_computation (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.3 = f32[4]{0} reduce-scatter(%p), replica_groups={{0,2},{1,3}}, to_apply=%add
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,2},{1,3}}
  %rs = ((f32[8]{0}), f32[4]{0}) async-start(%y), calls=%async_computation
  %other = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%y), calls=%async_computation
  %all-to-all.7 = bf16[8]{0} all-to-all(%z), replica_groups={{0,1},{2,3}}, dimensions={0}
  %fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="all_gather"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %all-reduce.5 = f32[8]{0} all-reduce(%a), replica_groups=[1,4]<=[4], to_apply=%add
}
"""


def trace(*kernels, devices=1):
    """Events of kernels (stream, name, operation, begin, end) in microseconds, on every device."""
    events = [{"ph": "M", "pid": 99, "name": "process_name", "args": {"name": "/host:CPU"}}]
    for device in range(devices):
        name = {"name": f"/device:GPU:{device}"}
        events.append({"ph": "M", "pid": device, "name": "process_name", "args": name})
        for stream in (1, 2):
            name = {"name": f"Stream #{stream}(Compute)"}
            events.append({"ph": "M", "pid": device, "tid": stream, "name": "thread_name",
                           "args": name})  # fmt: skip
        for stream, name, operation, begin, end in kernels:
            args = {"hlo_op": operation} if operation else {}
            events.append({"ph": "X", "pid": device, "tid": stream, "name": name, "ts": begin,
                           "dur": end - begin, "args": args})  # fmt: skip
    return events


def test_collectives_are_found_by_name_with_the_axes_of_their_groups():
    assert collectives(PROGRAM, MESH) == {
        "reduce-scatter.3": Collective("reduce-scatter", "fsdp"),
        "rs": Collective("reduce-scatter", "fsdp"),
        "other": Collective("reduce-scatter", "fsdp"),
        "all-gather-start.1": Collective("all-gather", "fsdp"),
        "all-to-all.7": Collective("all-to-all", "expert"),
        "all-reduce.5": Collective("all-reduce", "fsdp expert"),
    }


def test_a_collective_is_exposed_only_where_nothing_else_runs():
    events = trace(
        (1, "gemm", "fusion.2", 0, 3000),
        (2, "ncclDevKernel_AllGather_RING", "all-gather-start.1", 2000, 5000),
        (1, "gemm", "fusion.2", 4500, 6000),
        (1, "ncclDevKernel_SendRecv", "all-to-all.7", 6000, 7000),
        devices=2,
    )
    found = waits(events, collectives(PROGRAM, MESH))
    assert (found.window, found.running, found.exposed) == pytest.approx((7.0, 4.0, 2.5))
    assert list(found.rows) == [
        {"collective": "all-gather", "axis": "fsdp", "calls": 1, "ms": pytest.approx(3.0),
         "ms exposed": pytest.approx(1.5)},
        {"collective": "all-to-all", "axis": "expert", "calls": 1, "ms": pytest.approx(1.0),
         "ms exposed": pytest.approx(1.0)},
    ]  # fmt: skip


def test_a_kernel_that_names_no_operation_is_known_by_its_own_name():
    known = collectives(PROGRAM, MESH)
    found = waits(trace((2, "ncclDevKernel_ReduceScatter_Sum_f32", None, 0, 1000)), known)
    assert found.rows[0]["axis"] == "fsdp" and found.rows[0]["collective"] == "reduce-scatter"
    # Two axes have all-gathers here, so its name alone does not say which.
    known["other"] = Collective("all-gather", "expert")
    found = waits(trace((2, "ncclDevKernel_AllGather_RING", None, 0, 1000)), known)
    assert found.rows[0]["axis"] == "?"


def test_a_trace_without_gpus_has_no_waits():
    assert waits(trace(devices=0), {}) is None


def test_spans_that_touch_or_overlap_are_one():
    assert merged([(4, 6), (0, 1), (1, 3), (5, 9)]) == [(0, 3), (4, 9)]


def test_a_trace_is_read_from_its_folder(tmp_path):
    with pytest.raises(ValueError, match="no trace"):
        read_trace(tmp_path)
    inner = tmp_path / "plugins"
    inner.mkdir()
    events = trace((1, "gemm", None, 0, 1))
    content = json.dumps({"traceEvents": events}).encode()
    (inner / "perfetto_trace.json.gz").write_bytes(gzip.compress(content))
    assert read_trace(tmp_path) == events
