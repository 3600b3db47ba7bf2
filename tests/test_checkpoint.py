"""States of the official code: tuned parameters by every golden case's own names, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from typing import Any

import golden_files
import pytest
import torch
from official_states import CASES, State, golden, output, prefixed
from torch import nn

import fastprompt
from bench.correctness import assert_same
from fastprompt import load_official_state_dict

PREFIXES = [
    "module.",
    "model.",
    "backbone.",
    "enc.",
    "enc.transformer.",
    "module.enc.",
    "module.model.backbone.",
]


def same_output(model: Any, case: golden_files.Case) -> None:
    assert_same(model(case.tensors["input"]), output(case))


def vpt(num_prompts: int = 4, num_classes: int = 3, **options: Any) -> Any:
    base = golden_files.backbone(False, num_classes=num_classes)
    return fastprompt.get_prompt_model(base, fastprompt.VPTConfig(num_prompts, **options))


def vpt_state(num_prompts: int = 4, num_classes: int = 3, deep: int = 2) -> State:
    state = {
        "prompt_embeddings": torch.randn(1, num_prompts, 64),
        "head.last_layer.weight": torch.randn(num_classes, 64),
        "head.last_layer.bias": torch.randn(num_classes),
    }
    if deep:
        state["deep_prompt_embeddings"] = torch.randn(deep, num_prompts, 64)
    return state


def refused(model: Any, state: Any, strict: bool = True) -> list[str]:
    """The lines of the error, after making sure that nothing changed."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="`load_official_state_dict`") as error:
        load_official_state_dict(model, state, strict=strict)
    for name, t in model.state_dict().items():
        assert torch.equal(t.isnan(), before[name].isnan()), name
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), name
    return str(error.value).splitlines()


def test_all_golden_cases_are_there() -> None:
    assert len(CASES) == 18


@pytest.mark.parametrize("name", CASES)
def test_golden_state_gives_the_official_output(name: str) -> None:
    model, state, case = golden(name)
    with pytest.raises(AssertionError):
        same_output(model, case)
    report = load_official_state_dict(model, state)
    assert set(report.loaded) == set(state)
    assert report.missing == report.unexpected == report.ignored == ()
    same_output(model, case)


