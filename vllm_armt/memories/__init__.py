"""Memories that last: a text is read once, kept on disk, and asked at any time, from any server.

**Turned on** by `--additional-config '{"armt": {"memories": "DIR"}}'`; "DIR,prefix" keeps the last memories of ordinary
prompts, too; `memories_max_bytes` bounds the folder. Without it a request that names a memory is refused.

**A request** says in `SamplingParams.extra_args` (HTTP: `vllm_xargs`) what it wants (`args`):

    {"memory": "war-and-peace"}                                   # or "mem_..."; the prompt is the question alone
    {"save_memory": "talk"}                                       # the prompt and its answer become a memory
    {"memory": "talk", "save_memory": {}}                         # an append: the name moves to the new memory
    {"save_memory": {"name": "book", "after": "prompt"}}          # what was read, without what is generated
    {"save_memory": '{"name": "talk", "metadata": {"k": "v"}}'}   # JSON, as vllm_xargs take no objects
    {"memory": "talk", "memory_skip": 21}                         # 21 first tokens of the prompt stand for the memory

Whose memories it sees is decided by its `cache_salt`.

**The response** says in `kv_transfer_params["memory"]` of the last output what came of it:

    {"used": {"id", "name", "tokens", "segments"},
     "saved": {"id", "name", "parent", "tokens", "segments", "bytes"}}        # or {"error": sentence, "status": HTTP's}

The last output waits for its memory: who has the answer has the memory. What can't be done ends with finish reason
"error", the sentence as `stop_reason`, and `{"error", "status"}` in its place. Tokens that stand for a memory count
neither as prompt tokens nor as cached ones.

**In other processes**, for HTTP and CLI: `identity.open_store(vllm_config)` is the `store.Store` of a server with that
configuration; `reading` reads a text of any length into a memory, through LLM() or a running server's engine client.

| file | |
|---|---|
| `store`, `catalog`, `builds`, `manifest`, `errors` | memories on disk |
| `pages`, `tensorfile`, `files`, `archive`, `upkeep` | the files that they are |
| `identity` | whose memories they are: the fingerprint of a model |
| `args` | what a request asks for |
| `admission`, `session`, `opening`, `fetching`, `saving`, `prefix_tier`, `usage` | the scheduler's half |
| `page_io`, `page_tensors` | a worker's half |
| `transfers` | what the halves tell each other |
| `metrics` | what is counted |
| `connector` | vLLM's hooks, handed to the halves; `integration/memory_scheduler.py` has what they don't reach |
| `reading` | texts of any length, in pieces |
| `http` | routes, model names, chats and the page of a server |
"""
