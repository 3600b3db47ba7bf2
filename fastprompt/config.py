"""Configurations of the methods: frozen dataclasses, checked when created, convertible to and from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

Pool = Literal["backbone", "all", "image", "prompt"]

# More than any ViT has tokens; a mistyped 2**40 would run out of memory.
MAX_PROMPTS = 65_536

_registry: dict[str, type[PromptConfig]] = {}
_C = TypeVar("_C", bound="PromptConfig")


@dataclass(frozen=True)
class PromptConfig:
    """Base class of the methods' configurations, and the fields they share.

    Args:
        num_prompts: P, prompts of a block.
        pool: the input of the head. "backbone": as in the timm model, without prompts; "all": the mean of everything
            but the prefix tokens, prompts included (the official code's "original" for MAE); "image": the mean of the
            patches; "prompt": the mean of the prompts.
        dropout: probability in [0, 1) of dropping prompt values in training; each image has its own mask.
        backbone_train_mode: True puts the frozen blocks into train mode with the model (drop-path active).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    method: ClassVar[str] = ""
    min_prompts: ClassVar[int] = 1

    num_prompts: int
    _: KW_ONLY
    pool: Pool = "backbone"
    dropout: float = 0.0
    backbone_train_mode: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _registry[cls.method] = cls

    def __post_init__(self) -> None:
        self._check_int("num_prompts", self.min_prompts, MAX_PROMPTS)
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                self._fail(name, f"one of {get_args(hint)}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            self._fail("dropout", "a number in [0, 1)")
        self._check_bool("backbone_train_mode")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the method's name under "method"."""
        return {"method": self.method, **asdict(self)}

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls: type[_C], data: dict[str, Any]) -> _C:
        """Create a configuration from `to_dict`; on `PromptConfig`, "method" selects the class.

        Raises:
            ValueError: the method or a field is unknown, or a value is not valid.
        """
        data = dict(data)
        name = data.pop("method", cls.method)
        if name not in _registry:
            raise ValueError(f"config: there is no method {name!r}; known are {sorted(_registry)}")
        target = _registry[name]
        if not issubclass(target, cls):
            raise ValueError(
                f"config: method {name!r} is not {cls.method!r}; use {target.__name__}.from_dict"
            )
        known = {f.name for f in fields(target)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"{target.__name__}: unknown fields {unknown}; known are {sorted(known)}")
        return target(**data)  # type: ignore[return-value]

    @classmethod
    def from_json(cls: type[_C], text: str) -> _C:
        """Create a configuration from `to_json`; raise ValueError if `text` is not such a JSON object."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"config: a JSON object is needed; got {type(data).__name__}")
        return cls.from_dict(data)

    def _fail(self, field: str, need: str) -> None:
        raise ValueError(f"{type(self).__name__}: `{field}` must be {need}; got {getattr(self, field)!r}")

    def _check_int(self, field: str, low: int, high: int | None = None, *, optional: bool = False) -> None:
        value = getattr(self, field)
        if value is None and optional:
            return
        need = f"an integer >= {low}" + (f" and <= {high}" if high is not None else "")
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < low
            or (high is not None and value > high)
        ):
            self._fail(field, need + (" or None" if optional else ""))

    def _check_bool(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "True or False")

    def _check_number(self, field: str, above: float | None = None, low: float | None = None) -> None:
        value = getattr(self, field)
        if (
            not _is_number(value)
            or (above is not None and value <= above)
            or (low is not None and value < low)
        ):
            need = "" if above is None else f" > {above}"
            self._fail(field, "a finite number" + (need if low is None else f" >= {low}"))


@dataclass(frozen=True)
class VPTConfig(PromptConfig):
    """Visual prompt tuning (Jia et al., ECCV 2022): prompts as tokens between the prefix tokens and the patches.

    Args:
        num_prompts: P, prompts per prompted block; 0 for no prompts.
        deep: True, every block (or the first `blocks`) has its own prompts (VPT-Deep); False, one set enters block 0
            and passes through all blocks as tokens (VPT-Shallow).
        blocks: deep only: the number of blocks with their own prompts; later blocks carry the last set on as tokens.
            None for all.
        shared_across_blocks: deep only: one set of prompts for all prompted blocks.
        project: width of the prompts before a trained linear map to the model's width; None for no map.
        pool, dropout, backbone_train_mode: see :class:`PromptConfig`. The official code keeps the blocks in eval mode.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    method: ClassVar[str] = "vpt"
    min_prompts: ClassVar[int] = 0

    deep: bool = True
    blocks: int | None = None
    shared_across_blocks: bool = False
    project: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_bool("deep", "shared_across_blocks")
        self._check_int("blocks", 1, optional=True)
        self._check_int("project", 1, optional=True)
        if not self.deep and self.blocks is not None:
            raise ValueError(
                f"VPTConfig: `blocks`={self.blocks} needs deep=True; shallow prompts enter block 0 only"
            )
        if not self.deep and self.shared_across_blocks:
            raise ValueError(
                "VPTConfig: `shared_across_blocks` needs deep=True; shallow has one set of prompts anyway"
            )
        if self.pool == "prompt" and self.num_prompts == 0:
            raise ValueError("VPTConfig: pool='prompt' averages prompts, and `num_prompts` is 0")


@dataclass(frozen=True)
class GateVPTConfig(PromptConfig):
    """Gated prompt tuning (Yoo et al., ICML 2023): shallow prompts, a gate and a softmax temperature for each block.

    Args:
        num_prompts: P >= 1.
        gate_init: the gates' logits start at -gate_init; the official examples use 5, the paper 1 to 20.
        num_gates: the number of blocks with a gate, from the first; None for all but the last.
        temperature: True, one trained temperature for each block, from 1; a number, that temperature for all blocks,
            fixed; False, none.
        temperature_range: every forward first clamps trained temperatures to it, in place.
        pool, dropout, backbone_train_mode: see :class:`PromptConfig`. The official code keeps the blocks in eval mode.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    method: ClassVar[str] = "gate_vpt"

    gate_init: float = 5.0
    num_gates: int | None = None
    temperature: bool | float = True
    temperature_range: tuple[float, float] = (0.01, 10.0)
    _: KW_ONLY
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("gate_init")
        self._check_int("num_gates", 0, optional=True)
        if not isinstance(self.temperature, bool):
            self._check_number("temperature", above=0)
        limits = tuple(self.temperature_range)
        if len(limits) != 2 or not all(_is_number(t) for t in limits) or not 0 < limits[0] <= limits[1]:
            self._fail("temperature_range", "two numbers, 0 < low <= high")
        object.__setattr__(self, "temperature_range", limits)  # JSON gives a list


@dataclass(frozen=True)
class CVPTConfig(PromptConfig):
    """Cross visual prompt tuning (Huang et al., ICCV 2025): every token attends to the prompts, by shared weights.

    Args:
        num_prompts: P >= 1, prompts of each block.
        insert: the position of the cross-attention: 1 before self-attention, 2 beside it, 3 after it (the paper's
            choice), 4 in the MLP's input, 5 after the MLP. Drop-path acts on it in 2 and 4.
        pool: only "backbone": CVPT has no prompt rows to average.
        dropout: see :class:`PromptConfig`; the paper's recipe uses 0.1.
        backbone_train_mode: see :class:`PromptConfig`; True as in the official code.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    method: ClassVar[str] = "cvpt"

    insert: int = 3
    _: KW_ONLY
    backbone_train_mode: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("insert", 1, 5)
        if self.pool != "backbone":
            raise ValueError(
                f"CVPTConfig: `pool` must be 'backbone'; got {self.pool!r}; set the input of the head by the timm "
                "model's `global_pool`"
            )


@dataclass(frozen=True)
class DAVPTConfig(PromptConfig):
    """Distribution-aware prompt tuning (Ren et al., CVPR 2025): VPT-Deep with metric learning in the guided blocks.

    Args:
        num_prompts: P, prompts of each block that is not guided.
        num_proxy_prompts: P_g, prompts of each guided block, the proxies of the classes; limited to the number of
            classes.
        guided_blocks: (first, last), the guided blocks, both included.
        prompt_norm: norm applied to the prompts: "none", "l2" or "layer" (a trained LayerNorm).
        criterion: "proxy_anchor" or "proxy_nca".
        class_feature: the form of the class token that is compared with the proxies: "cls", the row of a guided
            block's input; "query" or "key", its projection after norm1.
        proxy_for_class, proxy_for_patch: the form of the proxies that the class and the patch feature are compared
            with: "prompt", the normalized prompts; "query" or "key", their projections after norm1.
        patch_weight, class_weight: factors of the two losses.
        proxy_scale: factor on the similarities; 1 is the bare default of the official code, 5 that of its recipes.
        alpha, delta: sharpness and margin of the loss.
        feature_norm: norm applied to the classes' mean features before clustering: "layer", "l2" or "none".
        tune: "prompts", or "prompts+biases" (DA-VPT+), which also trains these parameters of the timm model: the class
            token, norm1, and the biases of k, v, proj (also the patch embedding's), fc2 and norm2; not q's bias.
        mask_prompts: True, the official code's `mask`: prompts attend to patches only, not to prefix tokens or
            prompts. It changes the logits only for `pool` "all" and "prompt", where the head reads prompt rows.
        pool, dropout: see :class:`PromptConfig`.
        backbone_train_mode: see :class:`PromptConfig`; True as in the official code.

    The patch feature is always the mean of the patch rows at the guided block's input, as in the official code.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    method: ClassVar[str] = "da_vpt"

    num_proxy_prompts: int
    guided_blocks: tuple[int, int]
    prompt_norm: Literal["none", "l2", "layer"] = "none"
    criterion: Literal["proxy_anchor", "proxy_nca"] = "proxy_anchor"
    class_feature: Literal["cls", "query", "key"] = "query"
    proxy_for_class: Literal["prompt", "query", "key"] = "prompt"
    proxy_for_patch: Literal["prompt", "query", "key"] = "prompt"
    patch_weight: float = 0.05
    class_weight: float = 0.05
    proxy_scale: float = 5.0
    alpha: float = 32.0
    delta: float = 0.1
    feature_norm: Literal["layer", "l2", "none"] = "layer"
    tune: Literal["prompts", "prompts+biases"] = "prompts"
    mask_prompts: bool = False
    _: KW_ONLY
    backbone_train_mode: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_int("num_proxy_prompts", 1, MAX_PROMPTS)
        guided = tuple(self.guided_blocks)
        if len(guided) != 2 or not all(type(i) is int for i in guided) or not 0 <= guided[0] <= guided[1]:
            self._fail("guided_blocks", "two block indices, 0 <= first <= last")
        object.__setattr__(self, "guided_blocks", guided)  # JSON gives a list
        for name in ("patch_weight", "class_weight", "delta"):
            self._check_number(name, low=0)
        for name in ("proxy_scale", "alpha"):
            self._check_number(name, above=0)
        self._check_bool("mask_prompts")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
