"""The profile: a file that is checked field by field, that counts only on its own machine, and that calls follow."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import NAMES
from fastprompt.calibration import tiles
from fastprompt.kernels.triton import launch
from fastprompt.kernels.triton import prompt_attention_config as config
from fastprompt.ops import attention_choice, packed_prompt_attention, profile
from fastprompt.ops.attention_choice import Call
from fastprompt.ops.profile_file import Measurement, Profile, ProfileError, Tile, entry, read, tables, write

CALL = Call(None, torch.float32, 64, 197, 197, 50)
MEASURED = Measurement("float32", 64, 197, 197, 50, False, False, 8, 12, {"split": 5.0, "joined": 7.0})
KEY = config.Key(0, "fwd", 64, "one", 2)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without a profile and without memory of one, and leave none."""
    monkeypatch.setenv(profile.VARIABLE, profile.NONE)
    profile.forget()
    yield
    profile.forget()


def follow(monkeypatch: pytest.MonkeyPatch, file: Path, *ways: Measurement, **machine: str) -> None:
    write(Profile({**profile.machine(), **machine}, list(ways)), file)
    monkeypatch.setenv(profile.VARIABLE, str(file))
    profile.forget()


# The file -----------------------------------------------------------------------------------------------------------


def filled() -> Profile:
    tile = Tile("prompt_attention", KEY._asdict(), vars(config.candidates(KEY)[1]), 3.5)
    refused = replace(MEASURED, prompts=10, refused={"resident": "out of resource: shared memory"})
    return Profile(profile.machine(), [MEASURED, refused], [tile])


def test_a_file_is_read_as_it_was_written_and_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.json"
    write(Profile(profile.machine()), file)
    write(filled(), file)
    assert read(file) == filled()
    assert [p.name for p in file.parent.iterdir()] == ["profile.json"]


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write(filled(), file)
    with pytest.raises(TypeError):
        write(Profile({"device": {1, 2}}), file)  # type: ignore[dict-item]
    assert read(file) == filled()
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_result_takes_the_place_of_an_older_one_of_its_shape() -> None:
    found = filled()
    found.add(replace(MEASURED, microseconds={"looped": 1.0}))
    found.add(replace(MEASURED, backward=True))
    found.add(replace(found.tiles[0], microseconds=1.0))
    assert [(m.prompts, m.backward, m.fastest) for m in found.ways] == [
        (10, False, "split"),
        (50, False, "looped"),
        (50, True, "split"),
    ]
    assert [t.microseconds for t in found.tiles] == [1.0]


