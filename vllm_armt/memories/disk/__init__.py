"""Memories on disk: manifests, names, pages, budgets. Imports nothing of vLLM."""
