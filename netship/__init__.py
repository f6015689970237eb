"""netship: trained vision networks from ONNX to the device that runs them, on Apache TVM.

In a checkout this folder has links to the project's folders; an installed package has the folders themselves. What
it offers is in `netship.api`, which is imported when one of its names is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netship.api import Error as Error
    from netship.api import Network as Network
    from netship.api import __version__ as __version__
    from netship.api import build as build
    from netship.api import check as check
    from netship.api import estimate as estimate
    from netship.api import open as open
    from netship.api import tune as tune

__all__ = ["Error", "Network", "build", "check", "estimate", "open", "tune"]


def __getattr__(name: str) -> object:
    if name not in (*__all__, "__version__"):
        raise AttributeError(f"module 'netship' has no attribute {name!r}")
    from netship import api

    return getattr(api, name)
