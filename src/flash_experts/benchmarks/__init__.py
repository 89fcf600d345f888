"""``flash-experts benchmark``: our implementations and the baselines, in one run on one machine.

One module per topic. Each also runs with only PyTorch and transformers:
``python -m flash_experts.benchmarks.attention --out attention.json``.
"""

TOPICS = {
    "attention": "attention kernels against PyTorch's, transformers' and flash-attn's",
    "moe": "MoE layers against transformers', a dense MLP and installed packages",
    "train": "fine-tuning of GPT-2 small against transformers' Trainer",
    "generate": "names per second against transformers' generate",
}
