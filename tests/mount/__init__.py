"""The kernel's side, without a kernel: the view of a store, its counters, the control socket's client."""
