"""``flash-experts benchmark``: our figures and the peers', both sides in one run on one machine.

A module for each topic: `attention`, `moe`, `train`, `generate`. Each runs by itself as well, with PyTorch and
transformers alone: ``python -m flash_experts.benchmarks.attention --out attention.json``.
"""
