"""Processes of a group, each with its own rows of a batch."""

import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_rank(rank, world, meeting, body, failures):
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        body(rank, world)
    except Exception:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    # A rank whose body had passed aborted at its end, once. Threads of gloo may still hold tensors,
    # and releasing one while the interpreter is being finalised can abort the process.
    os._exit(0)


def on_ranks(body, world=2):
    """Run `body(rank, world)` in that many processes; their failures fail the test.

    They are forks of a server that has imported torch, which takes seconds, and started nothing.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", body.__module__])
    failures = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        processes = [
            context.Process(target=run_rank, args=(rank, world, meeting, body, failures))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
            if process.exitcode is None:
                process.kill()
    messages = []
    while not failures.empty():
        messages.append(failures.get())
    assert not messages, "\n".join(messages)
    assert [process.exitcode for process in processes] == [0] * world


def shards(x, labels, sizes):
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))
