"""The configuration: recipes, overrides, checks, durations, the JSON Schema and the description of every key."""

import re

import jsonschema
import pytest
import yaml

from scale_mae.config import SHIPPED_CONFIGS, Config, ConfigError, json_schema, load_config, recipe_names, recipe_path
from scale_mae.config.recipes import read_header


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_has_a_complete_header(name):
    config = load_config(name)
    config.deepspeed_json()
    assert config.accumulation(1) >= 1
    assert all(vars(read_header(name)).values())
    jsonschema.validate(yaml.safe_load(recipe_path(name).read_text()), json_schema())


@pytest.mark.parametrize("path", sorted(SHIPPED_CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_deepspeed_accepts_every_shipped_file(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    from scale_mae.engine.deepspeed_config import build_deepspeed_config

    config = load_config("debug", {"engine.deepspeed": path.stem})
    parsed = DeepSpeedConfig(build_deepspeed_config(config, 1))
    assert parsed.zero_optimization_stage == int(path.stem[4])
    assert parsed.gradient_clipping == 0.0


def test_the_pretraining_recipes_are_those_of_the_paper():
    for name, size, batch in (("vit_base", "base", 256), ("vit_large", "large", 128), ("vit_huge", "huge", 64)):
        config = load_config(name)
        assert (config.model.size, config.train.micro_batch) == (size, batch)
        assert config.peak_lr == pytest.approx(2.4e-3)
        assert config.optim.betas == (0.9, 0.95)
        assert config.optim.weight_decay == 0.05
        assert config.optim.clip_grad_norm is None
        assert config.steps(config.optim.warmup, 1_281_167) == round(40 * 1_281_167 / 4096)
        assert config.model.target == "norm_pixel"


def test_every_key_has_a_description_that_is_a_sentence():
    for section, info in Config.model_fields.items():
        assert info.description, section
        for name, field in info.annotation.model_fields.items():
            assert field.description, f"{section}.{name}"
            assert re.match(r"[A-Z`].*\.$", field.description, re.DOTALL), f"{section}.{name}"


def test_the_json_schema_accepts_known_keys_only():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"model": {"image_size": 224, "patch_size": [16, 8]}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {"img_size": 224}}, schema)


def test_a_saved_config_loads_to_an_equal_one(tmp_path):
    config = load_config("demo", {"model": {"image_size": [32, 64]}, "optim": {"clip_grad_norm": 1.5}})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml") == config
    assert load_config("demo").digest() != config.digest()


@pytest.mark.parametrize(
    ("overrides", "processes", "advice"),
    [
        ({}, 16, "= 2048. Set train.micro_batch=64."),
        ({"train.global_batch": 1000}, 10, "= 1280. Set train.micro_batch=100."),
        (
            {"train.global_batch": 48},
            16,
            "= 2048. No smaller train.micro_batch divides it either. Change train.global_batch or the number of processes.",
        ),  # 3 would divide, but mixup needs an even number
        ({"train.global_batch": 48, "classify.mixup": 0, "classify.cutmix": 0}, 16, "= 2048. Set train.micro_batch=3."),
    ],
)
def test_the_error_of_an_indivisible_batch_names_a_micro_batch_that_works(overrides, processes, advice):
    config = load_config("finetune_base", overrides)
    with pytest.raises(ConfigError) as error:
        config.accumulation(processes)
    assert str(error.value).endswith(advice)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("10 steps", 10), ("2 epochs", 20), ("1.5 epochs", 15), ("1e3 images", 10), ("0 steps", 0), ("1 images", 1)],
)
def test_durations_are_converted_to_steps(duration, steps):
    config = load_config("debug", {"train.global_batch": 100, "train.micro_batch": 100})
    assert config.steps(duration, 1000) == steps


def test_overrides_in_python_are_checked():
    assert load_config("debug", {"train": {"micro_batch": 2}}).train.micro_batch == 2
    with pytest.raises(ConfigError, match="did you mean micro_batch"):
        load_config("debug", {"train": {"micro_bach": 2}})
    with pytest.raises(ConfigError, match="train: not of the form section.key"):
        load_config("debug", {"train": 3})


@pytest.mark.parametrize("value", ["null", ""])
def test_null_clears_an_optional_path_on_the_command_line(value):
    assert load_config("finetune_demo", [f"classify.val_source={value}"]).classify.val_source is None
    assert load_config("demo", [f"log.discovery_dir={value}"]).log.discovery_dir is None


def test_a_path_on_the_command_line_may_contain_what_yaml_interprets():
    assert load_config("demo", ["data.source=a: #b"]).data.source == "a: #b"


def test_a_resumed_run_may_change_marked_keys_only():
    config = load_config("demo")
    changed = load_config("demo", ["log.interval=1", "train.micro_batch=32", "run.dir=elsewhere", "optim.base_lr=0.1"])
    assert config.differences(changed) == ["optim.base_lr: 0.001 -> 0.1"]
