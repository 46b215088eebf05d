"""The promise: bad input is an error that names the argument and its value, on every backend and when compiled."""

import re
from functools import partial

import cases
import numpy as np
import oracle
import pytest
import torch

import convnorm
from convnorm.geometry import GeometryError

ops = torch.ops.convnorm
WEIGHT = {"weight": (4, 3, 3, 3), "stride": 1, "padding": 1, "in_shape": [8, 8]}
TRANSPOSED = WEIGHT | {"transposed": True}


def ones(shape, device, **options):
    return torch.ones(shape, device=device, **options)


def sparse(device):
    return torch.ones(4, 3, 3, 3, device=device).to_sparse()


def of_dtype(dtype, device):
    return torch.ones(4, 3, 3, 3, device=device).to(dtype)


# What is wrong: the arguments, of which those that are not the layer's own are bad; then what the message must say.
BAD = {
    "weight_of_1_dimension": ({"weight": (4,)}, "weight", "[4]"),
    "weight_of_0_dimensions": ({"weight": ()}, "weight", "[]"),
    "weight_of_6_dimensions": ({"weight": (1, 1, 2, 2, 2, 2)}, "weight", "[1, 1, 2, 2, 2, 2]"),
    "weight_without_outputs": ({"weight": (0, 3, 3, 3)}, "weight", "[0, 3, 3, 3]"),
    "weight_without_inputs": ({"weight": (4, 0, 3, 3)}, "weight", "[4, 0, 3, 3]"),
    "weight_without_taps": ({"weight": (4, 3, 3, 0)}, "weight", "[4, 3, 3, 0]"),
    "weight_of_integers": ({"weight": partial(of_dtype, torch.int32)}, "weight", "torch.int32"),
    "weight_of_bytes": ({"weight": partial(of_dtype, torch.uint8)}, "weight", "torch.uint8"),
    "weight_of_booleans": ({"weight": partial(of_dtype, torch.bool)}, "weight", "torch.bool"),
    "weight_of_complex_numbers": ({"weight": partial(of_dtype, torch.complex64)}, "weight", "torch.complex64"),
    "weight_of_float8": ({"weight": partial(of_dtype, torch.float8_e4m3fn)}, "weight", "torch.float8_e4m3fn"),
    "weight_sparse": ({"weight": sparse}, "weight", "torch.sparse_coo"),
    "stride_0": ({"stride": [1, 0]}, "stride", "[1, 0]"),
    "stride_negative": ({"stride": -2}, "stride", "[-2]"),
    "stride_for_3_axes": ({"stride": [1, 1, 1]}, "stride", "[1, 1, 1]"),
    "stride_for_none": ({"stride": []}, "stride", "[]"),
    "padding_negative": ({"padding": [1, -1]}, "padding", "[1, -1]"),
    "padding_negative_after": ({"padding": [1, 1, 1, -3]}, "padding", "[1, 1, 1, -3]"),
    "padding_past_all_memory": ({"padding": [1, 1 << 62]}, "padding", f"({1 << 62}, {1 << 62})"),
    "padding_for_3_axes": ({"padding": [1, 1, 1]}, "padding", "[1, 1, 1]"),
    "padding_for_none": ({"padding": []}, "padding", "[]"),
    "in_shape_of_1_axis": ({"in_shape": [8]}, "in_shape", "[8]"),
    "in_shape_with_channels": ({"in_shape": [3, 8, 8]}, "in_shape", "[3, 8, 8]"),
    "in_shape_0": ({"in_shape": [8, 0]}, "in_shape", "[8, 0]"),
    "in_shape_negative": ({"in_shape": [-8, 8]}, "in_shape", "[-8, 8]"),
    "in_shape_below_kernel": ({"padding": 0, "in_shape": [8, 2]}, "in_shape", "[8, 2]"),
    "in_shape_below_padded_kernel": ({"weight": (1, 1, 5, 5), "in_shape": [2, 8]}, "in_shape", "[2, 8]"),
    "in_shape_below_dilated_kernel": ({"dilation": 4, "in_shape": [6, 8]}, "in_shape", "[6, 8]"),
    "in_shape_for_linear": ({"weight": (4, 3), "stride": [], "padding": []}, "in_shape", "[8, 8]"),
    "stride_for_linear": ({"weight": (4, 3), "stride": [1, 1], "padding": [], "in_shape": []}, "stride", "[1, 1]"),
    "dilation_0": ({"dilation": [0, 1]}, "dilation", "[0, 1]"),
    "dilation_for_3_axes": ({"dilation": [1, 2, 1]}, "dilation", "[1, 2, 1]"),
    "dilation_for_none": ({"dilation": []}, "dilation", "[]"),
    "groups_0": ({"groups": 0}, "groups", "0"),
    "groups_negative": ({"groups": -2}, "groups", "-2"),
    "groups_that_do_not_divide": ({"groups": 3}, "groups", "3"),
    "groups_of_linear": ({"weight": (4, 4), "stride": [], "padding": [], "in_shape": [], "groups": 2}, "groups", "2"),
    "padding_mode_unknown": ({"padding_mode": "constant"}, "padding_mode", "'constant'"),
    "padding_mode_empty": ({"padding_mode": ""}, "padding_mode", "''"),
    "reflect_of_input": ({"padding": 8, "padding_mode": "reflect"}, "padding", "[8]"),
    "reflect_of_input_after": ({"padding": [0, 8, 0, 0], "padding_mode": "reflect"}, "padding", "[0, 8, 0, 0]"),
    "reflect_of_one": ({"padding": 1, "in_shape": [8, 1], "padding_mode": "reflect"}, "padding", "[1]"),
    "circular_past_input": ({"padding": [9, 0], "padding_mode": "circular"}, "padding", "[9, 0]"),
    "output_padding_of_a_convolution": ({"output_padding": [0, 1]}, "output_padding", "1"),
    "output_padding_of_stride": (TRANSPOSED | {"stride": 2, "output_padding": 2}, "output_padding", "2"),
    "output_padding_of_dilation": (TRANSPOSED | {"dilation": 3, "output_padding": [3, 0]}, "output_padding", "3"),
    "output_padding_negative": (TRANSPOSED | {"stride": 2, "output_padding": -1}, "output_padding", "[-1]"),
    "output_padding_for_3_axes": (TRANSPOSED | {"output_padding": [0, 0, 0]}, "output_padding", "[0, 0, 0]"),
    "transposed_with_no_output": (TRANSPOSED | {"padding": 3, "in_shape": [4, 2]}, "in_shape", "[4, 2]"),
    "transposed_circular": (TRANSPOSED | {"padding_mode": "circular"}, "padding_mode", "'circular'"),
}

