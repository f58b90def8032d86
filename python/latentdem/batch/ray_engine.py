"""Workers as Ray actors, on this machine or a cluster.

Actors and not Ray Data: the driver must know which image each worker holds, so that a dead one
costs that image alone, and must write each result as it comes.  Ray Data tracks and retries blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from latentdem.batch.engines import START_SECONDS, Pool, Seat, WorkerLost
from latentdem.batch.worker import Outcome, Setup, Task, Worker
from latentdem.io import InputError

LOOPBACK = "127.0.0.1"


class RayEngine(Pool):
    """One actor a worker, each with a prior of its own.

    Tasks carry the image's bytes and outcomes those of the files, so actors need no shared disk;
    a ``--prior`` of one's own must lie at the same path on each machine.

    Args:
        setups: one a worker; ``threads`` is the number of CPUs that its actor asks for.
        address: of a running cluster; None: a new one here, which listens on loopback alone.
    """

    shares_disk = False

    def __init__(self, setups: Sequence[Setup], address: str | None = None) -> None:
        super().__init__(setups)
        # Read when Ray is imported: it shall send nothing about its use.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # What Ray does by itself where it knows no clusters: all listens on loopback.  On Linux
            # it would take the machine's outer address, even when it is told another.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
        except ImportError:
            raise InputError(
                "--engine ray needs Ray: pip install 'latentdem[ray]', or use --workers"
            ) from None
        self._ray: Any = ray
        cpus = [setup.threads or 1 for setup in setups]
        gpus = sum(setup.device != "cpu" for setup in setups)
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            if address is None:
                ray.init(
                    "local",
                    num_cpus=sum(cpus),
                    num_gpus=gpus,
                    include_dashboard=False,
                    **options,
                )
            else:
                ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"Ray cannot be reached: {str(error).splitlines()[0]}") from None
        try:
            here = ray.util.get_node_ip_address()
            if address is None and here != LOOPBACK:
                raise InputError(
                    f"Ray listens on {here}, because it was imported before: start latentdem in a "
                    "process of its own, or give the address of a cluster"
                )
            self._start_all()
        except BaseException:
            self.close()
            raise

    def _start(self, seat: Seat) -> None:
        setup = self._setups[seat.index]
        seat.details = (
            self._ray.remote(Worker)
            .options(
                num_cpus=setup.threads or 1,
                num_gpus=int(setup.device != "cpu"),
                max_concurrency=setup.depth + 1,  # one more, so that ready() need not wait
                max_restarts=0,
            )
            .remote(setup)
        )

    def _wait(self, seat: Seat) -> None:
        try:
            self._ray.get(seat.details.ready.remote(), timeout=START_SECONDS)
        except self._ray.exceptions.GetTimeoutError:
            raise InputError(
                f"the cluster had no room for {len(self._setups)} workers within "
                f"{START_SECONDS:.0f} s: fewer --workers or --threads"
            ) from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"a worker could not start: {reason}") from None

    def _send(self, seat: Seat, task: Task, future: Future[Outcome]) -> None:
        def answered(found: Future[Outcome]) -> None:
            error = found.exception()
            if isinstance(error, self._ray.exceptions.RayError):
                error = WorkerLost(str(error).strip().splitlines()[0])
            self._answered(seat, future, found.result() if error is None else error)

        seat.details.run.remote(task).future().add_done_callback(answered)

    def close(self) -> None:
        """See :class:`Engine`; a cluster that was started here ends."""
        for seat in self._seats:
            if seat.details is not None:
                self._ray.kill(seat.details)
        self._ray.shutdown()
