"""The base classes of the optimizers, and the settings of single parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import functional as F
from .._missing import missing_attribute

_WRAPPED = "__bnb_optimizer_quant_state__"

_said: set[str] = set()


def _say_plain(name: str) -> None:
    """Once a process: states take 4 times the memory that the name promises."""
    if not _said:
        _said.add(name)
        warnings.warn(
            f"{name}: 8-bit and paged optimizer states are not in halfbyte yet; the states are kept in float32 on the "
            "parameters' device, and the arithmetic is that of the 32-bit optimizer",
            stacklevel=4,
        )


class MockArgs:
    """Settings as attributes."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        """Keep the settings."""
        self.__dict__.update(initial_data)


class GlobalOptimManager:
    """Settings of single parameters that differ from their optimizer's."""

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget all settings."""
        self.pid2config: dict[int, dict[str, Any]] = {}
        self.index2config: dict[tuple[int, int], dict[str, Any]] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.uses_config_override = False
        self.module_weight_config_triple: list[tuple[torch.nn.Module, str, dict[str, Any]]] = []

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Keep settings that were made for these parameters by their place, also when they are moved later."""
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                if id(p) in self.pid2config:
                    self.index2config[g, i] = self.pid2config[id(p)]

    def override_config(
        self,
        parameters: Tensor | Sequence[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Set one setting, or several, of parameters: `lr`, `betas`, `eps`, `weight_decay`, `optim_bits` and others."""
        self.uses_config_override = True
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ValueError("key_value_dict must be None when key and value are given")
            key_value_dict = {key: value}
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            if key_value_dict is not None:
                self.pid2config.setdefault(id(p), {}).update(key_value_dict)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Set settings of a parameter that may be replaced before the first step: it is looked up then."""
        self.module_weight_config_triple.append((module, param_name, config))


class Optimizer8bit(torch.optim.Optimizer):
    """Base class of the optimizers. States are float32, whatever `optim_bits` is."""

    # Fixed by classes with "8bit", "32bit" or "Paged" in their name; an argument of the other classes.
    _bits: int | None = None
    _paged = False

    def __init__(self, params: Any, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False) -> None:
        """Make an optimizer; `optim_bits` of 8 and `is_paged` warn that they have no effect."""
        if optim_bits not in (8, 32):
            raise NotImplementedError(f"optim_bits must be 8 or 32, got {optim_bits}")
        super().__init__(params, defaults)
        self.initialized = False
        self.is_paged = is_paged
        self.mng = GlobalOptimManager.get_instance()
        self.args: Any = None
        if optim_bits == 8 or is_paged:
            _say_plain(type(self).__name__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state dict of this class, or of bitsandbytes' with 32-bit states; states stay float32.

        Raises:
            ValueError: The states are of 8 bits, or the groups do not fit.
        """
        saved = {}
        for key, value in state_dict["state"].items():
            # bitsandbytes wraps them so that FSDP does not gather them.
            wrapped = value.get(_WRAPPED, {})
            saved[key] = {**{k: v for k, v in value.items() if k != _WRAPPED}, **wrapped}
            for name, state in saved[key].items():
                if isinstance(state, Tensor) and state.dtype is torch.uint8:
                    raise ValueError(f"state[{key}][{name!r}] must be float32, got 8-bit states of bitsandbytes")
        super().load_state_dict({**state_dict, "state": saved})
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(order, params, strict=True):
            # torch casts states to the parameter's dtype, which would round the states of 16-bit parameters.
            for name, state in saved.get(key, {}).items():
                if isinstance(state, Tensor):
                    self.state[p][name] = state.to(p.device, copy=True)

    def check_overrides(self) -> None:
        """Find the parameters that `register_module_override` was told of by name."""
        places = {id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}
        for module, name, config in self.mng.module_weight_config_triple:
            p = getattr(module, name)
            if id(p) in places:
                self.mng.pid2config[id(p)] = self.mng.index2config[places[id(p)]] = config

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of one parameter."""
        config = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "optim_bits": self.args.optim_bits,
            "min_8bit_size": self.args.min_8bit_size,
            "max_unorm": self.args.max_unorm,
            "skip_zeros": self.args.skip_zeros,
        }
        config.update(self.mng.index2config.get((gindex, pindex), {}))
        config.update(self.mng.pid2config.get(id(group["params"][pindex]), {}))
        return config

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.initialized = True
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None:
                    if not self.state[p]:
                        self.init_state(group, p, g, i)
                    self.update_step(group, p, g, i)
        return loss

    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the states of a parameter."""
        raise NotImplementedError("init_state must be overridden")

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update a parameter and its states."""
        raise NotImplementedError("update_step must be overridden")


class Optimizer2State(Optimizer8bit):
    """An optimizer with a first and a second moment: "adam", "lamb" or "ademamix"."""

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ) -> None:
        """Make an optimizer; `max_unorm`, `alpha` and the rest as in `optimizer_update_32bit`.

        `t_alpha` and `t_beta3` are the numbers of steps over which AdEMAMix's alpha and beta3 rise to their values.
        """
        if isinstance(betas, str):
            betas = tuple(float(b) for b in betas.strip().strip("()").split(","))
        _check_numbers(lr, betas, eps, weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }
        super().__init__(params, defaults, optim_bits, is_paged)
        self.args = args or _settings(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        self.optimizer_name = optimizer_name

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the moments, all zero."""
        state = self.state[p]
        state["step"] = 0
        shape = (2, *p.shape) if self.optimizer_name == "ademamix" else p.shape
        state["state1"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        state["state2"] = torch.zeros_like(p, dtype=torch.float32)
        if self.get_config(gindex, pindex, group)["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros(1, device=p.device)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update a parameter and its moments."""
        config = self.get_config(gindex, pindex, group)
        state, betas = self.state[p], config["betas"]
        state["step"] += 1
        beta3 = betas[2] if len(betas) > 2 else 0.0
        alpha = config["alpha"]
        if config["t_alpha"]:
            alpha = min(state["step"] * alpha / config["t_alpha"], alpha)
        if config["t_beta3"]:
            # Linear in the half-life, from beta1's to beta3's (arXiv 2409.03137, appendix A.1).
            low, high, part = math.log(betas[0]), math.log(beta3), state["step"] / config["t_beta3"]
            beta3 = min(math.exp(low * high / ((1 - part) * high + part * low)), beta3)
        F.optimizer_update_32bit(
            self.optimizer_name, _gradient(p), p, state["state1"], betas[0], config["eps"], state["step"], config["lr"],
            state["state2"], betas[1], beta3, alpha, config["weight_decay"], 1.0, state.get("unorm_vec"),
            config["max_unorm"], config["skip_zeros"],
        )  # fmt: skip


class Optimizer1State(Optimizer8bit):
    """An optimizer with one state: "momentum", "lars", "lion", "rmsprop" or "adagrad"."""

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        """Make an optimizer; the arguments as in `optimizer_update_32bit`."""
        _check_numbers(lr, betas, eps, weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, is_paged)
        self.args = args or _settings(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        self.optimizer_name = optimizer_name

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the state, all zero."""
        state = self.state[p]
        state["step"] = 0
        state["state1"] = torch.zeros_like(p, dtype=torch.float32)
        if self.get_config(gindex, pindex, group)["max_unorm"] > 0.0:
            state["unorm_vec"] = torch.zeros(1, device=p.device)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update a parameter and its state."""
        config = self.get_config(gindex, pindex, group)
        state = self.state[p]
        state["step"] += 1
        F.optimizer_update_32bit(
            self.optimizer_name, _gradient(p), p, state["state1"], config["betas"][0], config["eps"], state["step"],
            config["lr"], None, config["betas"][1], 0.0, 0.0, config["weight_decay"], 1.0, state.get("unorm_vec"),
            config["max_unorm"], config["skip_zeros"],
        )  # fmt: skip


def _gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        raise ValueError("p must have a gradient, got None")
    return p.grad


def _settings(optim_bits: int, min_8bit_size: int, max_unorm: float, skip_zeros: bool) -> MockArgs:
    return MockArgs(
        {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "max_unorm": max_unorm, "skip_zeros": skip_zeros}
    )


def _check_numbers(lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{i}] must be at least 0 and below 1, got {beta}")


__getattr__ = missing_attribute(__name__)
