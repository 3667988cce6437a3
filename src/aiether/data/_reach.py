"""Whether the Hub answers, asked once and for seconds: its own libraries try again for most of a minute."""

from __future__ import annotations

from typing import Literal

TIMEOUT_S = 5.0
"""To connect, and again to be answered."""


def no_answer(name: str, kind: Literal["dataset", "model"]) -> Exception | None:
    """What keeps the Hub from answering for a name: no network, no such host. None if it answers at all.

    Whether it has that name, and gives it, is for the download to find out.
    """
    import huggingface_hub  # needed for a name on the Hub alone
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except (
        HfHubHTTPError,
        ValueError,
    ):  # an answer, if not the one hoped for; or no name that can be asked for
        return None
    except Exception as error:  # noqa: BLE001 - the libraries under it have errors of their own for a network
        return error
    return None
