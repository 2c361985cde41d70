import json
from itertools import islice
from random import Random

import pytest

from polyground.answer import Answer, read_answer
from polyground.geometry import PER_MILLE, iou
from polyground.worlds.language import COMPARISONS, QUESTIONS, RELATIONS, corpus, every_template
from polyground.worlds.pretraining import Mix, compare_question, find_question, sample_step
from polyground.worlds.scenes import describe, sample_scene


def test_a_found_object_is_answered_in_the_native_form_with_its_own_box() -> None:
    rng = Random(0)
    for _ in range(50):
        scene = sample_scene(rng)
        prompt, completion, item = find_question(rng, scene)
        answer = read_answer(completion, [PER_MILLE], native="qwen_json")
        assert isinstance(answer, Answer)
        assert describe(item, scene) in prompt
        assert iou(answer.boxes[0].box, item.box) > 0.95


def test_a_listing_names_every_object_of_its_image() -> None:
    scenes, samples = sample_step(Random(1), scenes=6, samples=20, mix=Mix(listing=1, finding=0, several=0, text=0))
    for sample in samples:
        [shown] = sample.images
        assert len(json.loads(sample.completion)) == len(scenes[shown].items)


@pytest.mark.parametrize(
    ("mix", "counts"),
    [
        (Mix(listing=1, finding=1, several=0, text=0), {1}),
        (Mix(listing=0, finding=0, several=1, text=0), {2, 3, 4}),
        (Mix(listing=0, finding=0, several=0, comparing=1, text=0), {2, 3, 4}),
        (Mix(listing=0, finding=0, several=0, text=1), {0}),
    ],
)
def test_each_kind_shows_its_number_of_images(mix: Mix, counts: set[int]) -> None:
    _, samples = sample_step(Random(2), scenes=8, samples=40, mix=mix)
    assert {len(sample.images) for sample in samples} == counts


def test_a_comparison_is_answered_by_the_name_of_the_object_meant_and_by_no_box() -> None:
    rng = Random(6)
    for _ in range(200):
        scenes, prompt, completion, named = compare_question(rng)
        assert "bbox" not in completion
        assert not any(prompt in bank for bank in (*QUESTIONS.values(), *RELATIONS.values()))
        phrase, image, box = named[-1]
        [item] = [item for item in scenes[image - 1].items if item.box == box]
        assert completion == f"The {phrase}."
        assert phrase.endswith(f"{item.colour} {item.shape}")
        for text, marked_image, marked_box in named[:-1]:
            assert text in prompt
            assert marked_box in [item.box for item in scenes[marked_image - 1].items]


def test_what_only_one_image_has_is_not_in_the_other() -> None:
    rng, seen = Random(7), 0
    while seen < 40:
        scenes, prompt, _, named = compare_question(rng)
        if prompt.startswith(("What is in image", "Name the object that only")):
            seen += 1
            phrase, image, _ = named[-1]
            assert phrase not in {describe(item, scenes[2 - image]) for item in scenes[2 - image].items}


def test_comparisons_bring_their_own_scenes_behind_the_shared_ones() -> None:
    scenes, samples = sample_step(Random(8), scenes=5, samples=30, mix=Mix(comparing=1.0))
    own = [k for sample in samples for k in sample.images if k >= 5]
    assert own == list(range(5, len(scenes)))


def test_the_tokenizer_does_not_hang_on_the_comparisons() -> None:
    learned_from = {*every_template(), *islice(corpus(Random(9)), 3000)}
    assert not any("Name the object" in text for text in learned_from)
    assert any(template.startswith("Name the object") for bank in COMPARISONS.values() for template in bank)


def test_nothing_held_out_is_ever_drawn() -> None:
    scenes, _ = sample_step(Random(3), scenes=200, samples=20, mix=Mix(comparing=1.0))
    assert not any(item.look.held_out for scene in scenes for item in scene.items)


def test_the_same_seed_gives_the_same_step() -> None:
    first, second = (sample_step(Random(4), scenes=4, samples=8, mix=Mix()) for _ in range(2))
    assert first == second
