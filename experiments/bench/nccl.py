"""torch's all-to-all of one size after the other, in a process for each GPU.

`python -m experiments.bench.nccl RANK COUNT PORT BYTES...`; the first process writes microseconds
by bytes as JSON. With no GPU it runs on CPU by Gloo.
"""

import json
import statistics
import sys
import time

CALLS, ROUNDS = 20, 5


def main() -> None:
    """The words of the command line."""
    rank, count, port, *sizes = map(int, sys.argv[1:])
    import torch
    import torch.distributed as group

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    group.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count,
    )  # fmt: skip
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    found = {}
    for size in sizes:
        # Whole parts for each process; bytes, as NCCL's time does not depend on the type.
        part = size // count
        sent = torch.ones(part * count, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)

        def exchange(sent=sent, received=received) -> float:
            wait()
            began = time.perf_counter()
            for _ in range(CALLS):
                group.all_to_all_single(received, sent)
            wait()
            return (time.perf_counter() - began) / CALLS

        exchange()
        found[str(size)] = 1e6 * statistics.median(exchange() for _ in range(ROUNDS))
    if rank == 0:
        print(json.dumps({"torch": torch.__version__, "us": found}), flush=True)
    group.barrier()
    group.destroy_process_group()


if __name__ == "__main__":
    main()
