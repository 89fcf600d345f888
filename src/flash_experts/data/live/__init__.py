"""Live sources: downloads, caches and reads the newest cards from Scryfall and MTGJSON. Start at `sites`."""
