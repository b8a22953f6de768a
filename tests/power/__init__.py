"""Kills and power loss at the level of system calls: a recorder, a replayer, what must hold after each."""
