"""What Nix is told: the worker protocol that its daemons and clients speak over a Unix socket.

`wire` has the primitives, `requests` what can be asked and told, `protocol` the side that answers, `client`
the side that asks. The protocol itself does no I/O.
"""
