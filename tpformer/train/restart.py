"""Which run a launch has begun: what workers that torchrun starts again (--max-restarts) need to go on with it.

torchrun's own store outlives its workers and nothing else: no later launch can take up a run by mistake, as it could
by a launch id that a person chose, and a directory that was there before this launch is not this launch's.
"""

from pathlib import Path

import torch.distributed as dist

_KEY = "tpformer_run_directory"


def remember_run(directory: Path) -> None:
    """Have workers that are started again find this run; one rank calls it."""
    if (store := _launcher_store()) is not None:
        store.set(_KEY, str(directory))


def remembered_run() -> Path | None:
    """The run that earlier workers of this launch began, if there were any; on every rank before any remembers."""
    store = _launcher_store()
    return Path(store.get(_KEY).decode()) if store is not None and store.check([_KEY]) else None


def _launcher_store() -> dist.Store | None:
    """Where torchrun and its workers meet; None without it, as the tests' ranks are."""
    if not (dist.is_initialized() and dist.is_torchelastic_launched()):
        return None
    return next(dist.rendezvous("env://"))[0]
