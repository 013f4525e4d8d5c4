"""Configs: defaults, YAML, overrides, and the sentence for each mistake."""

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rlhf.config import Config, dump_yaml, load_config, merge_settings, read_yaml
from rlhf.core.algorithm import ClippedValueLoss, FixedKl, Gae, GroupRelative
from rlhf.core.presets import ALGORITHMS, AlgorithmChoice
from rlhf.errors import ConfigError


class Lora(Config):
    rank: int = 8


class Update(Config):
    learning_rate: float = 1e-3
    max_grad_norm: float | None = 0.5
    schedule: Literal["constant", "linear"] = "constant"


class Quiet(Config):
    type: Literal["quiet"] = "quiet"


class Loud(Config):
    type: Literal["loud"] = "loud"
    volume: float = Field(1.0, ge=0)


class Example(Config):
    algorithm: AlgorithmChoice = "ppo"
    update: Update = Update(learning_rate=5e-5)
    lora: Lora | None = None
    text_or_lora: str | Lora = "x"
    voice: Annotated[Quiet | Loud, Field(discriminator="type")] = Loud(volume=3)
    length: int | Literal["auto"] = 3
    names: list[str] = []
    loras: list[Lora] = []
    columns: dict[str, str] = {"prompt": "question"}
    verbose: bool = False


def load(*overrides: str) -> Example:
    return load_config(Example, None, overrides)


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # a string in YAML 1.1
        ("1E3", 1000.0),
        ("-2.5e+2", -250.0),
        (".5", 0.5),
        ("10_000", 10000.0),
        ("3", 3.0),
    ],
)
def test_numbers_in_overrides(text, value):
    assert load(f"update.learning_rate={text}").update.learning_rate == value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True)])
def test_booleans_in_overrides(text, value):
    assert load(f"verbose={text}").verbose is value


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_in_overrides(text):
    assert load(f"update.max_grad_norm={text}").update.max_grad_norm is None


def test_lists_and_mappings_in_overrides():
    config = load("names=[a, b]", "columns={prompt: q, answer: a}", "loras=[{rank: 1}, {rank: 2}]", "loras.1.rank=5")
    assert config.names == ["a", "b"]
    assert config.columns == {"prompt": "q", "answer": "a"}
    assert [lora.rank for lora in config.loras] == [1, 5]


@pytest.mark.parametrize("word", ["no", "yes", "off", "on", "y", "2024-01-01", "1:30", "=", "a=b"])
def test_words_stay_words(word):
    """YAML 1.1 reads these as booleans, a date and a number in base 60; a column may well be called `no`."""
    assert load(f"names=['{word}']").names == [word]
    assert load(f"text_or_lora={word}").text_or_lora == word


def test_leading_zeros_are_not_octal(yaml_file):
    assert read_yaml(yaml_file("a: 010\n")) == {"a": 10}


def test_an_equals_sign_belongs_to_the_value():
    assert load("text_or_lora=a=b=c").text_or_lora == "a=b=c"


# --- defaults -----------------------------------------------------------------------------------------------------


def test_a_part_keeps_the_rest_of_the_recipes_default():
    update = load("update.max_grad_norm=1").update
    assert update == Update(learning_rate=5e-5, max_grad_norm=1)


def test_a_part_in_yaml_does_too(yaml_file):
    config = load_config(Example, yaml_file("update:\n  schedule: linear\nvoice: {type: loud}\n"))
    assert config.update == Update(learning_rate=5e-5, schedule="linear")
    assert config.voice == Loud(volume=3)


def test_another_type_starts_from_its_own_defaults():
    assert load("voice.type=quiet").voice == Quiet()


def test_a_mapping_is_taken_as_given():
    assert load("columns={answer: a}").columns == {"answer": "a"}


def test_a_default_preset_can_be_changed_in_part():
    algorithm = load("algorithm.epochs=2", "algorithm.advantages.gae_lambda=0.9").algorithm
    assert algorithm.epochs == 2
    assert algorithm.advantages == Gae(discount=0.99, gae_lambda=0.9, standardize="minibatch")
    assert algorithm.value_loss == ClippedValueLoss(coefficient=0.5, clip_range=0.2)


def test_a_preset_in_yaml_can_be_changed_by_overrides(yaml_file):
    file = yaml_file("algorithm: grpo\n")
    algorithm = load_config(Example, file, ["algorithm.surrogate.clip_high=0.28"]).algorithm
    expected = ALGORITHMS["grpo"].surrogate.model_copy(update={"clip_high": 0.28})
    assert algorithm == ALGORITHMS["grpo"].model_copy(update={"surrogate": expected})


def test_a_required_preset_can_be_changed_deep_inside():
    class Needy(Config):
        algorithm: AlgorithmChoice

    kl = load_config(Needy, None, ["algorithm=grpo", "algorithm.kl.coefficient.value=0.001"]).algorithm.kl
    assert kl == ALGORITHMS["grpo"].kl.model_copy(update={"coefficient": FixedKl(value=0.001)})


