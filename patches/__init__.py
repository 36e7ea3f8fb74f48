"""What has to be changed in vLLM itself: one file a patch, which says why; `vllm-armt doctor --fix` applies them."""
