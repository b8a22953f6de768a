"""The kernel's side: what the file system is (view), and how it gets to the kernel (transports, session)."""
