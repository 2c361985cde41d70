"""Facts about recipes: defaults hold, overrides land where they should, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from polyground.config import GrpoConfig, Recipe, RewardConfig, dump_recipe, load_recipe
from polyground.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
NO_RECIPES = {RECIPES / name for name in ("tiny-base.yaml", "results.yaml", "ablations.yaml", "rollouts.yaml")}
"""`tiny-base.yaml` belongs to `pretrain`, the others to `results`; they have keys of their own."""
SHIPPED = sorted(set(RECIPES.glob("*.yaml")) - NO_RECIPES)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nout: runs/small\nsft: {learning_rate: 1e-3, max_steps: 7}\n", encoding="utf-8")
    return path


def value_at(recipe: Recipe, dotted: str) -> Any:
    here: Any = recipe
    for part in dotted.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part] if isinstance(here, dict) else getattr(here, part)
    return here


def test_a_recipe_is_its_file_and_the_defaults(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.sft.learning_rate == 1e-3
    assert loaded.out == Path("runs/small")
    assert loaded.grpo == GrpoConfig()
    assert [reward.name for reward in loaded.rewards] == ["iou", "image", "format"]


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


@pytest.mark.parametrize(
    ("words", "section", "dotted", "expected"),
    [
        pytest.param(["--sft.learning_rate", "1e-4"], None, "sft.learning_rate", 1e-4, id="section-and-key"),
        pytest.param(["--sft.learning_rate=1e-4"], None, "sft.learning_rate", 1e-4, id="equals"),
        pytest.param(["sft.learning_rate=1e-4"], None, "sft.learning_rate", 1e-4, id="no-dashes"),
        pytest.param(["--learning_rate", "1e-4"], "sft", "sft.learning_rate", 1e-4, id="bare-key-of-the-verb"),
        pytest.param(["--learning-rate", "1E-4"], "grpo", "grpo.learning_rate", 1e-4, id="hyphens"),
        pytest.param(["--seed", "5"], "sft", "seed", 5, id="key-of-the-recipe"),
        pytest.param(["--max_steps", "-1"], "sft", "sft.max_steps", -1, id="negative"),
        pytest.param(["--sft.bf16", "true"], None, "sft.bf16", True, id="boolean"),
        pytest.param(["--reject.limit", "null"], None, "reject.limit", None, id="null"),
        pytest.param(["--prompts.instruction", "''"], None, "prompts.instruction", "", id="empty-text"),
        pytest.param(["--name", "2024"], None, "name", "2024", id="a-number-as-text"),
        pytest.param(["--evaluate.ious", "[0.5, 0.9]"], None, "evaluate.ious", (0.5, 0.9), id="a-list"),
        pytest.param(["--sft.report_to", "[]"], None, "sft.report_to", [], id="an-empty-list"),
        pytest.param(["--rewards.0.weight", "0.25"], None, "rewards.0.weight", 0.25, id="inside-a-default-list"),
        pytest.param(
            ["--rewards.0.options.threshold", "5e-1"], None, "rewards.0.options.threshold", 0.5, id="a-number-in-free-options"
        ),
        pytest.param(["--grpo.scale_rewards", "null"], None, "grpo.scale_rewards", "none", id="null-where-trl-says-none"),
        pytest.param(["--seed", "1", "--seed", "2"], None, "seed", 2, id="the-last-one-wins"),
    ],
)
def test_an_override(recipe: Path, words: list[str], section: str | None, dotted: str, expected: object) -> None:
    found = value_at(load_recipe(recipe, words, section=section), dotted)
    assert found == expected
    assert type(found) is type(expected)


def test_an_override_leaves_its_neighbours_alone(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["--sft.lora_r", "4"])
    assert (loaded.sft.lora_r, loaded.sft.max_steps, loaded.sft.learning_rate) == (4, 7, 1e-3)


ENDPOINT = [
    *("--synthesize.teacher", "endpoint"),
    *("--synthesize.teacher_base_url", "http://localhost:8000/v1", "--synthesize.teacher_model", "m"),
]
SEVERAL = ["--synthesize.samples_per_example", "3", "--synthesize.self_consistency", "0.5"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        pytest.param(["--sft.learing_rate", "1"], ["--sft.learing_rate", "did you mean sft.learning_rate?"], id="misspelt"),
        pytest.param(["--learing_rate", "1"], ["--learing_rate", "learning_rate"], id="misspelt-bare"),
        pytest.param(["--beta", "1"], ["--beta", "did you mean grpo.beta?"], id="of-another-section"),
        pytest.param(["--stf.lora_r", "1"], ["--stf.lora_r", "sft.lora_r"], id="misspelt-section"),
        pytest.param(["--sft.zzz", "1"], ["sft.zzz is not a known key", "learning_rate"], id="nothing-like-it"),
        pytest.param(["--sft.lora_r", "0"], ["--sft.lora_r", "= 0", "greater than or equal to 1"], id="below-its-limit"),
        pytest.param(["--sft.lora_r", "many"], ["sft.lora_r = 'many'", "integer"], id="not-a-number"),
        pytest.param(
            ["--reject.min_pass_rate", "0.9", "--reject.max_pass_rate", "0.5"], ["min_pass_rate 0.9 must be below"], id="no-band"
        ),
        pytest.param(["--grpo.epsilon_high", "0.1"], ["must not be below epsilon"], id="clip-upside-down"),
        pytest.param(["--grpo.num_generations", "1"], ["grpo.num_generations = 1"], id="a-group-of-one"),
        pytest.param(
            ["--synthesize.teacher", "endpoint"], ["needs teacher_base_url and teacher_model"], id="teacher-without-address"
        ),
        pytest.param(
            ["--synthesize.teacher_grid", "pixels"], ["teacher_grid pixels is for teacher: endpoint"], id="scripted-grid"
        ),
        pytest.param(["--synthesize.aid", "failed"], ["aid and task_advice are for teacher: endpoint"], id="scripted-aid"),
        pytest.param(["--synthesize.judge", "{}"], ["cannot judge; give judge.base_url and judge.model"], id="scripted-judge"),
        pytest.param(
            [*ENDPOINT, "--synthesize.task_advice", "{diff: 'See <image>'}"],
            ["the text of diff holds <image>"],
            id="advice-image",
        ),
        pytest.param(["--synthesize.self_consistency", "0.5"], ["set samples_per_example to 2 or more"], id="nothing-to-compare"),
        pytest.param(
            [*ENDPOINT, *SEVERAL, "--synthesize.aid", "always"],
            ["every one repeats the annotation"],
            id="compared-with-the-annotation",
        ),
        pytest.param(
            [*ENDPOINT, *SEVERAL, "--synthesize.temperature", "0"], ["the attempts would all be the same"], id="compared-cold"
        ),
        pytest.param(
            [*ENDPOINT, "--synthesize.judge.model", "j"], ["a judge of its own needs base_url and model"], id="judge-nowhere"
        ),
        pytest.param([*ENDPOINT, "--synthesize.judge.api_key_env", "KEY"], ["is for a judge of its own"], id="judge-key"),
        pytest.param([*ENDPOINT, "--synthesize.judge.samples", "2"], ["need a temperature above 0"], id="judge-cold"),
        pytest.param([*ENDPOINT, "--synthesize.judge.min_mark", "6"], ["less than or equal to 5"], id="judge-scale"),
        pytest.param(
            [*ENDPOINT, "--synthesize.judge.min_marks", "4"], ["did you mean synthesize.judge.min_mark?"], id="judge-misspelt"
        ),
        pytest.param(
            [*ENDPOINT, "--synthesize.judge.endpoint.on_budget", "finish"],
            ["finish needs endpoint.on_budget: finish"],
            id="judge-budget",
        ),
        pytest.param(["--synthesize.min_words", "9", "--synthesize.max_words", "3"], ["no reasoning could be kept"], id="words"),
        pytest.param(["--evaluate.ious", "[]"], ["at least one threshold"], id="no-threshold"),
        pytest.param(["--rewards", "[{name: iou, weight: 0}]"], ["weight above 0"], id="worthless"),
        pytest.param(["--rewards", "[{name: iou}, {name: iou}]"], ["repeated: iou"], id="the-same-reward-twice"),
        pytest.param(["--rewards.7.weight", "1"], ["3 entries"], id="past-the-end"),
        pytest.param(["--seed.x", "1"], ["--seed.x", "seed"], id="inside-a-number"),
        pytest.param(["--sft.max_steps.x", "1"], ["sft.max_steps is a single value"], id="inside-a-given-number"),
        pytest.param(["--seed"], ["--seed has no value"], id="no-value"),
        pytest.param(["--seed", "--name"], ["--seed has no value"], id="an-override-for-a-value"),
        pytest.param(["stray"], ["'stray' is not an override"], id="stray"),
        pytest.param(["--seed", "[1"], ["not a YAML value"], id="broken-yaml"),
    ],
)
def test_a_bad_override_is_refused_by_name(recipe: Path, words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, words, section="sft")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("sft: {epochs: 3}", ["small.yaml: sft.epochs is not a known key", "num_train_epochs"], id="unknown-key"),
        pytest.param("sftt: {}", ["sftt is not a known key", "did you mean sft?"], id="unknown-section"),
        pytest.param(
            "data: {train: [{sorce: mig_bench, path: a}]}", ["data.train.0.sorce", "data.train.0.source"], id="in-a-list"
        ),
        pytest.param("sft: {lora_r: 1, lora_r: 2}", ["'lora_r' stands twice", "line 1"], id="a-key-twice"),
        pytest.param("sft: [", ["not valid YAML"], id="broken"),
        pytest.param("- a\n- b", ["a recipe is a mapping"], id="a-list"),
        pytest.param("!!python/object/apply:os.system ['true']", ["not valid YAML"], id="code"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(recipe: Path, text: str, parts: list[str]) -> None:
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_recipe(path)


def test_every_mistake_is_listed_at_once(recipe: Path) -> None:
    recipe.write_text("sft: {lora_r: 0}\ngrpo: {beta: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key", ["--synthesize.api_key_env", "--synthesize.judge.api_key_env"])
def test_a_key_given_in_place_of_its_variable_is_not_repeated(recipe: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [key, "sk-very-secret"])
    assert "secret" not in str(caught.value)
    assert "OPENAI_API_KEY" in str(caught.value)


@given(
    st.builds(
        Recipe,
        name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
        seed=st.integers(0, 2**40),
        grpo=st.builds(
            GrpoConfig,
            beta=st.floats(0, 1e300),
            max_steps=st.integers(-1, 10**6),
            report_to=st.lists(st.text("ab1e-.", max_size=5)),
        ),
        rewards=st.lists(
            st.builds(RewardConfig, name=st.text("abc:.", min_size=1), weight=st.floats(1e-9, 9)),
            min_size=1,
            max_size=3,
            unique_by=lambda r: r.name,
        ),
    )
)
def test_what_is_dumped_is_loaded_back(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_one_reward_may_stand_twice_with_different_options(recipe: Path) -> None:
    twice = "[{name: iou_threshold, options: {threshold: 0.5}}, {name: iou_threshold, options: {threshold: 0.7}}]"
    assert len(load_recipe(recipe, ["--rewards", twice]).rewards) == 2


@pytest.mark.parametrize("name", ["1e1", "1e-4", "007", "null", "no", "3.", "2024-01-01", "a: b", "# a"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(Recipe(name=name)), encoding="utf-8")
    assert load_recipe(path).name == name


def test_a_recipe_cannot_be_edited(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe).sft.max_steps = 3  # type: ignore[misc]


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [
        f.annotation
        for f in model.model_fields.values()
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)
    ]


@pytest.mark.parametrize("section", sections(Recipe), ids=lambda section: section.__name__)
def test_every_knob_is_explained(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize(
    "free",
    [{"dataloader_num_workers": 2}, {"image_cache_mib": 64}, {"report_to": []}, {"report_groups": 0}, {"save_total_limit": 5}],
)
def test_what_only_feeds_logs_and_keeps_may_change_when_a_training_goes_on(free: dict[str, Any]) -> None:
    assert GrpoConfig(**free).deciding() == GrpoConfig().deciding()
    assert GrpoConfig(learning_rate=3e-4, **free).deciding() != GrpoConfig().deciding()


def test_a_study_is_not_taken_for_a_recipe() -> None:
    with pytest.raises(ConfigError, match="polyground results"):
        load_recipe(RECIPES / "results.yaml")
