"""Recipes and flags become a configuration, and mistakes are answered with place, value and nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config import synonyms
from megatron_vl.config.fields import FieldSpec, iterate_fields, read_docs
from megatron_vl.config.load import ALIASES, apply_overrides, dump_config, load_config
from megatron_vl.config.presets import TINY
from megatron_vl.config.schema import RunConfig
from megatron_vl.errors import ConfigError

FIELDS = list(iterate_fields())
Writer = Callable[[str], Path]


@pytest.fixture
def recipe(tmp_path: Path) -> Writer:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(*, recipe: Path | None = None, argv: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, argv.split())
    return str(caught.value)


def test_nothing_given_is_the_schema() -> None:
    assert load_config(None, []) == RunConfig()


def test_every_field_is_documented_and_has_a_flag_of_its_own() -> None:
    docs = read_docs()
    assert all(docs.get((spec.section.__name__, spec.path[-1])) for spec in FIELDS)
    flags = [name for spec in FIELDS for name in (spec.flag, *ALIASES.get(spec.dotted, ()))]
    assert len(set(flags)) == len(flags)
    assert set(ALIASES) <= {spec.dotted for spec in FIELDS}


def test_order_is_defaults_then_preset_then_recipe_then_flags(recipe: Writer) -> None:
    path = recipe("model: {preset: tiny, language: {num_layers: 5}}\ntraining: {train_iters: 7, seed: 3}\n")
    config = load_config(path, ["--train-iters", "9"])
    assert config.model.language.num_layers == 5
    assert config.model.language.hidden_size == TINY.language.hidden_size
    assert config.model.vision == TINY.vision
    assert (config.training.train_iters, config.training.seed, config.training.micro_batch_size) == (9, 3, 1)


def test_preset_flag_replaces_the_recipes(recipe: Writer) -> None:
    config = load_config(recipe("model: {preset: qwen_vl_7b, image_size: 112}"), ["--preset", "tiny"])
    assert config.model.language == TINY.language
    assert config.model.image_size == 112


def test_flags_in_megatrons_spelling() -> None:
    argv = (
        "--tensor-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3 --data-path 0.7 A 0.3 B --freeze-LM "
        "--freeze-ViT --no-load-optim --no-use-distributed-optimizer --vision-num-layers 4 --resampler-num-queries 9 "
        "--num-layers 2 --lr 1e-3 --save=out --recompute-granularity full"
    )
    config = load_config(None, argv.split())
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.parallel.virtual_pipeline_model_parallel_size == 3
    assert config.data.data_path == ("0.7", "A", "0.3", "B")
    assert config.training.freeze_language_model and config.training.freeze_vision
    assert not config.training.freeze_resampler
    assert config.checkpoint.no_load_optim and not config.parallel.use_distributed_optimizer
    assert (config.model.vision.num_layers, config.model.language.num_layers) == (4, 2)
    assert config.model.resampler.num_queries == 9
    assert (config.optimizer.lr, config.checkpoint.save) == (1e-3, "out")
    assert config.training.recompute_granularity == "full"


def test_a_retired_key_is_passed_over_only_where_it_says_nothing(recipe: Writer) -> None:
    assert load_config(recipe("data: {vocab_file: null}")) == load_config(None)
    with pytest.raises(ConfigError, match="unknown key data.vocab_file"):
        load_config(recipe("data: {vocab_file: qwen.tiktoken}"))


def test_flags_undo_the_recipe(recipe: Writer) -> None:
    path = recipe("training: {bf16: true, recompute_granularity: full}\ncheckpoint: {save: out}\n")
    config = load_config(path, "--no-bf16 --recompute-granularity none --save none".split())
    assert not config.training.bf16
    assert config.training.recompute_granularity is None and config.checkpoint.save is None


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--train-iter 5", ["--train-iter ", "--train-iters"]),
        ("--train_iters 5", ["--train_iters", "--train-iters"]),
        ("--train-iters=1.5", ["--train-iters", "'1.5'", "an integer"]),
        ("--lr high", ["--lr", "'high'", "a number"]),
        ("--lr nan", ["--lr", "'nan'", "a number"]),
        ("--backend lokal", ["--backend", "'lokal'", "auto, local, transformer_engine", "Did you mean local?"]),
        ("--preset tinny", ["model.preset", "'tinny'", "Did you mean tiny?"]),
        ("--lr", ["--lr", "expected one argument"]),
        ("--bf16 true", ["'true' belongs to no flag"]),
        ("--no-save", ["--no-save"]),
    ],
)
def test_wrong_flags(argv: str, parts: list[str]) -> None:
    text = message(argv=argv)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {train_itres: 5}", [":1:", "training.train_itres", "Did you mean train_iters?"]),
        ("model:\n  preset: tiny\ntrainin: {}", [":3:", "trainin", "Did you mean training?"]),
        ("train-iters: 5", ["train-iters", "Did you mean training.train_iters?"]),
        ("training: {lr: 1}", ["training.lr", "Did you mean optimizer.lr?"]),
        ("training:\n  seed: 1\n  seed: 2", [":3:", "training.seed", "given twice", "line 2"]),
        ("training: 5", ["training", "5 (an integer)", "a mapping"]),
        ("- a", ["a list", "a mapping"]),
        ("training: {train_iters: true}", ["training.train_iters", "true (a boolean)", "an integer"]),
        ("training: {train_iters: 10.0}", ["10.0 (a number)", "an integer"]),
        ("training: {train_iters: '10'}", ["'10' (a string)", "an integer"]),
        ("training: {train_iters: }", ["training.train_iters", "empty", "an integer"]),
        ("training: {bf16: 1}", ["1 (an integer)", "true or false"]),
        ("optimizer: {lr: fast}", ["'fast' (a string)", "a number"]),
        ("optimizer: {lr: .inf}", ["optimizer.lr", "a number"]),
        ("checkpoint: {save: 5}", ["5 (an integer)", "a string", "quotes"]),
        ("logging: {wandb_exp_name: on}", ["true (a boolean)", "a string", "quotes"]),
        ("data: {data_path: a}", ["'a' (a string)", "a list of strings", "[a]"]),
        ("data: {data_path: [[a]]}", ["data.data_path[0]", "['a'] (a list)", "a string"]),
        ("data: {attention_span: rows}", ["'rows'", "row, segment", "Did you mean row?"]),
        ("model: {preset: 7b}", ["model.preset", "'7b'", "tiny, small, qwen_vl_7b"]),
        ("training: [", ["not valid YAML"]),
    ],
)
def test_wrong_recipes(recipe: Writer, text: str, parts: list[str]) -> None:
    path = recipe(text)
    found = message(recipe=path)
    assert all(part in found for part in parts), found
    assert "preset" in text or str(path) in found


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in message(recipe=tmp_path / "none.yaml")


def test_numbers_as_yaml_1_1_reads_them(recipe: Writer) -> None:
    config = load_config(recipe("optimizer: {lr: 1e-4, adam_eps: 1, clip_grad: 0.5}\n"))
    assert (config.optimizer.lr, config.optimizer.adam_eps, config.optimizer.clip_grad) == (1e-4, 1.0, 0.5)
    assert isinstance(config.optimizer.adam_eps, float)


def test_weights_need_no_quotes_and_empty_sections_are_empty(recipe: Writer) -> None:
    config = load_config(recipe("data:\n  data_path: [0.7, a, 1, b]\ntraining:\n"))
    assert config.data.data_path == ("0.7", "a", "1", "b")
    assert config.training == RunConfig().training


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_recipe_is_refused(recipe: Writer, text: str) -> None:
    with pytest.raises(ConfigError, match="the recipe is empty; expected keys"):
        load_config(recipe(text))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("training: {seed: 1\nmodel: [", ":2, column 6: not valid YAML"),
        ("a: b: c", ":1, column 5: not valid YAML: mapping values are not allowed here"),
        ("training:\n\tseed: 1", ":2, column 1: not valid YAML"),
        ("training: {seed: !!python/name:os.system x}", ":1, column 18: not valid YAML: could not determine"),
    ],
)
def test_broken_yaml_is_named_by_file_line_and_column_in_one_line(recipe: Writer, text: str, place: str) -> None:
    path = recipe(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}{place}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--learning-rate", "not a known flag. Did you mean --lr?"),
        ("--language-num-layers", "not a known flag. Did you mean --num-layers?"),
        ("--learning_rate=1e-4", "Did you mean --lr?"),
        ("--max-steps", "Did you mean --train-iters?"),
        ("--output_dir", "Did you mean --save?"),
        ("--save_total_limit", "Did you mean --keep-last?"),
        ("--per_device_train_batch_size", "Did you mean --micro-batch-size?"),
        ("--tp", "Did you mean --tensor-model-parallel-size?"),
        ("--gradient-checkpointing", "Did you mean --recompute-granularity?"),
        ("--num-train-epochs", "counts steps, not epochs"),
        ("--gradient_accumulation_steps", "--global-batch-size"),
        ("--lora-rank", "There are no LoRA adapters"),
        ("--fp16", "bfloat16"),
        ("--train-itres", "Did you mean --train-iters?"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(None, [flag])


@pytest.mark.parametrize("flag", ["--mixture-of-experts", "--hello", "--expert-parallel", "--x"])
def test_what_is_near_to_nothing_gets_no_suggestion(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is not a known flag$"):
        load_config(None, [flag])


def test_every_synonym_stands_for_a_field_and_none_is_one() -> None:
    names = {spec.dotted for spec in iterate_fields()}
    assert set(synonyms.FIELDS.values()) <= names
    assert not {spec.path[-1] for spec in iterate_fields()} & (synonyms.FIELDS.keys() | synonyms.NOTES.keys())
    assert not synonyms.FIELDS.keys() & synonyms.NOTES.keys()


def test_override_by_path() -> None:
    config = apply_overrides(RunConfig(), {"model.vision.num_layers": 3, "training.seed": 7})
    assert (config.model.vision.num_layers, config.training.seed) == (3, 7)
    assert config.model.language == RunConfig().model.language
    with pytest.raises(ConfigError, match="training.sed.*training.seed"):
        apply_overrides(RunConfig(), {"training.sed": 7})


def values_of(spec: FieldSpec) -> st.SearchStrategy[object]:
    text = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
    strategies: dict[type, st.SearchStrategy[object]] = {
        bool: st.booleans(),
        int: st.integers(0, 10**9),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: text.filter(lambda word: word.lower() != "none"),
        tuple: st.lists(text, max_size=4).map(tuple),
    }
    values = st.sampled_from(spec.shape.choices) if spec.shape.choices else strategies[spec.shape.base]
    return st.none() | values if spec.shape.optional else values


CHANGES = st.lists(st.sampled_from([spec for spec in FIELDS if spec.dotted != "model.preset"]), unique=True).flatmap(
    lambda specs: st.fixed_dictionaries({spec.dotted: values_of(spec) for spec in specs})
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(CHANGES)
def test_dump_reads_back_to_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    config = apply_overrides(RunConfig(), changes)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--data-path s3://b/set", "data.data_path: s3://b/set"),
        ("--data-path 0.7 data/a 0.3 gs://b/set", "data.data_path: gs://b/set"),
        ("--valid-data-path s3://b/set", "data.valid_data_path: s3://b/set"),
        ("--save s3://b/run", "checkpoint.save: s3://b/run"),
    ],
)
def test_what_a_run_reads_and_writes_is_on_a_disk(flags: str, expected: str) -> None:
    said = f"{expected} is an address, expected a path on a disk; copy what is there to one (only raw data is read from"
    assert message(argv=flags).startswith(said)
