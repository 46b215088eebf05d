"""The promise: norm decay of compiled models, and norm decay compiled, is norm decay: the same bits, compiled once."""

import sys

import pytest
import torch
from test_loops import SHAPE, SIZES, STEPS, ByHand, assert_same, decayed, loss, network, sgd, steps_of, train
from torch._dynamo.testing import CompileCounterWithBackend

import convnorm

BIT_FOR_BIT = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("error:convnorm")  # norm decay leaves nothing out that a test does not name


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("example", [SHAPE, None])
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_of_a_compiled_model_have_the_names_of_the_model(in_place, example):
    expected, model = network(), network()
    train(expected, ByHand(expected))
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    decay = decayed(compiled, example)
    train(compiled, decay)
    assert_same(model, expected)
    assert list(decay.norms) == list(SIZES)


def test_a_model_that_was_compiled_and_run_before_is_not_observed():
    """Its code has no place for hooks any more."""
    model = torch.compile(network(), backend="eager")
    loss(model, 0)
    decay = decayed(model, None)
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="or give example"):
        decay.step()


def beta_at(step):
    return 0.3 / (1 + step)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_compiled_step_is_one_graph_compiled_once(variant, backend):
    """Also the first one. To set beta compiles nothing anew."""
    counter = CompileCounterWithBackend(backend)
    models, decays = (network(), network()), []
    for model in models:
        optimizer = sgd(model)
        decay = decayed(model, variant=variant)
        take = decay.step if model is models[0] else torch.compile(decay.step, fullgraph=True, backend=counter)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, step).backward()
            decay.beta = beta_at(step)
            take()
            optimizer.step()
        decays.append(decay)
    assert counter.frame_count == 1
    assert_same(*models, **BIT_FOR_BIT)
    assert steps_of(decays[0]) == steps_of(decays[1]) == STEPS
    torch.testing.assert_close(decays[0].norms, decays[1].norms, **BIT_FOR_BIT)


def test_a_step_compiles_where_no_backend_has_served_yet(monkeypatch):
    monkeypatch.setattr(sys.modules["convnorm.backends"], "_serving", {})
    models = network(), network()
    for model in models:
        decay = decayed(model)
        loss(model, 0).backward()
        (decay.step if model is models[0] else torch.compile(decay.step, fullgraph=True, backend="aot_eager"))()
    for parameter, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **BIT_FOR_BIT)


@pytest.mark.parametrize("how", ["stepped", "attached", "scheduled"])
def test_a_compiled_training_step_does_not_compile_at_every_step(how):
    """With graph breaks, where the first step allocates. A schedule is compiled for each beta that it gives, until
    PyTorch gives up and runs it as it stands: to set beta outside is better.
    """
    models, counts = (network(), network()), []
    counter = CompileCounterWithBackend("aot_eager")
    for model in models:
        optimizer = sgd(model)
        decay = convnorm.NormDecay(model, SHAPE, beta=beta_at if how == "scheduled" else 1.0)
        if how == "attached":
            decay.attach(optimizer)

        def step_of_training(x, model=model, optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if how != "attached":
                decay.step()
            optimizer.step()

        run = step_of_training if model is models[0] else torch.compile(step_of_training, backend=counter)
        for step in range(STEPS):
            if how != "scheduled":
                decay.beta = beta_at(step)
            run(torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)))
            counts.append(counter.frame_count)
    assert_same(*models)
    assert steps_of(decay) == STEPS
    assert decay.beta == beta_at(STEPS - 1)
    assert counts[-1] > 0
    if how != "scheduled":
        assert counts[-1] == counts[-2] == counts[-3]