@pytest.mark.parametrize("order", [("algorithm=grpo", "algorithm.epochs=3"), ("algorithm.epochs=3", "algorithm=grpo")])
def test_whole_groups_are_set_before_their_parts(order):
    algorithm = load(*order).algorithm
    assert isinstance(algorithm.advantages, GroupRelative)
    assert algorithm.epochs == 3


def test_the_later_of_two_equal_keys_counts():
    assert load("update.learning_rate=1", "update.learning_rate=2").update.learning_rate == 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_has_its_name(name):
    assert load(f"algorithm={name}").algorithm == ALGORITHMS[name]


@pytest.mark.parametrize(
    ("changes", "merged"),
    [
        ({"algorithm": {"epochs": 2}}, {"algorithm": {"preset": "grpo", "epochs": 2}, "voice": {"type": "loud"}}),
        ({"algorithm": {"preset": "ppo"}}, {"algorithm": {"preset": "ppo"}, "voice": {"type": "loud"}}),
        ({"algorithm": "ppo"}, {"algorithm": "ppo", "voice": {"type": "loud"}}),
        ({"voice": {"volume": 2}}, {"algorithm": "grpo", "voice": {"type": "loud", "volume": 2}}),
        ({"voice": {"type": "quiet"}}, {"algorithm": "grpo", "voice": {"type": "quiet"}}),
        ({"names": [1]}, {"algorithm": "grpo", "voice": {"type": "loud"}, "names": [1]}),
    ],
)
def test_settings_over_settings(changes, merged):
    assert merge_settings({"algorithm": "grpo", "voice": {"type": "loud"}}, changes) == merged


# --- the resolved file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_resolved_file_reads_back_unchanged(name, yaml_file):
    config = load(f"algorithm={name}", "update.learning_rate=1e-5", "voice.type=quiet", "names=[no, '1e-3']")
    assert load_config(Example, yaml_file(dump_yaml(config))) == config


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.from_regex(r"[-+.0-9eE_:~]{1,8}", fullmatch=True))
)
def test_any_string_reads_back_unchanged(tmp_path_factory, names):
    file = tmp_path_factory.mktemp("configs") / "run.yaml"
    config = Example(names=names)
    file.write_text(dump_yaml(config), encoding="utf-8", newline="")
    assert load_config(Example, file) == config


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_reads_back_unchanged(tmp_path_factory, number):
    file = tmp_path_factory.mktemp("configs") / "run.yaml"
    config = Example(update=Update(learning_rate=number))
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(Example, file).update.learning_rate == number


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load().update.learning_rate = 1.0


def test_field_docstrings_are_descriptions():
    assert "gamma" in (Gae.model_fields["discount"].description or "")


# --- files that cannot be used ------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_config(Example, tmp_path / "nowhere.yaml")


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(Example, tmp_path)


@pytest.mark.parametrize(
    "text", ["update: [1, 2\n", "a: b: c\n", "update:\n\tlearning_rate: 1\n", "x: !!python/object:os.system {}\n"]
)
def test_malformed_yaml_names_file_and_line(yaml_file, text):
    with pytest.raises(ConfigError, match=r"run\.yaml:\d+: not readable as YAML: ") as caught:
        load_config(Example, yaml_file(text))
    assert "\n" not in str(caught.value)


def test_not_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(Example, file)


def test_a_list_is_not_a_config(yaml_file):
    with pytest.raises(ConfigError, match="a config is a mapping; got 'list'; expected key: value"):
        load_config(Example, yaml_file("- a\n- b\n"))


def test_an_empty_file_is_the_defaults(yaml_file):
    assert load_config(Example, yaml_file("# nothing\n")) == Example()


def test_a_key_given_twice_is_not_dropped_silently(yaml_file):
    with pytest.raises(ConfigError, match=r"run\.yaml:3: .*'update' is given twice"):
        load_config(Example, yaml_file("update: {learning_rate: 1}\nverbose: true\nupdate: {schedule: linear}\n"))


