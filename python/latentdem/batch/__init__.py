"""Many images: folders, manifests and shards on processes or Ray, in a run that survives kills."""

from latentdem.batch.engines import Engine, LocalEngine, ProcessEngine, WorkerLost
from latentdem.batch.inputs import Item, find_items
from latentdem.batch.manifest import Failure, Manifest
from latentdem.batch.request import Options
from latentdem.batch.run import Summary, run_batch

__all__ = [
    "Engine",
    "Failure",
    "Item",
    "LocalEngine",
    "Manifest",
    "Options",
    "ProcessEngine",
    "Summary",
    "WorkerLost",
    "find_items",
    "run_batch",
]