@pytest.mark.parametrize("name", ["vpt_deep_cls", "gatevpt_mean", "cvpt_insert3", "davpt_cls"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_stripped(name: str, prefix: str) -> None:
    model, state, case = golden(name)
    assert set(load_official_state_dict(model, prefixed(state, prefix)).loaded) == set(
        prefixed(state, prefix)
    )
    same_output(model, case)


@pytest.mark.parametrize("keys", [["model"], ["state_dict"], ["state_dict", "model"]], ids=".".join)
def test_nested_states_are_unwrapped(keys: list[str]) -> None:
    model, state, case = golden("vpt_deep_cls")
    nested: Any = state
    for key in keys:
        nested = {"epoch": 3, "optimizer": {"state": {}}, key: nested}
    load_official_state_dict(model, nested)
    same_output(model, case)


def test_parameters_stay_the_same_objects_in_their_own_dtype() -> None:
    model, state, _ = golden("cvpt_insert3")
    model.bfloat16()
    before = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    load_official_state_dict(model, state)
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert torch.equal(model.prompts[1], state["Prompt_Tokens"][1].bfloat16())


def test_head_of_vpt_has_its_own_name() -> None:
    model, state = vpt(), vpt_state()
    load_official_state_dict(model, state)
    assert torch.equal(model.base.head.weight, state["head.last_layer.weight"].double())
    assert torch.equal(model.base.head.bias, state["head.last_layer.bias"].double())


def test_prompt_files_of_vpt_hold_arrays_and_no_head() -> None:
    model, state = vpt(), vpt_state()
    head = model.base.head.weight.clone()
    arrays = {
        "shallow_prompt": state["prompt_embeddings"].numpy(),
        "deep_prompt": state["deep_prompt_embeddings"].numpy(),
    }
    assert refused(model, arrays)[1:] == ["- missing: base.head.weight", "- missing: base.head.bias"]
    report = load_official_state_dict(model, arrays, strict=False)
    assert report.missing == ("base.head.weight", "base.head.bias")
    assert torch.equal(model.prompts[0], state["prompt_embeddings"][0].double())
    assert torch.equal(model.prompts[2], state["deep_prompt_embeddings"][1].double())
    assert torch.equal(model.base.head.weight, head)


def test_partial_deep_prompts_and_projection() -> None:
    model = vpt(num_classes=0, blocks=2, project=5)
    state = {
        "enc.transformer.prompt_embeddings": torch.randn(1, 4, 5),
        "enc.transformer.deep_prompt_embeddings": torch.randn(1, 4, 5),
        "enc.transformer.prompt_proj.weight": torch.randn(64, 5),
        "enc.transformer.prompt_proj.bias": torch.randn(64),
    }
    load_official_state_dict(model, state)
    for p, t in zip(
        (*model.prompts, model.prompt_project.weight, model.prompt_project.bias), state.values(), strict=True
    ):
        assert torch.equal(p, t.view_as(p).double())


def test_norm_of_da_vpts_prompts_and_no_unguided_blocks() -> None:
    base = golden_files.backbone(False, num_classes=3)
    config = fastprompt.DAVPTConfig(4, 2, (0, 2), prompt_norm="layer")
    model: Any = fastprompt.get_prompt_model(base, config)
    state = {
        "proxy_prompt_tokens": torch.randn(3, 2, 64),
        "other_prompt_tokens": torch.empty(0, 4, 64),
        "vpt_norm.weight": torch.randn(64),
        "vpt_norm.bias": torch.randn(64),
        "head.weight": torch.randn(3, 64),
        "head.bias": torch.randn(3),
    }
    assert load_official_state_dict(model, state).ignored == ("other_prompt_tokens",)
    assert torch.equal(model.prompts[2], state["proxy_prompt_tokens"][2].double())
    assert torch.equal(model.prompt_norm.weight, state["vpt_norm.weight"].double())
    assert torch.equal(model.prompt_norm.bias, state["vpt_norm.bias"].double())


def da_vpt() -> tuple[Any, State]:
    """A model of three classes and two proxies, and a state for it with the class map that DA-VPT's module holds."""
    base = golden_files.backbone(False, num_classes=3)
    state: State = {
        "proxy_prompt_tokens": torch.randn(1, 2, 64),
        "other_prompt_tokens": torch.randn(2, 4, 64),
        "head.weight": torch.randn(3, 64),
        "head.bias": torch.randn(3),
    }
    return fastprompt.get_prompt_model(base, fastprompt.DAVPTConfig(4, 2, (1, 1))), state


@pytest.mark.parametrize("mapping", [[1, 0, 0], [1.0, 0.0, 0.0], torch.tensor([1, 0, 0])], ids=repr)
def test_class_map_of_da_vpt(mapping: Any) -> None:
    model, state = da_vpt()
    centroids = torch.randn(2, 64)
    extra = {"vpt_criterion.mapping": mapping, "vpt_criterion.centroids": centroids}
    assert load_official_state_dict(model, {**state, **extra}).loaded == (*state, *extra)
    assert model.class_to_prompt.tolist() == [1, 0, 0]
    assert model.class_to_prompt.dtype == torch.int64
    assert torch.equal(model.class_centroids, centroids.double())


def test_class_map_is_optional() -> None:
    model, state = da_vpt()
    before = model.class_to_prompt.clone()
    assert load_official_state_dict(model, state).missing == ()
    assert torch.equal(model.class_to_prompt, before)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([0, 1, 2], "must be prompts in 0..1 for all classes; check `num_proxy_prompts`"),
        ([0, -1, 1], "must be prompts in 0..1"),
        ([0, 0.5, 1], "must be prompts in 0..1"),
        ([0, float("nan"), 1], "must be prompts in 0..1"),
        ([0, 1j, 1], "is torch.complex64; integers are needed"),
        ([0, 1], "is (2,), the model's is (3,); check the timm model's `num_classes`"),
    ],
)
def test_broken_class_maps_are_refused(mapping: Any, message: str) -> None:
    model, state = da_vpt()
    (line,) = refused(model, {**state, "vpt_criterion.mapping": mapping}, strict=False)[1:]
    assert line.startswith(f"- vpt_criterion.mapping: {message}")


