"""The commands of ``flash-experts``, a module each: ``run`` does it, ``make_parser`` reads its options."""
