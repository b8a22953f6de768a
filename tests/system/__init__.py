"""cidfs as a whole: real processes, real mounts, through the command line."""