def test_gate_vpt_without_gates_and_temperature_reads_plain_prompts() -> None:
    base = golden_files.backbone(False)
    model = fastprompt.get_prompt_model(base, fastprompt.GateVPTConfig(4, num_gates=0, temperature=False))
    state = vpt_state(deep=0, num_classes=3)
    del state["head.last_layer.weight"], state["head.last_layer.bias"]
    load_official_state_dict(model, state)
    assert torch.equal(model.prompts[0], state["prompt_embeddings"][0].double())


def test_error_lists_everything_and_changes_nothing() -> None:
    state = vpt_state()
    state["side_alpha"] = torch.zeros(())
    state["prompt_embeddings"] = torch.randn(1, 9, 64)
    del state["head.last_layer.bias"]
    lines = refused(vpt(), state)
    assert lines[1:] == [
        "- prompt_embeddings: is (1, 9, 64), the model's is (1, 4, 64); check `num_prompts`",
        "- unexpected: side_alpha",
        "- missing: base.head.bias",
    ]


def test_not_strict_reports_what_is_missing_and_unexpected() -> None:
    model, state = vpt(), vpt_state()
    state["side_alpha"] = torch.zeros(())
    del state["deep_prompt_embeddings"]
    kept = model.prompts[1].clone()
    assert "strict=False" in refused(model, state)[0]
    report = load_official_state_dict(model, state, strict=False)
    assert report.missing == ("prompts.1", "prompts.2")
    assert report.unexpected == ("side_alpha",)
    assert set(report.loaded) == set(state) - {"side_alpha"}
    assert torch.equal(model.prompts[0], state["prompt_embeddings"][0].double())
    assert torch.equal(model.prompts[1], kept)


def gate_vpt(num_prompts: int = 4, **options: Any) -> Any:
    return fastprompt.get_prompt_model(
        golden_files.backbone(False), fastprompt.GateVPTConfig(num_prompts, **options)
    )


