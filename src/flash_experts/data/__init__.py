"""Card names: where they come from, how they are cleaned and split, and how a card's attributes become a prompt.

The way of a name::

    source  ->  clean  ->  split by family  ->  data/mtg/*.jsonl  ->  Attributes.prompt() + " " + name  ->  packed rows
    (cards)   (cleaning)      (splits)            (prepare)              (prompts)                        (packing)
"""
