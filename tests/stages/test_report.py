"""Facts about the report: one file, nothing from the network, nothing that a model wrote taken as markup."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from polyground.answer import Answer, Located
from polyground.config import EvaluateConfig, GrpoConfig, Recipe, RejectConfig, ReportConfig, WorldConfig
from polyground.errors import DataError
from polyground.geometry import Box, iou
from polyground.metrics import paired_difference, summarize
from polyground.records import Completion, Example, Rollout, Score
from polyground.stages import evaluation_splits, read_split, report, world
from polyground.stages.report.pictures import small_uri
from polyground.stages.report.training import Answered, choose_groups, sample_steps
from polyground.storage import RowWriter, RunFolder, atomic_write_json

INJECTED = "<script>alert('from the model')</script>"
SKILL = {"base": 0.25, "sft": 0.5, "rl": 0.8}


def small_recipe(out: Path) -> Recipe:
    sizes = {"train": 0, "rl": 0, "validation": 0, "test": 20, "ood": 4, "perception": 20}
    return Recipe(
        name="trial <b>run</b>",
        out=out,
        world=WorldConfig(**sizes),
        grpo=GrpoConfig(save_steps=20),
        reject=RejectConfig(num_generations=4),
        evaluate=EvaluateConfig(bootstrap=50),
        report=ReportConfig(gallery_size=20),
    )


def answer_of(example: Example, rng: random.Random, *, right: bool) -> Rollout:
    """What an imagined model says: the annotation with a small error, or something else."""
    if example.choices:
        letter = example.target.choice if right else next(c for c in "BACD" if c != example.target.choice)
        text = f"<think>Both have it.</think><answer>{letter}</answer>"
        score = Score(total=float(right), parts={}, iou=float(right), answer=Answer(choice=letter))
        return Rollout(example=example.key, task=example.task, completion=Completion(text=text), score=score)
    [gold] = example.target.boxes
    other = gold.image if right else rng.randint(1, len(example.images))
    box = jittered(gold.box, rng) if right else Box(0.05, 0.1, 0.05 + rng.uniform(0.2, 0.5), 0.55)
    overlap = iou(box, gold.box) if gold.image in (None, other) else 0.0
    text = f"<think>Image 1: red star, blue circle. Image 2: pink ring. {INJECTED} It is in image {other}.</think>"
    text += f'<answer>[{{"image": {other}, "bbox_2d": [1, 2, 3, 4]}}]</answer>'
    score = Score(
        total=overlap,
        parts={"iou": overlap},
        iou=overlap,
        image_correct=None if gold.image is None else float(other == gold.image),
        answer=Answer((Located(other, box),)),
    )
    if not right and rng.random() < 0.2:
        score, text = (
            Score(total=0.0, parts={}, image_correct=score.image_correct and 0.0, unreadable="missing"),
            "somewhere & <b>else",
        )
    return Rollout(example=example.key, task=example.task, completion=Completion(text=text), score=score)


def jittered(box: Box, rng: random.Random) -> Box:
    dx, dy = (box.x1 - box.x0) * rng.uniform(-0.1, 0.1), (box.y1 - box.y0) * rng.uniform(-0.1, 0.1)
    return Box(max(0, box.x0 + dx), max(0, box.y0 + dy), min(1, box.x1 + dx), min(1, box.y1 + dy))


def write_world(recipe: Recipe) -> None:
    world.run(recipe)


def write_evaluation(recipe: Recipe, models: tuple[str, ...] = ("base", "sft", "rl")) -> None:
    """What `evaluate` leaves behind, from imagined answers."""
    tables = {}
    for split in evaluation_splits(recipe):
        examples = read_split(recipe, split)
        answers = {}
        for model in models:
            rng = random.Random(f"{model}/{split}")
            # The base says the same letter whatever it is asked.
            right = [e.target.choice == "B" if model == "base" and e.choices else rng.random() < SKILL[model] for e in examples]
            answers[model] = [answer_of(e, rng, right=r) for e, r in zip(examples, right, strict=True)]
            with RowWriter(recipe.out / "evaluate" / model / f"{split}.jsonl") as rows:
                for rollout in answers[model]:
                    rows.append(rollout.to_json())
        pairs = [(a, b) for a, b in (("base", "sft"), ("sft", "rl"), ("base", "rl")) if a in models and b in models]
        tables[split] = {
            "models": {model: summarize(rows, bootstrap=50).to_json() for model, rows in answers.items()},
            "differences": {f"{b}-{a}": paired_difference(answers[a], answers[b], bootstrap=50).to_json() for a, b in pairs},
        }
    tags = {"headline_iou": 0.5, "bootstrap": 50}
    atomic_write_json(recipe.out / "evaluate" / "results.json", {"tags": tags, "models": list(models), "splits": tables})


def write_training(recipe: Recipe) -> None:
    """Logs and manifests of the stages before."""
    rng = random.Random(0)
    with RowWriter(recipe.out / "sft" / "log.jsonl") as rows:
        for step in range(1, 41):
            loss = 2.5 * 0.92**step + 0.3 + rng.uniform(-0.05, 0.05)
            rows.append({"step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / 41), "grad_norm": 1 + rng.random()})
    with RowWriter(recipe.out / "grpo" / "log.jsonl") as rows:
        for step in range(1, 61):
            gain = 0.4 + 0.3 * step / 60 + rng.uniform(-0.08, 0.08)
            rows.append(
                {"step": step, "reward": gain, "rewards/iou/mean": gain, "rewards/format/mean": 0.97, "rewards/iou/std": 0.1}
                | {"kl": 1e-4 * step, "entropy": 0.8 - step / 200, "completions/mean_length": 50 + rng.random() * 5}
                | {"frac_reward_zero_std": 0.2, "unreadable": 0.02, "completions/clipped_ratio": 0.01}
                | {"unreadable/missing": 0.02, "unreadable/too_many": 0.0, "wrong_image": 0.1, "boxes/area_ratio": 1.1}
                | {"reasoning/mean_length": 120.0, "tasks/diff/reward": gain, "tasks/diff/iou": gain}
            )
    with RowWriter(recipe.out / "grpo" / "warnings.jsonl") as rows:
        rows.append({"step": 40, "kind": "boxes_growing", "text": f"The boxes grew. {INJECTED}"})
    write_rollouts(recipe)
    with RunFolder(recipe.out / "synthesize", "synthesize", {}) as folder:
        folder.finish({"asked": 100, "kept": 84, "dropped": {"wrong_box": 9, "wrong_image": 5, "format": 2}})
    with RunFolder(recipe.out / "reject", "reject", {}) as folder:
        histogram = {"0.000": 30, "0.250": 12, "0.500": 9, "0.750": 14, "1.000": 35}
        folder.finish({"asked": 100, "kept": 35, "pass_rates": histogram})


def write_rollouts(recipe: Recipe) -> None:
    """Two groups of three completions for each of the 60 steps; a third question's rows name no question that is known."""
    examples = [example for example in read_split(recipe, "test") if example.target.boxes]
    first = examples[0]
    second = next(example for example in examples if example.task != first.task)
    with RowWriter(recipe.out / "reject" / "kept.jsonl") as rows:
        for example in (first, second):
            rows.append(example.to_json())
    with RowWriter(recipe.out / "grpo" / "rollouts.jsonl") as rows:
        for step in range(60):
            rng = random.Random(step)
            for example in (first, second):
                for advantage, right in ((0.5, True), (-1.0, False), (0.5, True)):
                    answer = answer_of(example, rng, right=right)
                    rows.append({"step": step, "advantage": advantage, **answer.to_json()})
            rows.append({"step": step, "advantage": 0.0, **replace(answer, example="gone").to_json()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run whose every stage is done."""
    recipe = small_recipe(tmp_path_factory.mktemp("run"))
    write_world(recipe)
    write_evaluation(recipe)
    write_training(recipe)
    return recipe


@pytest.fixture(scope="module")
def html(finished: Recipe) -> str:
    return report.run(finished).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def attributes(self, *names: str) -> Iterator[str]:
        yield from (value or "" for _, attributes in self.found for name, value in attributes.items() if name in names)


def test_the_page_loads_nothing_from_anywhere(html: str) -> None:
    addresses = list(Tags(html).attributes("src", "href", "srcset", "data", "action", "xlink:href"))
    assert addresses
    assert all(address.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for address in addresses)
    assert not re.search(r"url\(|@import|https?://", html)
    assert "link" not in {tag for tag, _ in Tags(html).found}


def test_what_a_model_wrote_is_text(html: str) -> None:
    assert INJECTED not in html
    assert "&lt;script&gt;alert" in html
    assert [tag for tag, _ in Tags(html).found].count("script") == 1


def test_what_the_recipe_says_is_text(html: str) -> None:
    assert "<b>run</b>" not in html
    assert "trial &lt;b&gt;run&lt;/b&gt;" in html


def test_only_the_pages_own_script_may_run(html: str) -> None:
    [policy] = [a["content"] for tag, a in Tags(html).found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_a_model_that_says_one_letter_whatever_is_asked_is_told_of(html: str) -> None:
    assert html.count("answers B to nearly every question") == 2  # in each of the two sets
    assert "<b>base</b> answers B to nearly every question" in html


@pytest.mark.parametrize("section", ["headline", "results", "changes", "errors", "training", "curation", "gallery", "run"])
def test_the_page_has_every_section(html: str, section: str) -> None:
    assert section in [attributes.get("id") for tag, attributes in Tags(html).found if tag == "section"]


@pytest.mark.parametrize(
    "text",
    [
        "Multi-image grounding, in domain",
        "Grounding, out of domain",
        "Multi-image perception",
        "SFT → RL",
        "acc@0.5",
        "questions went better",
        "fixed",
        "Where answers went, from SFT (rows) to RL (columns)",
        "What the answers are",
        "Which image is named",
        "How far boxes overlap",
        "macro average",
        "Reward parts",
        "Entropy",
        "Groups without variance",
        "Unreadable, by reason",
        "Image errors",
        "A warning",
        "raised a warning: see Training",
        "What the policy said while it trained",
        "In the first step",
        "At step 60",
        "advantage -1.00",
        "dropped: wrong box",
        "Right answers among 4 samples",
        "still wrong",
        "torch",
        "num_generations: 4",
        "together",
    ],
)
def test_the_page_says(html: str, text: str) -> None:
    assert text in html


def test_every_task_has_a_row_and_a_macro_average_follows(finished: Recipe) -> None:
    page = report.gather(finished)
    tasks = sorted({example.task for example in read_split(finished, "test")})
    assert [row.task for row in page.tables[0].rows] == [*tasks, "macro average"]


def test_the_headline_is_what_the_evaluation_says(finished: Recipe) -> None:
    from polyground.storage import read_json

    [first, *_] = report.gather(finished).headline
    macro = read_json(finished.out / "evaluate" / "results.json")["splits"]["test"]["models"]["rl"]["macro"]
    assert first.measures["rl"].to_json() == macro["accuracy"]["0.5"]
    assert [(a, b) for a, b, _ in first.gains] == [("base", "sft"), ("sft", "rl"), ("base", "rl")]


def test_the_gallery_draws_the_annotation_on_its_image(finished: Recipe) -> None:
    examples = {example.key: example for example in read_split(finished, "test")}
    samples = [sample for sample in report.gather(finished).gallery if sample.key in examples]
    assert samples
    for sample in samples:
        target = examples[sample.key].target.boxes[0]
        drawn = [i for i, picture in enumerate(sample.pictures, 1) for box in picture.boxes if box.model == "truth"]
        assert drawn == [target.image or 1]


def test_every_pair_of_models_is_compared_task_by_task(finished: Recipe) -> None:
    [first, *_] = report.gather(finished).tables
    assert [(one.first, one.second) for one in first.differences] == [("base", "sft"), ("sft", "rl"), ("base", "rl")]
    for one in first.differences:
        assert one.examples == 20
        assert 0 <= one.better + one.worse <= 20
        assert "macro average" in one.drawing


def test_changes_are_those_of_the_last_step_and_agree_with_the_comparison(finished: Recipe) -> None:
    page = report.gather(finished)
    assert page.changes is not None
    assert (page.changes.first, page.changes.second) == ("sft", "rl")
    by_title = {one.title: one for one in page.changes.splits}
    compared = {table.short: table.differences[1] for table in page.tables}
    for title, one in by_title.items():
        if title != "everything":
            assert (one.gained, one.lost) == (compared[title].better, compared[title].worse)
    assert {sample.outcome for sample in page.changes.gained} <= {"fixed by RL"}
    assert {sample.outcome for sample in page.changes.lost} <= {"lost by RL"}
    assert page.changes.gained


def test_every_error_of_the_last_model_has_an_example(finished: Recipe) -> None:
    errors = report.gather(finished).errors
    assert errors is not None
    assert errors.model == "rl"
    assert errors.examples
    assert all(1 <= len(samples) <= min(count, 1) for _, count, samples in errors.examples)
    counted = sum(count for _, count, _ in errors.examples)
    right = sum(cells[0][0] for *_, cells in errors.tasks.rows)
    assert counted + right == sum(total for _, total, _ in errors.tasks.rows)


def test_without_a_script_nothing_is_hidden(html: str) -> None:
    hidden = [attributes.get("id") for _, attributes in Tags(html).found if "hidden" in attributes]
    assert hidden == ["nothing"]


def test_photographs_are_kept_small_and_drawings_without_loss() -> None:
    rng = random.Random(0)
    photograph = Image.frombytes("RGB", (64, 64), bytes(rng.randrange(256) for _ in range(64 * 64 * 3)))
    assert small_uri(photograph).startswith("data:image/jpeg")
    assert small_uri(Image.new("RGB", (64, 64), "red")).startswith("data:image/png")


def test_a_warning_is_text_beside_its_step(finished: Recipe, html: str) -> None:
    part = report.gather(finished).training[-1]
    assert part.warnings == [(40, f"The boxes grew. {INJECTED}")]
    assert "<b>step 40</b> The boxes grew. &lt;script&gt;" in html


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        pytest.param(None, False, id="a-run-nobody-watched"),
        pytest.param("", True, id="a-watched-run-without-warnings"),
    ],
)
def test_that_nothing_was_seen_is_said_only_where_it_was_looked_for(tmp_path: Path, rows: str | None, said: bool) -> None:
    recipe = small_recipe(tmp_path)
    with RowWriter(recipe.out / "grpo" / "log.jsonl") as log:
        log.append({"step": 1, "loss": 0.1, "reward": 0.5})
    if rows is not None:
        (recipe.out / "grpo" / "warnings.jsonl").write_text(rows)
    html = report.run(recipe).read_text(encoding="utf-8")
    assert ("No warning" in html) == said
    assert 'class="card warnings"' not in html


def test_reasons_that_never_occurred_have_no_curve(finished: Recipe) -> None:
    figures = {figure.title: figure for figure in report.gather(finished).training[-1].figures}
    assert figures["Unreadable, by reason"].names == ["missing"]


def test_a_curve_has_a_legend_unless_the_title_names_it(finished: Recipe) -> None:
    figures = {figure.title: figure.names for figure in report.gather(finished).training[-1].figures}
    assert figures["Entropy"] == []
    assert figures["Completion length"] == ["tokens"]
    assert figures["Reward parts"] == ["iou", "format"]


def test_a_task_has_a_figure_with_the_curves_there_are(finished: Recipe) -> None:
    [figure] = report.gather(finished).training[-1].tasks
    assert (figure.title, figure.names) == ("diff", ["reward", "IoU"])


def test_the_answers_of_a_training_are_the_best_and_the_worst_of_their_groups(finished: Recipe) -> None:
    moments = report.gather(finished).training[-1].moments
    assert [moment.title for moment in moments] == ["In the first step", "At step 40", "At step 60"]
    for moment in moments:
        assert len({sample.task for sample in moment.samples}) == len(moment.samples) == 2
        for sample in moment.samples:
            assert [answer.model for answer in sample.answers] == ["best", "worst"]
            assert [answer.right for answer in sample.answers] == [True, False]
            drawn = {box.model for picture in sample.pictures for box in picture.boxes}
            assert {"truth", "best"} <= drawn <= {"truth", "best", "worst", "asked"}


def test_a_page_without_a_gallery_shows_no_answers_of_the_training_either(finished: Recipe) -> None:
    bare = finished.model_copy(update={"report": ReportConfig(gallery_size=0)})
    assert report.gather(bare).training[-1].moments == []


@pytest.mark.parametrize(
    ("total", "save_steps", "iterations", "expected"),
    [
        pytest.param(0, 20, 1, {}, id="nothing-yet"),
        pytest.param(1, 20, 1, {0: "In the first step"}, id="one-step"),
        pytest.param(50, 100, 1, {0: "In the first step", 49: "At step 50"}, id="no-checkpoint"),
        pytest.param(100, 10, 1, {0: "In the first step", 49: "At step 50", 99: "At step 100"}, id="many-checkpoints"),
        pytest.param(12, 6, 3, {0: "In the first step", 3: "At step 6", 9: "At step 12"}, id="rollouts-that-are-reused"),
    ],
)
def test_the_moments_shown_are_the_start_checkpoints_and_the_end(
    total: int, save_steps: int, iterations: int, expected: dict[int, str]
) -> None:
    assert sample_steps(total, save_steps=save_steps, num_iterations=iterations, size=3) == expected


def group(task: str, *totals: float) -> list[Answered]:
    rollouts = [replace(rollout(right=True), task=task, score=Score(total=total, parts={})) for total in totals]
    return [Answered(one, 0.0) for one in rollouts]


def test_tasks_take_turns_and_groups_that_differ_come_first() -> None:
    groups = {"a": group("diff", 1, 1), "b": group("diff", 1, 0), "c": group("diff", 0, 0), "d": group("region", 0, 0)}
    assert set(choose_groups(groups, size=2, seed=0)) == {"b", "d"}
    assert choose_groups(groups, size=9, seed=0)[2:] == ["a", "c"]


def test_the_same_run_gives_the_same_page(finished: Recipe, html: str) -> None:
    assert report.render(report.gather(finished)) == html


def test_a_run_that_has_not_begun_still_has_a_page(tmp_path: Path) -> None:
    html = report.run(small_recipe(tmp_path)).read_text(encoding="utf-8")
    assert "Nothing has been evaluated yet" in html
    assert "run `polyground grpo`" in html
    assert "Rejection sampling has not finished" in html


def test_a_run_without_rl_says_so(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    write_world(recipe)
    write_evaluation(recipe, models=("base", "sft"))
    html = report.run(recipe).read_text(encoding="utf-8")
    assert "The RL model has not been evaluated yet" in html
    assert "SFT → RL" not in html
    assert "from base (rows) to SFT (columns)" in html


def test_one_model_alone_has_errors_and_no_changes(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    write_world(recipe)
    write_evaluation(recipe, models=("base",))
    page = report.gather(recipe)
    assert page.changes is None
    assert page.errors is not None
    assert page.errors.model == "base"
    assert "Changes are shown once two models have been evaluated" in report.render(page)


def rollout(*, right: bool) -> Rollout:
    score = Score(total=float(right), parts={}, iou=float(right), image_correct=1.0)
    return Rollout(example="e", task="diff", completion=Completion(text=""), score=score)


@pytest.mark.parametrize(
    ("base", "sft", "rl", "expected"),
    [
        pytest.param(True, True, True, "all right", id="all"),
        pytest.param(False, False, False, "still wrong", id="none"),
        pytest.param(False, False, True, "fixed by RL", id="last-turn-up"),
        pytest.param(False, True, True, "fixed by SFT", id="first-turn-up"),
        pytest.param(False, True, False, "lost by RL", id="last-turn-down"),
        pytest.param(True, False, False, "lost by SFT", id="first-turn-down"),
        pytest.param(True, False, True, "fixed by RL", id="down-and-up"),
    ],
)
def test_outcome(base: bool, sft: bool, rl: bool, expected: str) -> None:
    rollouts = {"base": rollout(right=base), "sft": rollout(right=sft), "rl": rollout(right=rl)}
    assert report.outcome(rollouts, threshold=0.5) == expected


def test_the_gallery_takes_outcomes_and_tasks_in_turn() -> None:
    outcomes = {
        f"{kind}/{task}/{i}": (kind, task)
        for kind in ("all right", "still wrong")
        for task in ("diff", "region")
        for i in range(5)
    }
    chosen = report.choose(outcomes, size=4)
    assert {outcomes[key] for key in chosen} == set(outcomes.values())


def test_placeholders_in_a_question_are_named() -> None:
    example = Example(
        key="e",
        task="object_tracking",
        images=(Path("a.png"), Path("b.png")),
        question="<image><image> Find <box> again.",
        target=Answer((Located(2, Box(0, 0, 1, 1)),)),
        question_boxes=(Located(1, Box(0, 0, 1, 1)),),
    )
    assert report.shown_question(example) == "[image 1][image 2] Find [the box in image 1] again."


def test_the_picture_is_an_image_with_all_panels(finished: Recipe, tmp_path: Path) -> None:
    with Image.open(report.write_picture(finished, tmp_path / "deep" / "result.png")) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 900


def test_a_picture_needs_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="polyground evaluate"):
        report.write_picture(small_recipe(tmp_path), tmp_path / "result.png")