LAYERS = {"stride": [[1], [1]], "padding": [[1], [1]], "in_shape": [[8, 8], [8, 8]]}
BAD_MANY = {
    "no_weights": (0, {"stride": [], "padding": [], "in_shape": []}, "weights", "[]"),
    "no_weights_but_layers": (0, {}, "weights", "[]"),
    "too_few_strides": (2, {"stride": [[1]]}, "stride", "1"),
    "too_many_paddings": (2, {"padding": [[1]] * 3}, "padding", "3"),
    "too_few_in_shapes": (2, {"in_shape": [[8, 8]]}, "in_shape", "1"),
    "too_few_dilations": (2, {"dilation": [[1]]}, "dilation", "1"),
    "no_groups": (2, {"groups": []}, "groups", "0"),
    "too_many_padding_modes": (2, {"padding_mode": ["zeros"] * 3}, "padding_mode", "3"),
    "too_few_transposed": (2, {"transposed": [False]}, "transposed", "1"),
    "too_few_output_paddings": (2, {"output_padding": [[0]]}, "output_padding", "1"),
    "bad_layer": (2, {"stride": [[1], [0]]}, "stride", "[0]"),
    "bad_option": (2, {"groups": [1, 5]}, "groups", "5"),
}


def bad_call(name, device):
    """(weight, arguments) of a row of the table."""
    layer = WEIGHT | BAD[name][0]
    weight = layer.pop("weight")
    weight = weight(device) if callable(weight) else ones(weight, device)
    return weight, [layer.pop(key) for key in ("stride", "padding", "in_shape")], layer


def says(message, argument, value):
    return re.search(rf"convnorm: {argument}\b.*{re.escape(value)}", message)


@pytest.mark.parametrize("op", ["l1", "linf", "norms"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_value(device, name, op):
    weight, args, options = bad_call(name, device)
    with pytest.raises(GeometryError) as error:
        getattr(ops, op)(weight, *args, **options)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, RuntimeError)
    assert says(str(error.value), *BAD[name][1:]), str(error.value)


@pytest.mark.parametrize("name", BAD)
def test_norms_many_refuses_what_norms_refuses(device, name):
    weight, args, options = bad_call(name, device)
    lists = [[value if isinstance(value, list) else [value]] for value in args]
    listed = ("dilation", "output_padding")
    many = {k: [[v] if k in listed and not isinstance(v, list) else v] for k, v in options.items()}
    with pytest.raises(GeometryError) as error:
        ops.norms_many([weight], *lists, **many)
    assert says(str(error.value), *BAD[name][1:]), str(error.value)


@pytest.mark.parametrize("name", BAD_MANY)
def test_norms_many_refuses_lists_that_do_not_fit(device, name):
    count, changed, argument, value = BAD_MANY[name]
    layers = LAYERS | changed
    args = [layers.pop(key) for key in ("stride", "padding", "in_shape")]
    with pytest.raises(GeometryError) as error:
        ops.norms_many([ones((4, 3, 3, 3), device) for _ in range(count)], *args, **layers)
    assert says(str(error.value), argument, value), str(error.value)


def test_messages_are_the_same_whatever_the_backend(device):
    """And where the weight has no values, or wants a gradient."""
    for name in set(BAD) - {"weight_sparse"}:
        weight, args, options = bad_call(name, device)
        with convnorm.use_backend("reference"), pytest.raises(GeometryError) as of_reference:
            ops.norms(weight, *args, **options)
        for one in (weight, weight.to("meta"), weight.requires_grad_() if weight.is_floating_point() else weight):
            with pytest.raises(GeometryError) as error:
                ops.norms(one, *args, **options)
            assert str(error.value) == str(of_reference.value)


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("weight_sparse", "weight_of_float8")])
def test_compiled_code_says_the_same(name):
    weight, args, options = bad_call(name, "cpu")
    with pytest.raises(GeometryError) as plain:
        ops.norms(weight, *args, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda weight: ops.norms(weight, *args, **options), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="convnorm") as error:
        compiled(weight)
    assert str(plain.value).replace("'", "") in str(error.value).replace("\\'", "").replace("'", "")


