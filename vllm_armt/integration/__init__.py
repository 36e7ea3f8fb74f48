"""All that leans on vLLM's insides: registration, config hooks, scheduler, cache manager, metadata builder, worker."""
