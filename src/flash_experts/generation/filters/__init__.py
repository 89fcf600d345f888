"""Token filters: which tokens may come next in a name. `base` defines a filter; the other modules are by topic."""
