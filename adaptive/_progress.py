"""Progress bars: one switch for all, and one process that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from adaptive._distributed import process


def bar(iterable: Iterable[Any] | None = None, *, progress: bool, **settings: Any) -> Any:
    """Return a bar of ``tqdm.auto``.

    ``progress=False`` switches it off; so does tqdm's own ``TQDM_DISABLE=1`` in the environment.
    Of several processes, the first shows its bars.
    """
    quiet = {} if progress and process() == 0 else {"disable": True}
    return tqdm(iterable, **settings, **quiet)
