"""Where the pairs of a cohort are run: by Dask, here or on a cluster.

The coordinator hands the next pair of a lane to Dask when the one before is over; Dask
finds the machine. Each pair is a process of its own there, see `pairs`.

Whoever reaches a scheduler or worker of Dask runs programs as its user. So those that
are started here take no work by the network, or with TLS and keys made for the run.
"""

from contextlib import contextmanager, suppress
import logging

from dipy_ppir.workflows import pairs
from dipy_ppir.workflows.inputs import InputError

logger = logging.getLogger("dipy_ppir")

#: Seconds to wait for an existing scheduler.
_PATIENCE = 15
#: Without an address Dask would serve its pages to everybody, at port 8787.
_NO_PAGES = "127.0.0.1:0"
_EXTRA = "pip install 'dipy-ppir[cohort]'"


@contextmanager
def dask_client(concurrent, folder, scheduler=None, slurm=False):
    """A client of Dask.

    Parameters
    ----------
    concurrent : int
        pairs at a time.
    folder : Path
        where keys are left for workers of Slurm, which see the same files.
    scheduler : str, optional
        address of a scheduler that is there already.
    slurm : bool, optional
        start workers as jobs of Slurm, as the configuration of dask-jobqueue says.

    Raises
    ------
    InputError
        if Dask is not installed, not configured, or not reached.
    """
    try:
        import dask
        import distributed
    except ImportError:
        raise InputError(
            f"cohorts are run by Dask, which is missing: {_EXTRA}"
        ) from None
    logging.getLogger("distributed").setLevel(logging.ERROR)
    if scheduler:
        if not scheduler.startswith("tls://"):
            logger.warning(
                "Whoever reaches %s, other users of this machine too, runs programs as "
                "its user, and reads what that may read: let it speak TLS (tls://), or "
                "keep its network and machine closed",
                scheduler,
            )
        try:
            client = distributed.Client(scheduler, timeout=_PATIENCE)
        except (OSError, ValueError, TypeError) as exc:
            # The last is what Dask raises for TLS without certificates.
            keys = ""
            if scheduler.startswith("tls://"):
                keys = ", and the certificates in Dask's configuration"
                keys += " (distributed.comm.tls)"
            raise InputError(
                f"the scheduler {scheduler} of --scheduler cannot be reached "
                f"({type(exc).__name__}); check its address, for example "
                f"tcp://127.0.0.1:8786{keys}"
            ) from None
        with client:
            yield client
        return
    # Dask always serves pages; these are none, for this machine alone.
    silent = {f"distributed.{role}.http.routes": [] for role in ("scheduler", "worker")}
    with dask.config.set(silent):
        if slurm:
            cluster = _slurm_cluster(concurrent, folder)
        else:
            # Tasks only wait for processes, so threads do.
            cluster = distributed.LocalCluster(
                n_workers=1,
                threads_per_worker=concurrent,
                processes=False,
                dashboard_address=_NO_PAGES,
                worker_dashboard_address=_NO_PAGES,
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.ERROR,
            )
        with cluster, distributed.Client(cluster) as client:
            yield client


def _slurm_cluster(concurrent, folder):
    try:
        import dask
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise InputError(
            f"--slurm needs dask-jobqueue, which is missing: {_EXTRA}"
        ) from None
    extra = dask.config.get("jobqueue.slurm.worker-extra-args", None) or []
    try:
        cluster = SLURMCluster(
            worker_extra_args=[
                *extra,
                "--no-dashboard",
                "--dashboard-address",
                _NO_PAGES,
            ],
            security=True,
            shared_temp_directory=str(folder),
            scheduler_options={"dashboard_address": _NO_PAGES, "dashboard": False},
        )
    except ValueError as exc:
        raise InputError(
            f"--slurm takes queue, cores and memory of a job from dask-jobqueue's "
            f"configuration (~/.config/dask/jobqueue.yaml): {exc}"
        ) from None
    cluster.scale(concurrent)
    return cluster


def run_all(client, lanes, done):
    """Run the tasks of all lanes: in each one after the other.

    Parameters
    ----------
    client : distributed.Client
    lanes : sequence of iterator of Task
        asked for the next one when the one before is over; several may be the same.
    done : callable
        called with each task and its `Outcome`.
    """
    from distributed import as_completed

    under_way, finished = {}, as_completed()

    def start(lane):
        task = next(lane, None)
        if task is not None:
            # What was tried counts as tried: a pair is not begun twice behind its back.
            future = client.submit(pairs.run, task, pure=False, retries=0)
            under_way[future] = task, lane
            finished.add(future)

    try:
        for lane in lanes:
            start(lane)
        for future in finished:
            task, lane = under_way.pop(future)
            if future.status == "finished":
                outcome = future.result()
            else:
                reason = f"Dask could not run it: {future.exception()!r:.200}"
                outcome = task.outcome("failed", error=reason)
            done(task, outcome)
            start(lane)
    except BaseException:
        with suppress(Exception):
            client.cancel(list(under_way), force=True)
            client.run(pairs.stop)
        raise
