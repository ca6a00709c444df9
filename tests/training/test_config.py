import dataclasses

import pytest

from training.config import ConfigError, TrainConfig, load_recipe, recipe_names


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\n  num_steps: 200\nmodel:\n  num_layers: 3\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_loads_and_survives_a_round_trip(name):
    config = load_recipe(name)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_recipes_are_there():
    assert {"shakespeare_bytes", "sotu_bytes", "gpt2_small"} <= set(recipe_names())


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.num_steps=1e4", "run", "num_steps", 10000),
        ("run.num_steps=1_000", "run", "num_steps", 1000),
        ("optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 1e-3),
        ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("optimizer.clip_norm=null", "optimizer", "clip_norm", None),
        ("run.remat=yes", "run", "remat", True),
        ("run.remat=false", "run", "remat", False),
        ("data.text=1984", "data", "text", "1984"),
        ("data.documents=null", "data", "documents", None),
        ("sample.prompts=Once upon", "sample", "prompts", ("Once upon",)),
        ('sample.prompts=["a, b", c]', "sample", "prompts", ("a, b", "c")),
        ("sample.prompts=Is it? = yes", "sample", "prompts", ("Is it? = yes",)),
    ],
)
def test_overrides_get_the_type_of_their_setting(recipe, override, section, key, value):
    got = getattr(getattr(load_recipe(recipe, [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_overrides_win_and_the_rest_stays(recipe):
    config = load_recipe(recipe, {"run.num_steps": 300, "model.embed_dim": "64"})
    assert config.run.num_steps == 300
    assert config.model.fields == {"embed_dim": 64, "num_layers": 3}
    assert config.run.batch_size == TrainConfig().run.batch_size


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.num_step=5", ["unknown setting run.num_step", "did you mean run.num_steps?"]),
        ("num_steps=5", ["unknown setting num_steps", "did you mean run.num_steps?"]),
        ("rum.num_steps=5", ["unknown setting rum.num_steps", "did you mean run.num_steps?"]),
        ("optimizer.batch_size=5", ["unknown setting optimizer.batch_size"]),
        ("model.num_layer=5", ["unknown setting model.num_layer", "did you mean model.num_layers?"]),
        ("model.vocab_size=5", ["unknown setting model.vocab_size"]),
        ("model.family=gtp2", ["model.family='gtp2'", "gpt2", "llama"]),
        ("model.preset=tiny", ["model.preset='tiny'", "small"]),
        ("model.num_layers=two", ["model.num_layers='two'", "a whole number"]),
        ("run.num_steps=ten", ["run.num_steps='ten'", "a whole number"]),
        ("run.num_steps=1.5", ["run.num_steps='1.5'", "a whole number"]),
        ("run.num_steps=0", ["run.num_steps=0", "at least 1"]),
        ("run.num_steps=null", ["run.num_steps='null'", "a whole number"]),
        ("run.remat=perhaps", ["run.remat='perhaps'", "true or false"]),
        ("run.dtype=float16", ["run.dtype='float16'", "float32, bfloat16"]),
        ("run.micro_batch_size=5", ["run.micro_batch_size=5", "divide run.batch_size=32"]),
        ("optimizer.beta2=1", ["optimizer.beta2=1.0", "at least 0 and below 1"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate='nan'", "a number"]),
        ("optimizer.clip_norm=0", ["optimizer.clip_norm=0.0", "above 0"]),
        ("data.validation_fraction=1", ["data.validation_fraction=1.0", "above 0 and below 1"]),
        ("schedule.warmup_steps=200", ["schedule.warmup_steps=200", "below run.num_steps=200"]),
        ("data.documents=pack", ["data.documents='pack'", "packed, separate, stream"]),
        ("schedule.decay=cosin", ["schedule.decay='cosin'", "cosine, linear, constant"]),
        ("run.num_steps", ["'run.num_steps'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
    ],
)
def test_wrong_settings_are_named(recipe, override, words):
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("run: [", ["not a YAML file"]),
        ("- run", ["sections of `key: value`"]),
        ("run: 5", ["run=5", "section"]),
        ("runn:\n  num_steps: 5", ["unknown setting runn", "did you mean run?"]),
        ("run:\n  num_steps: [1]", ["run.num_steps=[1]", "a whole number"]),
        ("run:\n  num_steps: true", ["run.num_steps=True", "a whole number"]),
        ("data:\n  text: {a: 1}", ["data.text={'a': 1}", "text"]),
    ],
)
def test_wrong_recipes_are_named(tmp_path, content, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    for word in words:
        assert word in str(error.value)


def test_a_missing_recipe_lists_those_that_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*gpt2_small"):
        load_recipe(tmp_path / "missing.yaml")


def test_an_empty_recipe_is_all_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert load_recipe(path) == TrainConfig()


def test_every_setting_says_what_it_means():
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(section.type):
            assert field.name == "fields" or field.metadata["meaning"]
