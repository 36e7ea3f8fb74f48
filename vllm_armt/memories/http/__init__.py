"""Memories over HTTP: a plugin of vLLM's API server; see docs/memories.md for what clients see.

| file | |
|---|---|
| `plugin` | what vLLM loads: attaches the routes, and hooks into its handlers where memories are kept |
| `routes` | the routes, those of vLLM's included that may name a memory |
| `schemas`, `uploads`, `texts` | what is sent and shown; bodies, bounded; texts as ids, in pieces |
| `service` | what runs behind the routes: builds, upkeep |
| `names` | memories as models |
| `renderer`, `chat` | what of a prompt comes behind a memory |
| `answers`, `metrics` | what responses and streams, and Prometheus, say of memories |
| `page.html` | the page `/memories` |

What is borrowed of vLLM beyond its endpoint plugins: its handlers share `state.online_renderer`, whose class becomes
`MemoryRenderer` (`preprocess_chat` and `preprocess_cmpl` are what they call before a request reaches the engine), and
`engine_client`, whose `generate` is wrapped; handlers have `enable_prompt_tokens_details`.
"""
