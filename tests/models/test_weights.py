"""Loading accounts for every tensor of a checkpoint, by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.grouped import on_rank
from vllm_armt.linear.norm import StackedLayerNorm, StackedRMSNorm
from vllm_armt.linear.stacked import StackedLinear
from vllm_armt.linear.weight import Part
from vllm_armt.models.weights import WeightTarget, load_exactly


def load(weights: dict[str, Tensor], names: tuple[str, ...] = ("a", "b")) -> dict[str, Tensor]:
    """Load into targets of shape [2, 3]; a name that starts with "old" may be present without a target."""
    loaded: dict[str, Tensor] = {}
    targets = {name: ((2, 3), lambda tensor, name=name: loaded.update({name: tensor})) for name in names}
    load_exactly(weights.items(), targets, lambda name: name.startswith("old"))
    return loaded


def tensors(*names: str) -> dict[str, Tensor]:
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


def test_every_tensor_goes_to_its_target_in_any_order():
    loaded = load(tensors("b", "a"))
    assert loaded["b"].eq(0).all()
    assert loaded["a"].eq(1).all()


def test_ignored_names_may_be_present():
    assert load(tensors("a", "old.inv_freq", "b")).keys() == {"a", "b"}


def test_unexpected_tensors_are_named():
    with pytest.raises(ValueError, match=r"has tensors that a model of its config.json does not: x, y\."):
        load(tensors("a", "x", "b", "y"))


def test_missing_tensors_are_named():
    with pytest.raises(ValueError, match=r"lacks tensors that its config.json asks for: a, c\.$"):
        load(tensors("b"), names=("a", "b", "c"))


def test_an_unexpected_tensor_is_named_before_a_missing_one_that_it_may_explain():
    with pytest.raises(ValueError, match=r"does not: A\."):
        load(tensors("A", "b"))


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    with pytest.raises(ValueError, match=r"'a' has shape \[3, 2\], but its config.json asks for \[2, 3\]"):
        load({"a": torch.zeros(3, 2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_that_are_no_numbers_are_named(value: float, dtype: torch.dtype):
    weights = {name: tensor.to(dtype) for name, tensor in tensors("a", "b").items()}
    weights["b"][1, 2] = value
    with pytest.raises(ValueError, match=r"weights hold NaN or infinity: b\. The training went astray"):
        load(weights)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_tensor_of_no_dtype_of_weights_is_named(dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"'a' is of {dtype}; weights are torch.bfloat16, "):
        load({"a": torch.zeros(2, 3).to(dtype)})


def test_of_many_names_the_first_eight_are_given_and_the_rest_counted():
    with pytest.raises(ValueError, match=r"x0, x1, x2, x3, x4, x5, x6, x7 and 4 more\."):
        load(tensors("a", "b", *(f"x{i}" for i in range(12))))


@pytest.mark.parametrize(("prefix", "dot"), [("self_attn", "self_attn."), ("", "")])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_a_target_for_each_weight_and_bias_of_its_parts(prefix: str, dot: str, bias: bool):
    with on_rank():
        linear = StackedLinear(2, 3, {"q": Part(4), "k": Part(2)}, bias, torch.float32)
    targets = WeightTarget.of_linear(prefix, linear)
    shapes: dict[str, tuple[int, ...]] = {f"{dot}q.weight": (4, 3), f"{dot}k.weight": (2, 3)}
    if bias:
        shapes |= {f"{dot}q.bias": (4,), f"{dot}k.bias": (2,)}
    assert {name: target.shape for name, target in targets.items()} == shapes
    for i, (name, target) in enumerate(targets.items()):
        target.load(1, torch.full(shapes[name], float(i + 1)))
        parameter = linear.weight if name.endswith("weight") else linear.bias
        assert parameter is not None
        rows = slice(0, 4) if ".q." in f".{name}" else slice(4, 6)
        assert parameter[1, rows].eq(i + 1).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_layer_of_a_checkpoint_is_split_over_the_parts(bias: bool):
    with on_rank():
        linear = StackedLinear(2, 3, {"q": Part(2), "k": Part(2)}, bias, torch.float32)
    targets = WeightTarget.of_fused("qk", linear, lambda tensor: (tensor[::2], tensor[1::2]))
    shapes: dict[str, tuple[int, ...]] = {"qk.weight": (4, 3)} | ({"qk.bias": (4,)} if bias else {})
    assert {name: target.shape for name, target in targets.items()} == shapes
    for name, target in targets.items():
        parameter = linear.weight if name == "qk.weight" else linear.bias
        assert parameter is not None
        given = torch.arange(4.0).view(4, *[1] * (parameter.ndim - 2)).expand(shapes[name])
        target.load(1, given)
        assert torch.equal(parameter[1], given[[0, 2, 1, 3]])
        assert parameter[0].eq(0).all()


def test_a_transposed_target_takes_weights_from_inputs_to_outputs_and_biases_as_they_are():
    with on_rank():
        linear = StackedLinear(2, 3, {"q": Part(2)}, True, torch.float32)
    targets = {name: target.transposed() for name, target in WeightTarget.of_linear("", linear).items()}
    assert {name: target.shape for name, target in targets.items()} == {"q.weight": (3, 2), "q.bias": (2,)}
    weight, bias = torch.randn(3, 2), torch.randn(2)
    targets["q.weight"].load(1, weight)
    targets["q.bias"].load(1, bias)
    assert linear.bias is not None
    assert torch.equal(linear.weight[1], weight.T)
    assert torch.equal(linear.bias[1], bias)


@pytest.mark.parametrize(("kind", "names"), [(StackedRMSNorm, {"weight"}), (StackedLayerNorm, {"weight", "bias"})])
def test_a_norm_has_a_target_for_each_of_its_parameters(kind: type[nn.Module], names: set[str]):
    norm = kind(2, 3, torch.float32, 1e-5)
    targets = WeightTarget.of_norm("norm", norm)
    assert targets.keys() == {f"norm.{name}" for name in names}
    for name in names:
        given = torch.randn(3)
        targets[f"norm.{name}"].load(1, given)
        assert torch.equal(norm.get_parameter(name)[1], given)


def test_a_vector_target_fills_its_layer_alone():
    parameter = nn.Parameter(torch.ones(3, 5), requires_grad=False)
    target = WeightTarget.of_vector(parameter)
    assert target.shape == (5,)
    target.load(1, torch.zeros(5))
    assert parameter.sum(1).tolist() == [5, 0, 5]
