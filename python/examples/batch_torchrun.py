"""Many images on many machines without Ray: each process takes every R-th image.

    torchrun --nproc-per-node 4 python/examples/batch_torchrun.py photos -o out --kernel-size 25

All see the same inputs and the same output folder; each keeps ``manifest-RANK.sqlite`` there, and
``latentdem batch-status out`` adds them up.  Started again, it goes on where it was, as long as the
number of processes is the same; with another number, finished images are found on disk.

Images that fail are in ``failed-RANK.csv``; the exit status is 0 all the same, because torchrun
would stop the other processes for one bad image.
"""

import argparse
import os

import torch

from latentdem.batch import Options, Summary, run_batch


def main() -> None:
    """Deblur this process's share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="folders, globs, images, manifests, tar shards")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--kernel-size", type=int)
    parser.add_argument("--noise-std", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prior")
    parser.add_argument("--dtype", default="auto", help="fp16, bf16 or fp32; the same on all hosts")
    parser.add_argument("--assume-blurred", action="store_true", help="sharp photographs, too")
    arguments = parser.parse_args()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, beside = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))

    def report(summary: Summary, line: str) -> None:
        print(f"[{rank}] {summary.done + summary.failed}/{summary.images} {line}", flush=True)

    summary = run_batch(
        arguments.inputs,
        arguments.output,
        Options(
            kernel_size=arguments.kernel_size,
            assume_blurred=arguments.assume_blurred,
            noise_std=arguments.noise_std,
            steps=arguments.steps,
            prior=arguments.prior,
            dtype=arguments.dtype,
        ),
        device=f"cuda:{local}" if cuda else "cpu",
        threads=max(1, cores // max(1, beside)),
        share=(rank, processes),
        report=report,
    )
    print(f"[{rank}] {summary.done} done, {summary.failed} failed", flush=True)


if __name__ == "__main__":
    main()
