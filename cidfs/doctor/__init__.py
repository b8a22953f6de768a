"""What `cidfs doctor` looks at, and what it makes of it. Changes nothing.

Each look is a small function that yields findings. It may meet a file system that does not answer, or an
index that ends the process: so all of them run in children with deadlines (`bounded`), and nothing here
waits for long.
"""
