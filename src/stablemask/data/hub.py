"""What a user names by a folder or by its name on the Hugging Face Hub, and whether that answers."""

import os
import re

from ..errors import InputError
from ..reading import user_path

TIMEOUT_S = 5.0


def local_or_hub(name: str, wanted: str, otherwise: str) -> str:
    """The path of the folder that a user names, or else a name on the Hub, which answers.

    Raises:
        InputError: it is neither, told as ``wanted: otherwise``, or see :func:`require_hub`.
    """
    folder = user_path(name)
    if name and os.path.isdir(folder):
        return str(folder)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None:  # NAME or OWNER/NAME
        raise InputError(f"{wanted}: {otherwise}")
    require_hub(wanted)
    return name


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