WIDTH = "the timm model's width (`embed_dim`)"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("model", "state", "lines"),
    [
        (
            vpt(),
            vpt_state(deep=3),
            ["deep_prompt_embeddings: is (3, 4, 64), the model's is (2, 4, 64); check `deep` and `blocks`"],
        ),
        (
            vpt(blocks=2),
            vpt_state(),
            ["deep_prompt_embeddings: is (2, 4, 64), the model's is (1, 4, 64); check `deep` and `blocks`"],
        ),
        (
            vpt(),
            vpt_state(num_prompts=5),
            [
                "prompt_embeddings: is (1, 5, 64), the model's is (1, 4, 64); check `num_prompts`",
                "deep_prompt_embeddings: is (2, 5, 64), the model's is (2, 4, 64); check `num_prompts`",
            ],
        ),
        (
            vpt(deep=False),
            vpt_state(deep=0) | {"prompt_embeddings": torch.randn(1, 5, 32)},
            [
                "prompt_embeddings: is (1, 5, 32), the model's is (1, 4, 64); check `num_prompts` and `project`, or "
                + WIDTH
            ],
        ),
        (
            gate_vpt(),
            {"prompt_embeddings": torch.randn(1, 5, 32), "gate_logit": torch.randn(1), "temp": torch.ones(3)},
            [
                f"prompt_embeddings: is (1, 5, 32), the model's is (1, 4, 64); check `num_prompts` and {WIDTH}",
                "gate_logit: is (1,), the model's is (2,); check `num_gates`",
            ],
        ),
        (
            vpt(),
            vpt_state(num_classes=5),
            [
                "head.last_layer.weight: is (5, 64), the model's is (3, 64); check the timm model's `num_classes`, or "
                "remove the head from the state",
                "head.last_layer.bias: is (5,), the model's is (3,); check the timm model's `num_classes`, or remove "
                "the head from the state",
            ],
        ),
        (
            vpt(deep=False),
            vpt_state(),
            ["deep_prompt_embeddings: the model has no such parameter; check `deep` of the configuration"],
        ),
        (
            vpt(0),
            vpt_state(deep=0),
            ["prompt_embeddings: the model has no such parameter; check `num_prompts` of the configuration"],
        ),
        (
            gate_vpt(temperature=1.0),
            {"prompt_embeddings": torch.randn(1, 4, 64), "gate_logit": torch.randn(2), "temp": torch.ones(3)},
            ["temp: the model has no such parameter; check `temperature` of the configuration"],
        ),
    ],
    ids=[
        "more blocks",
        "fewer blocks",
        "prompts",
        "prompts and width",
        "GateVPT",
        "classes",
        "deep into shallow",
        "no prompts",
        "fixed temperature",
    ],
)
def test_other_sizes_and_options_are_refused_with_the_remedy(
    model: Any, state: State, lines: list[str], strict: bool
) -> None:
    assert refused(model, state, strict)[1:] == [f"- {line}" for line in lines]


def test_shallow_state_in_a_deep_model_names_deep() -> None:
    assert refused(vpt(), vpt_state(deep=0))[1:] == [
        "- missing: deep_prompt_embeddings (prompts.1, prompts.2); check `deep` of the configuration"
    ]


def layered_head() -> nn.Module:
    """VPT's head of several layers, under its own names."""
    layers = {"projection": nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU())}
    return nn.Sequential(OrderedDict(**layers, last_layer=nn.Linear(8, 3))).double()


@pytest.mark.parametrize("strict", [True, False])
def test_half_of_a_layered_head_is_refused(strict: bool) -> None:
    head = prefixed(layered_head().state_dict(), "head.") | {"head.last_layer.weight": torch.randn(3, 64)}
    (line,) = refused(vpt(), vpt_state() | head, strict)[1:]
    assert line.startswith("- incomplete head: the model's has no head.projection.0.weight")
    assert "give the timm model a head with the state's layers and names before `get_prompt_model`" in line
    assert "strict=False" in line
    state = {k: t for k, t in vpt_state().items() if not k.startswith("head.")}
    assert load_official_state_dict(vpt(), state, strict=False).missing == (
        "base.head.weight",
        "base.head.bias",
    )


def test_head_of_several_layers_loads_into_one_of_the_same_layers() -> None:
    _, state, case = golden("vpt_deep_cls")
    base: Any = golden_files.backbone(False, num_classes=3)
    base.head, trained = layered_head(), layered_head().eval()
    model = fastprompt.get_prompt_model(base, fastprompt.VPTConfig(case.config["NUM_TOKENS"])).eval()
    report = load_official_state_dict(model, state | prefixed(trained.state_dict(), "head."))
    assert report.missing == report.unexpected == report.ignored == ()
    assert_same(model(case.tensors["input"]), trained(output(case)))


CONFIGS = {"vpt_deep_cls": "VPT", "gatevpt_cls": "GateVPT", "cvpt_insert3": "CVPT", "davpt_cls": "DAVPT"}


@pytest.mark.parametrize(("mine", "theirs"), list(itertools.permutations(CONFIGS, 2)))
def test_state_of_another_method_is_refused(mine: str, theirs: str) -> None:
    (line,) = refused(golden(mine)[0], golden(theirs)[1], strict=False)
    assert f"make the model with `fastprompt.{CONFIGS[theirs]}Config`" in line


