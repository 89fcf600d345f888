"""Fast forms of single operations. Each is held to a plain reference by the tests."""
