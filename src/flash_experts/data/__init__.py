"""The dataset of card names: sources, cleaning, splits, tokenizer, prompts for conditioning, and sequence packing.

Data flow::

    source (cards, sources) -> clean (cleaning) -> split by family (splits) -> data/mtg/*.jsonl (prepare)
    data/mtg/*.jsonl -> Attributes.prompt() + " " + name (prompts) -> padding-free batches (packing)
"""