def test_names_of_several_methods_are_refused() -> None:
    (line,) = refused(vpt(), golden("gatevpt_cls")[1] | golden("cvpt_insert3")[1], strict=False)
    assert line.endswith("mixes names of several methods: Prompt_Tokens, gate_logit, prompt_embeddings, temp")


def test_own_state_is_refused() -> None:
    model = vpt()
    (line,) = refused(model, model.state_dict())
    assert "model.load_state_dict(state)" in line


def test_two_names_for_one_parameter_are_refused() -> None:
    state = vpt_state()
    lines = refused(vpt(), {**state, "module.prompt_embeddings": state["prompt_embeddings"]})
    assert lines[1:] == [
        "- module.prompt_embeddings: the state contains the same parameter under another name"
    ]


def test_what_is_no_tensor_is_unexpected() -> None:
    model = vpt()
    extra = {"epoch": 3, "lr": torch.ones(3, device="meta"), 7: "seven"}
    assert refused(model, {**vpt_state(), **extra})[1:] == [
        "- unexpected: epoch",
        "- unexpected: lr",
        "- unexpected: 7",
    ]


def test_model_and_state_of_another_kind() -> None:
    with pytest.raises(TypeError, match="must be a PromptModel; got VisionTransformer"):
        load_official_state_dict(golden_files.backbone(False), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must map names to tensors; got str"):
        load_official_state_dict(vpt(), "prompts.pth")  # type: ignore[arg-type]
    for whole in (vpt(), {"model": vpt()}):
        with pytest.raises(TypeError, match=r"got \w+, a whole module; pass its `.state_dict\(\)`"):
            load_official_state_dict(vpt(), whole)


EVERYTHING = [
    "- missing: base.head.weight",
    "- missing: base.head.bias",
    "- missing: prompt_embeddings (prompts.0)",
    "- missing: deep_prompt_embeddings (prompts.1, prompts.2); check `deep` of the configuration",
]


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_which_nothing_fits_is_refused(strict: bool) -> None:
    assert refused(vpt(), {}, strict)[1:] == EVERYTHING
    assert refused(vpt(), {"side_alpha": torch.zeros(())}, strict)[1:] == [
        "- unexpected: side_alpha",
        *EVERYTHING,
    ]
    (line,) = refused(vpt(0, num_classes=0), {}, strict)[1:]
    assert line == "- the state shares no name with the model"


@torch.no_grad()
def wrong_by(name: str, base: Any = None, **changes: Any) -> float:
    """Load a golden case into a model with other options: ‖wrong − right‖ / ‖right‖ of its output."""
    right, state, case = golden(name)
    config = dataclasses.replace(right.config, **changes)
    model = fastprompt.get_prompt_model(right.base if base is None else base, config).eval()
    load_official_state_dict(model, state)
    want = output(case)
    return float((model(case.tensors["input"]) - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vpt_deep_mean", {"pool": "image"}),
        ("gatevpt_mean", {"pool": "image"}),
        ("davpt_mean", {"pool": "image"}),
        ("cvpt_insert3", {"insert": 2}),
        ("davpt_cls", {"guided_blocks": (0, 1)}),
        ("davpt_mean", {"prompt_norm": "l2"}),
    ],
)
def test_options_that_a_state_cannot_tell(name: str, changes: dict[str, Any]) -> None:
    """They load without an error, and docs/checkpoints.md says what a wrong guess costs."""
    assert wrong_by(name, **changes) > 0.05


def test_place_of_the_norm_that_a_state_cannot_tell() -> None:
    classes = golden("davpt_mean")[2].config["num_classes"]
    assert wrong_by("davpt_mean", golden_files.backbone(True, num_classes=classes)) > 0.05
