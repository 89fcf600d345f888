"""Card names: their sources, how they are cleaned and split, and how attributes become a prompt.

The way of a name::

    source (cards, sources) -> clean (cleaning) -> split by family (splits) -> data/mtg/*.jsonl (prepare)
    data/mtg/*.jsonl -> Attributes.prompt() + " " + name (prompts) -> rows without padding (packing)
"""
