"""Other machines' disks, and folders that are used like them. Knows nothing of the local store."""
