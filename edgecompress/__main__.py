"""``python -m edgecompress``."""

from __future__ import annotations

from edgecompress.cli import main

if __name__ == "__main__":
    main()
