"""``python -m lightning_dtda``."""

from lightning_dtda.cli import main

if __name__ == "__main__":
    main()
