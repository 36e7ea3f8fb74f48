"""Checkpoints: the authors' formats of every system in, one transformers directory out; fresh ones from a base."""

from vllm_armt.checkpoints.convert import Conversion, convert
from vllm_armt.checkpoints.fresh import init_from_base
from vllm_armt.checkpoints.wrapper_args import WrapperArgs

__all__ = ["Conversion", "WrapperArgs", "convert", "init_from_base"]
