"""Adapters to the kernel: registry, rules, namespaces, modules, and what can be read about them."""
