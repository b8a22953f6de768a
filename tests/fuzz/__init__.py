"""Hostile bytes, a minute long: every decoder, mutated samples, and what was once found that way."""
