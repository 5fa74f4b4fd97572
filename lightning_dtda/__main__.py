"""``python -m lightning_dtda``."""

import os
import sys

if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
    # Python puts the working directory first, where a file beside the data could replace one of Python's own modules.
    # Commands that are given import paths add it again, at the end
    del sys.path[0]

from lightning_dtda.cli import main

if __name__ == "__main__":
    main()
