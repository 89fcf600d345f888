"""``flash-experts benchmark``: our implementations and the baselines, in one run on one machine.

One module per topic: `attention`, `moe`, `train`, `generate`. Each also runs with only PyTorch and transformers:
``python -m flash_experts.benchmarks.attention --out attention.json``.
"""
