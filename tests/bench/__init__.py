"""Tests of tools/bench: what it says of figures, what its reader counts, and a run in small."""
