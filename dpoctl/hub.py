"""Access to the Hugging Face hub."""

import os
import socket
from functools import cache
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0


@cache
def hub_is_reachable() -> bool:
    """Whether the hub responds; tried once, so that an offline machine does not wait through every retry.

    Honours `HF_HUB_OFFLINE` and `HF_ENDPOINT`; behind a proxy the answer is always yes.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - start-up time

    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True
