"""vLLM plugin that serves associative recurrent memory transformers."""

__version__ = "0.1.0"


def register() -> None:
    """Tell transformers and vLLM about the models; the entry point of `vllm.general_plugins`.

    vLLM calls it in every process that it starts. It imports nothing heavy and may run twice.

    Raises:
        RuntimeError: the installed vLLM is outside the supported range.
    """
    from vllm_armt.integration.plugin import register as register_plugin

    register_plugin()
