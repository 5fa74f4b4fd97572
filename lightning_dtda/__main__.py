"""``python -m lightning_dtda``."""

import os
import sys

if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
    # Python puts the working directory first, where a file beside the data could replace one of Python's own modules
    sys.path.append(sys.path.pop(0))

from lightning_dtda.cli import main

if __name__ == "__main__":
    main()
