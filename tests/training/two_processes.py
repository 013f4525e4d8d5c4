"""Started by torchrun: trains every scenario on two processes and saves what came out, for `test_two_processes`."""

import sys
from pathlib import Path

import torch
from scenarios import SCENARIOS, credited, run_whole_and_resumed, train

from rlhf.training.distributed import end_worker, make_accelerator


def main(folder):
    accelerator = make_accelerator()
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    for name, scenario in SCENARIOS.items():
        weights, metrics = train(scenario, rank=rank, accelerator=accelerator)
        torch.save({"weights": weights, "metrics": metrics}, Path(folder) / f"{name}_{rank}.pt")
    torch.save(credited(rank=rank, accelerator=accelerator), Path(folder) / f"credited_{rank}.pt")
    torch.save(run_whole_and_resumed(folder, accelerator), Path(folder) / f"run_{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    end_worker()
