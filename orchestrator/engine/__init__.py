"""What runs inside a helper process: the packet loop and what it needs. The standard library alone."""
