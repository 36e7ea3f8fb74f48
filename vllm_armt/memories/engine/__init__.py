"""Memories in an engine: a KV connector of vLLM's, the scheduler's half of it and a worker's."""
