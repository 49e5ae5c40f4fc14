"""What can be a name on the Hugging Face Hub, and whether the Hub can be reached: asked once."""

import re

from stablemask.errors import InputError

TIMEOUT_S = 5.0


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form ``NAME`` or ``OWNER/NAME``."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def require_hub(wanted: str) -> None:
    """Raise :class:`InputError` if ``wanted`` must come from the Hub and the Hub does not answer.

    The libraries' own calls retry for up to a minute before they give up. With ``HF_HUB_OFFLINE=1``
    nothing is asked: they then look in the local Hugging Face cache alone.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception as error:  # the HTTP library behind the session differs between releases
        raise InputError(
            f"{wanted}: cannot reach {constants.ENDPOINT}; check the network, name a local folder, "
            "or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
