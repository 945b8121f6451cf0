"""``python -m edgecompress``, and the ``edgecompress`` command: Ctrl-C leaves no traceback while modules are loaded."""

from __future__ import annotations

import sys

_INTERRUPTED = 130  # errors.INTERRUPTED_EXIT_CODE: nothing may be imported before there is someone to catch Ctrl-C


def main() -> None:
    """Run the command line."""
    try:
        from edgecompress.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing half-written is left\n")
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