def test_functional_transforms_refuse_as_well(device):
    weight = ones((4, 3, 3, 3), device)
    for transform in (torch.func.grad, torch.vmap, torch.func.jacrev):
        with pytest.raises(GeometryError, match=r"convnorm: stride \[0\]"):
            transform(lambda w: ops.l1(w, 0, 1, [8] * (w.dim() - 2)))(weight)


@pytest.mark.usefixtures("at_full_speed")
def test_refused_is_exactly_what_pytorch_refuses(seed, device):
    """Neither stricter nor laxer: layers drawn with no thought of what is allowed."""
    both = [0, 0]
    for number in range(1500):
        rng = np.random.default_rng((seed, number, 10))
        case = cases.careless_case(rng)
        weight = torch.from_numpy(rng.standard_normal(case.weight_shape))
        in_pytorch = is_allowed(oracle.matrix, weight, case)
        both[in_pytorch] += 1
        assert is_allowed(ops.norms, weight.to(device), case) == in_pytorch, f"In PyTorch: {in_pytorch}. {case}"
    assert min(both) > 100


def is_allowed(function, weight, case):
    try:
        function(weight, *case.args, **case.options)
    except (RuntimeError, ValueError):
        return False
    return True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_weights_on_two_devices_are_refused():
    weights = [ones((4, 3, 3, 3), device) for device in ("cpu", "cuda")]
    with pytest.raises(GeometryError, match=r"cpu and cuda:0"):
        ops.norms_many(weights, *LAYERS.values())


def test_weights_with_and_without_values_are_refused(device):
    weights = [ones((4, 3, 3, 3), where) for where in (device, "meta")]
    with pytest.raises(GeometryError, match=r"weights on .* and meta"):
        ops.norms_many(weights, *LAYERS.values())


# (weight, plan) that do not fit: groups, transposed, axes; of each axis taps, merged taps, input and output windows
BAD_PLANS = {
    "no_plan": ((4, 3, 3), ""),
    "ends_early": ((4, 3, 3), "1 0 1 3 0 0"),
    "empty_rows": ((0, 3, 3), "1 0 1 3 0 0 0"),
    "empty_columns": ((4, 0, 3), "1 0 1 3 0 0 0"),
    "empty_taps": ((4, 3, 0), "1 0 1 0 0 0 0"),
    "no_groups": ((4, 3, 3), "0 0 1 3 0 0 0"),
    "window_past_the_taps": ((4, 3, 3), "1 0 1 3 0 1 1 3 0"),
    "merged_of_nothing": ((4, 3, 3), "1 0 1 3 2 0 1 0 0 0"),
    "taps_past_all_memory": ((4, 3, 3), "1 0 1 1099511627776 0 0 0"),
    "no_number": ((4, 3, 3), "1 0 1 three 0 0 0"),
}


@pytest.mark.skipif(convnorm.backends()["cpu"]["native"] not in ("serves", "available"), reason="of the C++ kernels")
@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_does_not_fit_is_refused_by_the_kernels(name):
    shape, plan = BAD_PLANS[name]
    with pytest.raises(RuntimeError, match="convnorm"):
        ops.measure_native([torch.ones(shape)], plan)


@pytest.mark.skipif(convnorm.backends()["cpu"]["native"] not in ("serves", "available"), reason="of the C++ kernels")
def test_a_tap_that_is_listed_twice_leaves_no_table():
    """As two merged taps of one tap each: it stands twice."""
    l1, linf, _ = ops.measure_native([torch.ones(4, 3, 2)], "1 0 1 2 3 1 0 1 0 1 1 0 0")
    assert (l1.item(), linf.item()) == (12, 9)
