"""A server to test the page with, in a process of its own.

In its own, as Gradio leaves event loops open, and a warning is an error here.  A deblurring of 40
steps is a stand-in that does nothing for a minute, and counts in ``steps.log``.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from object_stand_in import exact_prior

import latentdem
from latentdem.em.reconstruct_settings import PoseSettings, ReconstructSettings, SamplerSettings
from latentdem.em.steps import StepReport
from latentdem.priors import load_prior

QUICK = ReconstructSettings(
    rounds=1,
    resolution=16,
    iterations=30,
    samples_per_ray=24,
    poses=PoseSettings(azimuth_step=30, levels=(0.5,), modes=2, iterations=2),
    sampler=SamplerSettings(targets=4, steps=4),
)
SLOW = 40


def last(job):
    return list(job.watch(0.05))[-1]


def counting(steps, log=None):
    """Work that reports a few thousand times, and stops when it is told to."""

    def work(job):
        for step in range(steps):
            job.report(step)
            if log is not None:
                log.append(step)
            time.sleep(0.005)
        return "finished"

    return work


def main(log):
    from latentdem.serve.jobs import Limits
    from latentdem.serve.models import Models
    from latentdem.serve.server import open_server

    real = latentdem.deblur

    def deblur(image, *, steps, progress, **options):
        if steps != SLOW:
            return real(image, steps=steps, progress=progress, **options)
        picture, kernel = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 3, 3) / 9
        for step in range(3000):
            progress(0, 1, StepReport(step, 3000, 0, 0.0, 1.0, picture, kernel))
            log.write_text(str(step))
            time.sleep(0.02)

    latentdem.deblur = deblur
    prior, _ = exact_prior()
    latentdem.reconstruct = partial(latentdem.reconstruct, prior=prior, settings=QUICK)
    limits = Limits(megapixels=0.01, megabytes=0.1, seconds=60, waiting=1)
    with open_server(limits, models=lambda: Models(photographs=load_prior())) as server:
        print(json.dumps({"url": server.url, "root": str(server.store.root)}), flush=True)
        server.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
