"""Norm decay (Liang & Huang, Algorithm 1): weight decay's place in a training loop, for the true norms of layers.

    p_l = a subgradient of the l1 or linf norm of layer l, at the current weight
    h_l = γ h_l + (1 - γ) p_l
    g_l = g_l + (β / N) h_l          between loss.backward() and optimizer.step(); l one of N layers

``momentum.py`` says how h is kept, ``released.py`` what the authors' release does instead.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import library
from .batch import Batch, plan_of, weight_of
from .layers import as_layer, current_weight
from .released import takes_part
from .sharded import Place, is_dtensor, kind_of, place_of, refuse_sharded, reshard
from .uses import Held, Use, Watch, inputs_of, labels_of, named_layers, naming, observe, unwrapped

Beta = float | Mapping[str, float] | Callable[[int], float | Mapping[str, float]]
MOST_MOMENTUM = 0.99  # which takes 1,656 terms of every layer: 24 do for 0.5, 158 for 0.9


class NormDecay:
    """Adds (β / N) h to the gradients of a model's convolutional and fully connected layers.

    >>> import torch, convnorm
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=1e-3)
    >>> model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    >>> decay.step()  # after backward(); or once, instead: decay.attach(optimizer)
    >>> optimizer.step()
    >>> list(decay.norms)
    ['0', '3']

    ``example`` tells the input sizes of the layers: an input of the model or its shape (or a tuple of them, for several
    inputs), which runs on fake tensors; or the sizes themselves, ``{"features.0": (32, 32), "classifier": ()}``; or
    None: they are seen in the forward passes before the first step. ``ord`` is 1 or ``math.inf``.

    ``beta`` is a number, or a number for each layer by pattern of its name, of which the first that matches counts
    (``{"features.*": 1e-3, "*": 0}``), or a function of the number of steps that returns either. Set it at any time.
    ``include`` and ``exclude`` are patterns of names. N counts the layers that are left.

    - A layer used at several input sizes is as many linear maps: each counts. So do layers that share a weight.
    - A layer without a gradient (frozen, or not used in this step) gets nothing, its average goes on.
    - A module of a derived class counts with the weight that it holds, whatever its ``forward`` makes of that.
    - A weight that a parametrization computes has no gradient to add to: ``penalty()`` takes it, ``step()`` refuses it.
    - In distributed training every rank steps, with the same layers and sizes. Replicated (DDP) they all compute the
      same; what ``fully_shard`` cut up is not gathered (``sharded.py`` says how), and each rank saves its own state.
    - ``variant="released"`` does what the authors' released code does.
    - After each step on a CPU an infinite or NaN norm is an error that names its layer. On a GPU to look would be to
      wait: there ``check()`` looks.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | Sequence[Any] | Mapping[str, Sequence[int]] | None = None,
        *,
        ord: float = 1,
        beta: Beta,
        momentum: float = 0.5,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        variant: str = "paper",
    ) -> None:
        if ord not in (1, math.inf):
            raise ValueError(f"convnorm: ord {ord!r} must be 1 or inf")
        if not 0 <= momentum <= MOST_MOMENTUM:
            raise ValueError(f"convnorm: momentum {momentum!r} must be at least 0 and at most {MOST_MOMENTUM}")
        if variant not in ("paper", "released"):
            raise ValueError(f"convnorm: variant {variant!r} must be 'paper' or 'released'")
        self.ord, self.momentum, self.variant = ord, momentum, variant
        self._include, self._exclude = _patterns(include), _patterns(exclude)
        self._model = unwrapped(model)
        self.uses: list[Use] = []
        self._batches: list[Batch] = []  # made at the first step
        self._pending: Mapping[str, Any] | None = None  # a state that was loaded before the layers were known
        self._has_norms = False
        self._steps = 0  # what the schedule of beta has seen
        self.beta = beta
        self._watch = Watch(self._model) if example is None else None
        if example is not None:
            self._settle(_find(self._model, example))
            self._begin()

    # --- in the loop -------------------------------------------------------------------------------------------------

    def step(self, scale: float | Tensor = 1, maximized: Collection[Tensor] = ()) -> None:
        """Add to the gradients. ``scale`` is what the loss was multiplied by, if the gradients still are.

        Where an optimizer goes up the gradients of weights, those are ``maximized``: there the norms are subtracted, so
        that they fall.
        """
        for batch, rates in self.begin_step(scale, maximized):
            batch.step(rates)
        self.end_step()

    def begin_step(self, scale: float | Tensor, maximized: Collection[Tensor]) -> list[tuple[Batch, Tensor]]:
        """The batches, with the rates of a step of theirs, for whoever takes it."""
        batches = self.batches()
        if not torch.compiler.is_compiling():
            self._held.warn_of_gone("NormDecay")
        if self._schedule is not None:
            self._set_beta(self._schedule(self._steps))
            self._steps += 1
        return [(batch, batch.scaled_rates(scale, maximized)) for batch in batches]

    def end_step(self) -> None:
        self._has_norms = True
        if not torch.compiler.is_compiling() and not all(b.is_finite() for b in self._batches if b.norms.is_cpu):
            self.check()

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Step before every ``optimizer.step()`` from now on, until the returned handle is removed.

        After gradient clipping, then, and after ``GradScaler`` has unscaled (a fused optimizer's gradients are still
        scaled: that is seen to). Norms fall also where the optimizer has ``maximize=True``.
        """
        self.warn_of_missing(optimizer)

        def before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._watch is not None:
                self._know_layers()
                self.warn_of_missing(optimizer)
            if any(given is not None for given in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
                raise RuntimeError(
                    "convnorm: optimizer.step(closure) computes gradients itself: call step() in closure"
                )
            self.step(scale_of(optimizer), maximized=maximized_by(optimizer))

        return optimizer.register_step_pre_hook(before_step)

    def penalty(self) -> Tensor:
        """(β / N) times the sum of the norms, to be added to a loss: differentiable, without momentum.

        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, -3.0)
        >>> NormDecay(model, [1, 2], beta=0.5, ord=math.inf).penalty().item()
        3.0
        """
        if self._schedule is not None:
            raise RuntimeError(
                "convnorm: penalty() counts no steps for a schedule of beta: set beta in the loop instead"
            )
        self._know_layers()
        if not torch.compiler.is_compiling():
            self._held.warn_of_gone("NormDecay")
        weights = [current_weight(use.module) for use in self.uses]
        devices: dict[torch.device, list[int]] = {}
        for i, (use, weight) in enumerate(zip(self.uses, weights, strict=True)):
            if is_dtensor(weight):
                raise RuntimeError(
                    f"convnorm: the weight of layer {use.name!r} is sharded: penalty() would gather it, use step()"
                )
            devices.setdefault(weight.device, []).append(i)
        rates, terms = self._rates(self._beta), []
        for members in devices.values():
            plan = "".join(plan_of(self.uses[i]).text for i in members)
            norms = library.norms_of([weights[i] for i in members], plan, self.ord == math.inf)
            # each rate goes with its kernel: a tensor of them would be waited for, and no CUDA graph could capture it
            terms.append(sum(rates[i] * norm for i, norm in zip(members, norms.unbind(), strict=True)))
        return sum(term.to(terms[0].device) for term in terms)

    @property
    def norms(self) -> dict[str, Tensor]:
        """The norms at the last step, by layer, on its device: nothing is read again, nothing waits."""
        batches = self._batches if self._has_norms else []
        values = {i: norm for batch in batches for i, norm in zip(batch.members, batch.norms.clone(), strict=True)}
        return {label: values[i] for i, label in enumerate(self._labels()) if values}

    def check(self) -> None:
        """Raise an error that names the layers whose norm, at the last step, was infinite or NaN."""
        if all(bool(batch.norms.isfinite().all()) for batch in self._batches):
            return
        bad = ", ".join(f"{label!r} ({value.item()})" for label, value in self.norms.items() if not value.isfinite())
        raise RuntimeError(f"convnorm: the norm of layer {bad} is not finite: neither is its weight")

    @property
    def beta(self) -> float | Mapping[str, float]:
        """As it is now. It may be set, also to a schedule: a function of the number of the step. Numbers by pattern are
        set together: to change one of them here would not reach the step.
        """
        return MappingProxyType(self._beta) if isinstance(self._beta, Mapping) else self._beta

    @beta.setter
    def beta(self, beta: Beta) -> None:
        self._set_beta(beta(self._steps) if callable(beta) else beta)
        self._schedule = beta if callable(beta) else None

    # --- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to be, bit for bit, the uninterrupted one."""
        if self._pending is not None:
            return dict(self._pending)
        places = self._places()
        return {
            "ord": self.ord,
            "momentum": self.momentum,
            "variant": self.variant,
            "beta": (  # numbers of Python: torch.load does not take numpy's
                {name: float(b) for name, b in self._beta.items()}
                if isinstance(self._beta, Mapping)
                else float(self._beta)
            ),
            "steps": int(self._batches[0].clock) if self._batches else 0,
            "scheduled": self._steps,
            "rows": {label: batch.rows(j) for label, (batch, j) in places.items()},  # each rank saves its own
            "layers": {
                label: {name: t.clone() for name, t in batch.remembered(j).items()}
                for label, (batch, j) in places.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict()`` of the same options and layers. A schedule of beta is not in it, and stays."""
        for name in ("ord", "momentum", "variant"):
            if state[name] != getattr(self, name):
                raise ValueError(f"convnorm: {name} {getattr(self, name)!r} is {state[name]!r} in the state")
        if not self.uses:
            self._pending = dict(state)
            if self._schedule is None:
                self.beta = state["beta"]
            return
        layers, labels = state["layers"], self._labels()
        if layers:
            self.batches()
        else:
            self._begin()
        for label in [*labels, *layers] if layers else []:
            if label not in layers or label not in labels:
                where = "the state" if label in labels else "this model"
                raise ValueError(f"convnorm: layer {label!r} is not in {where}: the state is that of another model")
        places, saved = self._places() if layers else {}, state.get("rows", {})
        if misfits := [label for label, (batch, j) in places.items() if not batch.fits(j, layers[label])]:
            raise ValueError(f"convnorm: the state does not fit layer {', '.join(map(repr, misfits))}")
        for label, (batch, j) in places.items():
            rows = batch.rows(j)
            if list(saved.get(label, rows)) != rows:
                raise ValueError(
                    "convnorm: the state is of rows {} to {} of {} of layer {!r}, here are rows {} to {} of {}: each "
                    "rank loads what it saved itself, on as many ranks".format(*saved[label], label, *rows)
                )
        self._restore(layers, state["steps"])
        self._steps = state.get("scheduled", state["steps"])  # a schedule may have been set on the way
        self._has_norms = state["steps"] > 0
        if self._schedule is None:
            self.beta = state["beta"]

    def _begin(self) -> None:
        """Make the state before the first step, which torch.compile wants to find. It has to wait where weights have no
        values yet, and is not for those that are computed from others: penalty() takes them.
        """
        self._batches = []
        weights = [use.module._parameters.get("weight") for use in self.uses]
        if all(weight is not None and not weight.is_meta for weight in weights):
            self.batches()

    def _places(self) -> dict[str, tuple[Batch, int]]:
        """Where each layer is: in which batch, and its number there."""
        found = {i: (batch, j) for batch in self._batches for j, i in enumerate(batch.members)}
        return {label: found[i] for i, label in enumerate(self._labels()) if found}

    def _restore(self, layers: Mapping[str, Mapping[str, Tensor]], steps: int) -> list[str]:
        """Take over what fits. Returns the layers that it was of."""
        for batch in self._batches:
            batch.clock.fill_(steps)
        restored = []
        for label, (batch, j) in self._places().items():
            if label in layers and batch.fits(j, layers[label]):
                for name, tensor in batch.remembered(j).items():
                    tensor.copy_(layers[label][name])
                restored.append(label)
        return restored

    # --- the layers --------------------------------------------------------------------------------------------------

    def _know_layers(self) -> None:
        if self._watch is None:
            return
        uses = self._watch.close()
        if not uses:
            raise RuntimeError("convnorm: no layer has run yet: run the model before the first step, or give example")
        self._watch = None
        self._settle(uses)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict({**pending, "beta": self._beta})  # which may have been set since

    def _settle(self, uses: list[Use]) -> None:
        names = list(named_layers(self._model))
        wanted = {name for name in names if self._wants(name)}
        left_out = wanted - {use.name for use in uses}
        uses = [use for use in uses if use.name in wanted]
        if self.variant == "released":
            left_out |= {use.name for use in uses if not takes_part(use)}
            uses = [use for use in uses if takes_part(use)]
        if left_out:
            why = (
                "did not run on the example"
                if self.variant == "paper"
                else "did not run, or the released code skips it"
            )
            names_left_out = ", ".join(repr(name) for name in names if name in left_out)
            _warn(f"layer {names_left_out} {why}: left out of norm decay (name it in exclude= to say that it is meant)")
        if not uses:
            raise ValueError(f"convnorm: include {self._include} and exclude {self._exclude} leave no layer of {names}")
        for use in uses:
            plan_of(use)
        self.uses, self._held = uses, Held(self._model, uses)
        self._rates(self._beta)

    def _wants(self, name: str) -> bool:
        return _matches(name, self._include) and not _matches(name, self._exclude)

    def _labels(self) -> list[str]:
        return labels_of(self.uses, lambda use: f" {list(use.in_shape)}", lambda use: f" -> {list(use.out_shape)}")

    def _rates(self, beta: float | Mapping[str, float]) -> list[float]:
        betas = [_beta_of(use.name, beta) for use in self.uses]
        return betas if self.variant == "released" else [beta / len(betas) for beta in betas]

    def _set_beta(self, beta: float | Mapping[str, float]) -> None:
        rates = self._rates(beta)
        self._beta = dict(beta) if isinstance(beta, Mapping) else beta  # what is refused changes nothing
        for batch in self._batches:
            new = torch.tensor([rates[i] for i in batch.members], dtype=torch.float64, device="cpu")
            batch.rates.copy_(new, non_blocking=True)  # pageable memory is read before this returns

    def batches(self) -> list[Batch]:
        """The batches, of the weights that the layers have now."""
        self._know_layers()
        if not self._batches:
            reshard(self._model)
            self._bind()
        elif not self._are_current():
            reshard(self._model)
            if not self._are_current():
                self._follow()
        return self._batches

    def _are_current(self) -> bool:
        return all(batch.is_current() for batch in self._batches)

    def _bind(self) -> None:
        """Put layers that can be measured together into one batch: those in one place, every weight once."""
        groups: dict[tuple[Place, int], list[int]] = {}
        times: dict[int, int] = {}
        for i, use in enumerate(self.uses):
            weight = weight_of(use)
            times[id(weight)] = times.get(id(weight), 0) + 1
            groups.setdefault((place_of(use), times[id(weight)]), []).append(i)
        self._batches = [
            kind_of(place, self.variant)([self.uses[i] for i in members], members, self.ord == math.inf, self.momentum)
            for (place, _), members in groups.items()
        ]
        self._set_beta(self._beta)

    def _follow(self) -> None:
        """Weights were replaced, moved or sharded: follow them, with what is remembered of the old ones."""
        labels, steps = self._labels(), int(self._batches[0].clock)
        replaced = [labels[batch.members[j]] for batch in self._batches for j in batch.replaced()]
        before = self._places()
        self._bind()
        counts = {label: batch.counts[j] for label, (batch, j) in self._places().items()}
        kept = {label: old.remembered(j) for label, (old, j) in before.items() if old.counts[j] == counts[label]}
        restored = self._restore(kept, steps)
        anew = [label for label in labels if label not in restored]
        if steps and (replaced or anew):
            lost = f"; the average of {', '.join(map(repr, anew))} starts anew" if anew else ""
            what = f"{', '.join(map(repr, replaced or anew))} was {'replaced' if replaced else 'cast'}"
            _warn(f"the weight of layer {what}: norm decay follows it{lost}")

    def warn_of_missing(self, optimizer: torch.optim.Optimizer) -> None:
        """Of layers whose weights this optimizer does not hold."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {use.name: use.module._parameters.get("weight") for use in self.uses}
        missing = [repr(name) for name, w in weights.items() if w is not None and w.requires_grad and id(w) not in held]
        if missing:
            _warn(f"the optimizer does not hold the weight of layer {', '.join(missing)}: another one must")


def scale_of(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """What ``GradScaler`` leaves to a fused optimizer to divide gradients by."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1 if scale is None else scale


def maximized_by(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {weight for group in optimizer.param_groups if group.get("maximize") for weight in group["params"]}


def _find(model: nn.Module, example: Tensor | Sequence[Any] | Mapping[str, Sequence[int]]) -> list[Use]:
    """The layers and their input sizes: given, or observed on one input or several."""
    if not isinstance(example, Mapping):
        refuse_sharded(
            model,
            "construct NormDecay before fully_shard, or let example be the input sizes of the layers, or None",
        )
        return observe(model, *inputs_of(example))
    modules, uses = named_layers(model), []
    for name, in_shape in example.items():
        if name not in modules:
            raise ValueError(f"convnorm: example names {name!r}, which is no convolutional or fully connected layer")
        with naming(name):
            layer = as_layer(modules[name], in_shape)
            uses.append(Use(name, modules[name], layer.in_shape, layer.geometry.out_shape))
    return uses


def _beta_of(name: str, beta: float | Mapping[str, float]) -> float:
    if isinstance(beta, Mapping):
        found = [value for pattern, value in beta.items() if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"convnorm: beta {dict(beta)} has no pattern for layer {name!r}")
        beta = found[0]
    if not math.isfinite(beta):
        raise ValueError(f"convnorm: beta {beta!r} of layer {name!r} must be finite")
    return float(beta)


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _warn(message: str) -> None:
    warnings.warn(f"convnorm: {message}", stacklevel=2)