WRONG: dict[str, tuple[Any, Any]] = {
    "format must be 1; got 2": (("format",), 2),
    "format must be int; got '1'": (("format",), "1"),
    "machine.torch must be str; got 2": (("machine", "torch"), 2),
    "ways must be list; got 'none'": (("ways",), "none"),
    "ways[0] must be an object; got []": (("ways", 0), []),
    "ways[0].extra is not a known field": (("ways", 0, "extra"), 1),
    "ways[1].dtype must be one of float16, bfloat16, float32; got 'int8'": (("ways", 1, "dtype"), "int8"),
    "ways[0].keys must be positive; got 0": (("ways", 0, "keys"), 0),
    "ways[0].keys must be int; got True": (("ways", 0, "keys"), True),
    "ways[0].backward must be bool; got 1": (("ways", 0, "backward"), 1),
    "ways[0].microseconds must hold a time; got {}": (("ways", 0, "microseconds"), {}),
    "ways[0].microseconds has a way 'fast'; known are": (("ways", 0, "microseconds"), {"fast": 1.0}),
    "ways[0].microseconds.split must be a positive number": (("ways", 0, "microseconds", "split"), -1.0),
    "ways[0].refused.split must be str; got 3": (("ways", 0, "refused"), {"split": 3}),
    "tiles[0].microseconds must be a positive number": (("tiles", 0, "microseconds"), float("inf")),
    "tiles[0]: there is no table of tile sizes for 'x'": (("tiles", 0, "operation"), "x"),
    "tiles[0]: the table of prompt_attention has no entry": (("tiles", 0, "key", "head_dim"), 7),
    "tiles[0]: Config(block_m=5": (("tiles", 0, "config", "block_m"), 5),
    "tiles[0]: prompt_attention: ": (("tiles", 0, "config"), {"rows": 1}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused_by_name_of_file_field_and_value(message: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    write(filled(), file)
    data = json.loads(file.read_text())
    (*path, last), value = WRONG[message]
    place = data
    for name in path:
        place = place[name]
    place[last] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ProfileError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_what_is_no_profile_at_all_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ProfileError, match=r"profile\.json"):
        read(file)
    with pytest.raises(ProfileError, match="No such file"):
        read(tmp_path / "nothing")


# In force -----------------------------------------------------------------------------------------------------------


def test_the_file_is_that_of_the_variable_or_of_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile.path() is None
    assert profile.in_force() == (None, "FASTPROMPT_PROFILE is 'none'")
    monkeypatch.setenv(profile.VARIABLE, "~/mine.json")
    assert profile.path() == Path.home() / "mine.json"
    monkeypatch.setenv(profile.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert profile.path() == tmp_path / "fastprompt" / "nvidia-h100-80gb-hbm3.json"


def test_without_a_file_there_is_no_profile_and_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(profile.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, reason = profile.in_force()
    assert found is None
    assert "`fastprompt calibrate` makes one" in reason


def test_the_fastest_way_of_the_measured_shape_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert profile.way(CALL) is None
    default = attention_choice.ways(CALL, triton=False)
    follow(monkeypatch, tmp_path / "p.json", MEASURED)
    assert profile.way(CALL) == "split"
    assert default[0] != "split"
    assert attention_choice.ways(CALL, triton=False) == ("split", *(w for w in default if w != "split"))
    with attention_choice.use_way("joined"):
        assert attention_choice.ways(CALL, triton=False) == ("joined",)


def test_a_call_computes_by_the_way_of_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    inputs = torch.randn(2, 9, 3, 2, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    follow(monkeypatch, tmp_path / "p.json", replace(MEASURED, head_dim=8, queries=9, keys=9, prompts=3))
    original = attention_choice.ways

    def ways(call: Call, **options: Any) -> Any:
        asked.append(original(call, **options)[0])
        return original(call, **options)

    monkeypatch.setattr(attention_choice, "ways", ways)
    followed = packed_prompt_attention(*inputs, backend="eager")
    with attention_choice.use_way("split"):
        forced = packed_prompt_attention(*inputs, backend="eager")
    assert asked == ["split", "split"]
    assert torch.equal(followed, forced)


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({}, True),
        ({"queries": 257, "keys": 257}, False),  # more keys than a resident kernel holds
        ({"queries": 140, "keys": 140}, True),
        ({"queries": 130, "keys": 130, "prompts": 10}, False),  # not within a factor of 1.5
        ({"prompts": 10}, True),
        ({"prompts": 0}, False),
        ({"prompts": 60}, False),
        ({"queries": 1}, False),
        ({"head_dim": 40}, True),
        ({"head_dim": 80}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"dtype": torch.float64}, False),
        ({"temperature": True}, True),
        ({"backward": True}, False),
        ({"only_prompts": True}, False),
        ({"capability": (9, 0)}, False),
    ],
)
def test_a_measurement_stands_for_calls_like_it(
    change: dict[str, Any], near: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, tmp_path / "p.json", MEASURED)
    assert (profile.way(CALL._replace(**change)) == "split") is near


def test_the_nearest_measurement_decides_first_by_its_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = replace(MEASURED, prompts=10, microseconds={"joined": 1.0})
    hot = replace(fewer, temperature=True, microseconds={"looped": 1.0})
    follow(monkeypatch, tmp_path / "p.json", MEASURED, fewer, hot)
    assert profile.way(CALL._replace(prompts=20)) == "joined"
    assert profile.way(CALL._replace(prompts=40)) == "split"
    assert profile.way(CALL._replace(prompts=40, temperature=True)) == "looped"


def test_rounding_decides_how_the_gradient_of_a_temperature_is_made_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CALL._replace(temperature=True, backward=True)
    before = attention_choice.ways(call)
    follow(monkeypatch, tmp_path / "p.json", replace(MEASURED, backward=True))
    assert profile.way(call) == "split"
    assert attention_choice.ways(call) == before


def test_a_profile_of_another_machine_is_ignored_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, tmp_path / "p.json", MEASURED, triton="2.0", device="another")
    with pytest.warns(UserWarning, match=r"triton is [\d.]+ here, 2.0 there") as caught:
        assert [profile.way(CALL), profile.way(CALL._replace(prompts=10))] == [None, None]
    assert len(caught) == 1
    assert "device is cpu here, another there" in str(caught[0].message)
    assert "`fastprompt calibrate`" in str(caught[0].message)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_missing_or_broken_file_that_was_asked_for_is_warned_of(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(profile.VARIABLE, str(file))
    profile.forget()
    with pytest.warns(UserWarning, match=r"p\.json"):
        assert profile.way(CALL) is None


# Tile sizes ---------------------------------------------------------------------------------------------------------


def test_every_table_can_be_overridden_and_its_own_entries_are_accepted() -> None:
    names = [name for name, _ in tables()]
    assert {"prompt_attention", "gated_blend", "folded_cross_attention", "row_attention"} <= set(names)
    for name, module in tables():
        key, other = next((k, c) for k in module.TABLE for c in module.candidates(k) if c != module.TABLE[k])
        assert entry(name, key._asdict(), vars(other)) == (module, key, other)
        before = module.TABLE[key]
        module.override(key, other)
        assert module.TABLE[key] == other
        module.override(key, before)


class Recorder:
    """Notes the options of launches on a GPU that is not there."""

    capability = (9, 0)

    def __init__(self) -> None:
        self.options: list[dict[str, int]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, int], arguments: Any) -> None:
        self.options.append(options)


@pytest.mark.parametrize("operation", [*NAMES, "prompt_segment"])
def test_a_launch_uses_what_the_table_says_now(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search puts one candidate after the other into the table: nothing may remember the entry."""
    recorder = Recorder()
    monkeypatch.setattr(launch, "recorder", recorder)
    module: Any = importlib.import_module(f"bench.cases.{operation}")
    _, compile_once = next(iter(getattr(module, "OPERATION", module).entries()))
    if operation == "prompt_attention":
        compile_once = partial(compile_once, way="looped")
    with tiles.reads() as found:
        compile_once()
    before, recorder.options = recorder.options, []
    assert found
    for name, key in found:
        table: Any = dict(tables())[name]
        old = table.TABLE[key]
        other = next(c for c in table.candidates(key) if c.num_warps != old.num_warps)
        monkeypatch.setitem(table.TABLE, key, old)  # puts it back afterwards
        table.override(key, other)
    compile_once()
    assert recorder.options[0] != before[0]


def test_tile_sizes_are_put_into_the_tables_when_kernels_are_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = config.TABLE[KEY]
    other = next(c for c in config.candidates(KEY) if c != before)
    write(
        Profile(profile.machine(), tiles=[Tile("prompt_attention", KEY._asdict(), vars(other), 1.0)]),
        tmp_path / "p.json",
    )
    monkeypatch.setenv(profile.VARIABLE, str(tmp_path / "p.json"))
    profile.forget()
    monkeypatch.setitem(config.TABLE, KEY, before)  # puts the entry back afterwards
    assert config.TABLE[KEY] == before
    profile.way(CALL)
    assert config.TABLE[KEY] == other


def test_the_assemblers_version_is_read_for_each_architecture() -> None:
    pytest.importorskip("triton")
    for capability in ((8, 0), (9, 0), (10, 0)):
        assert tuple(int(n) for n in profile.ptxas_version(capability).split(".")) > (12, 0)
