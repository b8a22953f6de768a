"""tools/bench: cidfs beside what people use today, on the same data, in one run."""
