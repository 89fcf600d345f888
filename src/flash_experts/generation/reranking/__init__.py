"""Reranking: more names are drawn than are shown, and the best are chosen."""
