"""The dataset of card names::

source (cards, sources) -> clean (cleaning) -> split by family (splits) -> data/mtg/*.jsonl (prepare)
data/mtg/*.jsonl -> Attributes.prompt() + " " + name (prompts) -> padding-free batches (packing)
"""
