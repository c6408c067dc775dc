"""Entry point of ``adaptive`` and ``python -m adaptive``."""

from __future__ import annotations

import sys

import typer

from adaptive._cli import app
from adaptive.calibration import AdaptiveError


def main() -> None:
    """Run the command line; an error of the user's is one line and status 2, never a traceback."""
    try:
        app()
    except (AdaptiveError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
