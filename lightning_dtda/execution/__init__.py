"""Where work runs: this process, several of this machine, a Ray cluster; memory, devices, progress."""