# --- mistakes, each in one sentence -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # Unknown keys name the nearest: here, inside unions and presets, in lists, in another group.
        ("algoritm=grpo", "algoritm: unknown key; did you mean 'algorithm'?"),
        ("update.learning_rat=1", "update.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("algorithm.surrogate.clip_hi=3", "algorithm.surrogate.clip_hi: unknown key; did you mean 'clip_high'?"),
        ("algorithm.advantages.lambda=1", "algorithm.advantages.lambda: unknown key; did you mean 'gae_lambda'?"),
        ("lora.rnk=1", "lora.rnk: unknown key; did you mean 'rank'?"),
        ("text_or_lora.rnk=1", "text_or_lora.rnk: unknown key; did you mean 'rank'?"),
        ("loras=[{rank: 1}, {rnk: 2}]", "loras.1.rnk: unknown key; did you mean 'rank'?"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean 'update.learning_rate'?"),
        ("update.q=1", "update.q: unknown key; known keys: learning_rate, max_grad_norm, schedule"),
        ("voice={type: quiet, volume: 2}", "voice.volume: unknown key; it belongs to type 'loud', not 'quiet'"),
        ("algorithm.kl.value=1", "unknown key; did you mean 'algorithm.kl.coefficient.value'?"),
        # Wrong types.
        ("update.learning_rate=fast", "update.learning_rate: got 'fast', expected a valid number"),
        ("update.learning_rate=.nan", "update.learning_rate: got nan, expected a finite number"),
        ("update.learning_rate=null", "update.learning_rate: got null, expected a valid number"),
        ("algorithm.epochs=1.5", "algorithm.epochs: got 1.5, expected a valid integer"),
        ("algorithm.epochs=0", "algorithm.epochs: got 0, expected a value greater than or equal to 1"),
        ("names=a", "names: got 'a', expected a valid list"),
        ("names=[1]", "names.0: got 1, expected a valid string"),
        ("columns={a: [1]}", "columns.a: got [1], expected a valid string"),
        ("update=3", "update: got 3, expected settings (key: value)"),
        ("update.schedule=liner", "got 'liner', expected 'constant' or 'linear'; did you mean 'linear'?"),
        # Unions: one sentence, not one per branch.
        ("length=foo", "length: got 'foo', expected a valid integer or 'auto'"),
        ("text_or_lora=3", "text_or_lora: got 3, expected a valid string or settings (key: value)"),
        ("text_or_lora={rnk: 3}", "text_or_lora.rnk: unknown key; did you mean 'rank'?"),
        ("voice.type=lowd", "voice: type: got 'lowd', expected 'quiet', 'loud'; did you mean 'loud'?"),
        ("voice=loud", "voice: got 'loud', expected settings with a type, such as {type: loud}; types: quiet, loud"),
        ("voice.volume=-1", "voice.volume: got -1, expected a value greater than or equal to 0"),
        # Presets.
        ("algorithm=grppo", "algorithm: no algorithm named 'grppo'; did you mean 'grpo'?"),
        ("algorithm={preset: grpo, epoch: 2}", "algorithm.epoch: unknown key; did you mean 'epochs'?"),
        # Combinations without meaning say what to do instead.
        ("algorithm.value_loss=null", "advantages 'gae' need a critic that nothing trains; set value_loss"),
        ("algorithm.advantages.type=group_relative", "advantages 'group_relative' use no critic"),
        ("algorithm.kl={type: in_loss, estimator: k1}", "algorithm.kl: k1 in the loss has an expected gradient of 0"),
        # Overrides that are none.
        ("foo", "not an override; got 'foo'; expected a.b.c=value. Example: algorithm.epochs=2"),
        ("=3", "not an override"),
        ("update..learning_rate=3", "not an override"),
        ("names=[1", "names: not readable as YAML"),
        ("verbose.loud=1", "verbose: got {'loud': 1}, expected a valid boolean"),
        ("loras.0.rank=1", "loras.0.rank: there is no list to change"),
    ],
)  # fmt: skip
def test_mistakes(override, expected):
    text = message(override)
    assert expected in text
    assert "\n" not in text
    assert "validation error" not in text
    assert "pydantic" not in text


def test_all_mistakes_are_told_at_once():
    text = message("update.learning_rat=1", "algorithm.epochs=x")
    assert "update.learning_rat: unknown key" in text
    assert "algorithm.epochs: got 'x'" in text


def test_the_message_names_the_file_and_says_that_overrides_were_applied(yaml_file):
    file = yaml_file("update: {learning_rate: fast}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: update\.learning_rate: got 'fast'"):
        load_config(Example, file)
    with pytest.raises(ConfigError, match=r"run\.yaml with overrides: verbos: unknown key"):
        load_config(Example, yaml_file("verbose: true\n"), ["verbos=1"])


def test_an_index_beyond_the_list(yaml_file):
    with pytest.raises(ConfigError, match="the list has 1 items; got '1'; expected 0 to 0"):
        load_config(Example, yaml_file("loras: [{rank: 1}]\n"), ["loras.1.rank=2"])


def test_a_value_without_parts(yaml_file):
    with pytest.raises(ConfigError, match="'verbose' is a value without parts; got True"):
        load_config(Example, yaml_file("verbose: true\n"), ["verbose.loud=1"])


def test_a_required_key():
    class Needy(Config):
        path: str

    with pytest.raises(ConfigError, match="path: this key is required"):
        load_config(Needy)


def test_a_required_group_given_in_part_keeps_inner_defaults():
    class Outer(Config):
        inner: Example

    config = load_config(Outer, None, ["inner.update.schedule=linear"])
    assert config.inner.update == Update(learning_rate=5e-5, schedule="linear")
