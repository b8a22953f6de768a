"""The floor of other machines' disks."""
