"""Ways to carry StoreView to the kernel."""
