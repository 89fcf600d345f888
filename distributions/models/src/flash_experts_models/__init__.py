"""The released models of flash-experts, one folder each: ``importlib.resources.files("flash_experts_models")``."""
