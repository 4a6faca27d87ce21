"""Lose one of two nodes, go on from memory on the other: `python examples/go_on_after_a_lost_node.py`.

Two agents of torchrun stand for nodes of two ranks. One is killed; the other starts its ranks again.
"""

import os
import subprocess
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import swiftmoe_lightning as sml

TORCHRUN = os.getppid()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.moe, self.outer = sml.MoE(dim=16, hidden_dim=64, num_experts=8, top_k=2), torch.nn.Linear(16, 1)

    def forward(self, x):
        return self.outer(x + self.moe(x))


def batch_of(step):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, x.sin().sum(1, keepdim=True)


def lose_a_node(step, rank=2):
    if step == 13 and dist.get_world_size() == 4 and dist.get_rank() == rank:
        print("in step 13 a node is lost", flush=True)
        os.kill(TORCHRUN, 9)
        os.kill(os.getpid(), 9)


def train(folder, num_steps, after_backward=lambda step: None, after_step=lambda step, loss: None):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model()
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(expert_parallel_size=2))  # groups of 2 ranks
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    checkpoint = sml.MemoryCheckpoint(engine, [optimizer], folder)
    found = checkpoint.load() or {"step": 0}
    if rank == 0:
        print(f"{world_size} rank(s) go on after step {found['step']}", flush=True)
    for step in range(found["step"] + 1, num_steps + 1):
        # The global batch stays the same, for any number of ranks.
        x, y = (part[rank::world_size] for part in batch_of(step))
        loss = F.mse_loss(wrapped(x), y)
        loss.backward()
        after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save(step)
        dist.all_reduce(mean := loss.detach() / world_size)
        after_step(step, mean.item())
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {mean:.4f}", flush=True)
    checkpoint.wait()
    dist.destroy_process_group()


def run_nodes(script, memory, *arguments):
    """Runs torchrun as on each of two nodes, which meet in a store that lies elsewhere, so that either may be lost."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # A node whose agent is silent for 3 s is lost; who is left waits 2 s for others, and goes on.
    conf = "is_host=0,join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{store.port}", f"--rdzv-conf={conf}"]
    # With gloo, ranks that are started again would find those that died in torchrun's store: they need a new one.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    nodes = [subprocess.Popen([*torchrun, script, f"{memory}/{name}", *arguments], env=environment) for name in "ab"]
    return sorted(node.wait() for node in nodes)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(sys.argv[1], 30, lose_a_node)
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            assert run_nodes(__file__, memory) == [-9, 0]  # one was killed, the other ended well
