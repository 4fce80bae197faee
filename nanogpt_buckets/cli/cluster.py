"""Workers on other machines: a Dask scheduler's address becomes an executor for `build`.

Knows nothing of buckets. Imports Dask distributed, an extra, only when asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from importlib.util import find_spec

from nanogpt_buckets.errors import BackendUnavailable, UsageError
from nanogpt_buckets.values import shown

log = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(tcp|tls|ws|wss)://[^\s/]+:\d{1,5}")
# Of asking who is there, and of each of the two calls after that.
_TIMEOUT_S = 3.0
# Where they tell on stderr what becomes of connections, which is told here in a sentence, or is none of the user's.
_TALKATIVE = ("distributed", "distributed.client", "distributed.gc", "tornado", "tornado.application")


@contextlib.contextmanager
def workers_of(address: str) -> Iterator[Executor]:
    """Yield what runs functions on the workers of the Dask scheduler at an address, for example tcp://10.0.0.7:8786.

    Raises:
        UsageError: that is no address.
        BackendUnavailable: Dask distributed is not installed, or no scheduler answers there within seconds.
    """
    if _ADDRESS.fullmatch(address) is None:
        raise UsageError(f"{shown(address)} is no scheduler's address", hint="for example --scheduler tcp://host:8786")
    if find_spec("distributed") is None:
        raise BackendUnavailable(
            "--scheduler needs Dask distributed, which is not installed",
            hint="pip install 'nanogpt-buckets[distributed]'",
        )
    import dask

    dask.config.set(logging=dict.fromkeys(_TALKATIVE, "critical"))  # read while the next import runs
    from distributed import Client
    from distributed.versions import VersionMismatchWarning

    hint = "dask scheduler --port 8786 starts one, and dask worker tcp://HOST:8786 each of its workers"
    try:
        # on its own, for a Client waits without end for a port that takes a connection and says nothing
        kind = asyncio.run(_kind(address))
    except Exception as error:  # what speaks another protocol there shows in any way
        why = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
        raise BackendUnavailable(f"no Dask scheduler answers at {address} ({why:.200})", hint=hint) from error
    if kind != "Scheduler":
        raise BackendUnavailable(f"it is a Dask {kind.lower()} that answers at {address}, no scheduler", hint=hint)
    with warnings.catch_warnings():
        # what must be the same on a worker is compared where it compiles
        warnings.simplefilter("ignore", VersionMismatchWarning)
        try:
            client = Client(address, timeout=_TIMEOUT_S, set_as_default=False)
        except Exception as error:
            said = f"the Dask scheduler at {address} does not take this client: {type(error).__name__}: {error}"
            raise BackendUnavailable(
                said, hint="see that Dask distributed is the same version here and there"
            ) from error
    with client:
        if not client.nthreads():
            log.warning("the scheduler at %s has no worker yet; the build waits for one", address)
        yield client.get_executor()


async def _kind(address: str) -> str:
    """Return what sort of Dask process answers at an address."""
    from distributed.core import rpc
    from distributed.security import Security

    async with asyncio.timeout(_TIMEOUT_S):
        async with rpc(address, connection_args=Security().get_connection_args("client")) as peer:
            return str((await peer.identity())["type"])
