"""Facts about the benchmarks: the arms agree or nothing is timed, and what each computes per step. Nothing about seconds."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("trl")

import arms
import flops
import gate
import grpo_step
import measure
from cases import Case, Cell, build_case

import models
import sampling
from polyground.models import load_model

NAMES = ("stock", "tuned", "ours")
families = pytest.mark.parametrize("family", models.FAMILIES)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def options_of(work: Path, family: str, **changes: object) -> arms.Options:
    folder = models.model_folder(work, "toy", family)
    return replace(arms.Options(folder=folder, work=work), **changes)


def case_of(options: arms.Options, **cell: int | bool) -> Case:
    family = load_model(options.folder).family
    return build_case(Cell(**{"images": 2, "groups": 2, "completion": 3, "side": 56, **cell}), family, options.work / "images")


# Correctness gate ---------------------------------------------------------------------------------------------------------


@families
def test_loss_and_gradients_of_all_arms_agree_before_anything_is_timed(work: Path, family: str) -> None:
    options = options_of(work, family)
    records = gate.gate(NAMES, options, [case_of(options, groups=3, completion=6, prompts=2, ragged=True)])
    assert [(record["beta"], sorted(record["gradients"])) for record in records] == [(b, ["ours", "tuned"]) for b in (0.0, 0.04)]
    for record in records:
        assert max(*record["loss"].values(), *record["gradients"].values()) < 1e-5


class Wrong(arms.Ours):
    """Takes every advantage for twice what it is."""

    name = "wrong"

    def step(self, case: Case, phases: measure.Phases, *, beta: float, rollout: bool = True) -> float:
        doubled = replace(case, advantages=[[2 * value for value in group] for group in case.advantages])
        return super().step(doubled, phases, beta=beta, rollout=rollout)


def test_an_arm_that_computes_something_else_is_not_timed(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arms.ARMS, "wrong", Wrong)
    options = grpo_step.arguments().parse_args(small(work, tmp_path / "out"))
    options.arms = ["tuned", "wrong"]
    with pytest.raises(gate.GateError, match=r"beyond 1e-05"):
        grpo_step.run(options)
    assert not (tmp_path / "out").exists()


def test_in_bfloat16_each_arm_is_compared_with_itself_in_float32(work: Path) -> None:
    options = options_of(work, "qwen3_vl", dtype="bfloat16")
    options = replace(options, folder=models.model_folder(work, "toy", "qwen3_vl", dtype="bfloat16"))
    records = gate.gate(("tuned", "ours"), options, [case_of(options)])
    rounded = [record for record in records if record["dtype"] == "bfloat16"]
    assert [sorted(record["gradients"]) for record in rounded] == [["ours", "tuned"]] * 2
    assert all(1e-4 < distance < 0.1 for record in rounded for distance in record["gradients"].values())


# Counters -----------------------------------------------------------------------------------------------------------------


def counts_of(name: str, options: arms.Options, case: Case) -> measure.Counters:
    [arm] = arms.build_arms([name], options).values()
    counters = measure.Counters()
    with arm.counting(counters):
        arm.step(case, measure.Phases(arm.device, counters=counters), beta=0.04)
    return counters


@families
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_step_of_ours_pays_for_prompt_and_images_once_whatever_the_group_size(work: Path, family: str, groups: int) -> None:
    options = options_of(work, family)
    case = case_of(options, groups=groups)
    found = counts_of("ours", options, case)
    prompt, images, completion = case.prompt_tokens, 2, 3
    assert {what: found.total(what) for what in measure.COUNTED[:4]} == {
        "image_decodes": images,
        "processor_images": images,
        "vision_images": images,
        "vision_images_backward": 0,
    }
    # The prompt's prefill, then all but the last token of each completion.
    assert found.counts["rollout"]["language_tokens"] <= prompt + groups * (completion - 1)
    for phase, what in (
        ("reference", "language_tokens"),
        ("forward", "language_tokens"),
        ("backward", "language_tokens_backward"),
    ):
        assert found.counts[phase][what] <= prompt + groups * completion
    assert found.counts["backward"]["language_tokens"] == 0


@pytest.mark.parametrize(("family", "backward"), [("qwen2_5_vl", 4), ("qwen3_vl", 0)])
def test_a_step_of_stock_trl_pays_for_them_with_every_completion(work: Path, family: str, backward: int) -> None:
    options = options_of(work, family)
    case = case_of(options)
    found = counts_of("stock", options, case)
    rows = 2 * (case.prompt_tokens + 3)
    assert found.counts["preprocess"] == {"image_decodes": 4, "processor_images": 8}
    assert [found.counts[phase]["vision_images"] for phase in ("rollout", "reference", "forward")] == [4, 4, 4]
    # Through the frozen tower of Qwen2.5-VL, whose patch embedding is taken for an input embedding.
    assert found.total("vision_images_backward") == backward
    assert found.counts["rollout"]["language_tokens"] == rows - 2
    # The backward recomputes the forward: gradient checkpointing is TRL's default.
    assert [found.counts[phase]["language_tokens"] for phase in ("reference", "forward", "backward")] == [rows] * 3


def test_tuned_trl_has_no_backward_through_the_vision_tower_and_takes_the_fastest_setting(work: Path) -> None:
    options = options_of(work, "qwen2_5_vl")
    case = case_of(options)
    arm = arms.build_arms(["tuned"], options)["tuned"]
    tried = arm.tune(case, beta=0.0, grid=(1, 8))
    assert set(tried) == {"rows 1", "rows 1, checkpointing", "rows 2", "rows 2, checkpointing"}
    chosen = f"rows {arm.setting()['rows']}" + ", checkpointing" * arm.setting()["gradient_checkpointing"]
    assert tried[chosen] == min(tried.values())
    assert counts_of("tuned", options, case).total("vision_images_backward") == 0


# The commands -------------------------------------------------------------------------------------------------------------


def small(work: Path, out: Path) -> list[str]:
    sizes = "--preset toy --side 56 --images 1 --groups 2 --completion 3 --rounds 1 --grid 2 --no-memory --arms tuned ours"
    return [*sizes.split(), "--work", str(work), "--out", str(out)]


def test_the_command_writes_json_tables_and_a_picture(work: Path, tmp_path: Path) -> None:
    grpo_step.run(grpo_step.arguments().parse_args(small(work, tmp_path / "out")))
    result = json.loads((tmp_path / "out/result.json").read_text())
    [cell] = result["cells"]
    assert (cell["name"], cell["arms"]["tuned"]["setting"]["rows"]) == ("1 x 56 px, G 2, C 3", 2)
    assert all(len(arm["rounds"]) == 1 and arm["seconds"]["step"] > 0 for arm in cell["arms"].values())
    assert cell["flops"]["row_by_row_tokens"] / cell["flops"]["shared_tokens"] > 1.9
    assert "| 1 x 56 px, G 2, C 3 | ours | forward |" in (tmp_path / "out/result.md").read_text()
    assert (tmp_path / "out/result.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_has_corners_where_sharing_has_little_to_share() -> None:
    cells = grpo_step.sweep(448)
    assert {cell.groups for cell in cells} == {1, 2, 4, 8, 16}
    assert {cell.images for cell in cells} == {1, 2, 4, 8}
    assert [cell.name() for cell in cells[-2:]] == ["1 x 112 px, G 8, C 256", "1 x 112 px, G 1, C 256"]


class Server(BaseHTTPRequestHandler):
    """Speaks as much of the OpenAI protocol as is asked of it."""

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = body["n"] * body["max_tokens"] if body["ignore_eos"] else 0
        self._reply({"choices": [{}] * body["n"], "usage": {"completion_tokens": tokens}})

    def _reply(self, answer: dict[str, object]) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/v1"
        found.shutdown()
        thread.join()


def test_every_sampler_decodes_all_tokens_of_all_completions(work: Path, server: str) -> None:
    sizes = "--preset toy --side 56 --images 1 --questions 2 --k 3 --tokens 4 --rounds 1 --warmup 0 --generate-batches 2"
    result = sampling.run(sampling.arguments().parse_args([*sizes.split(), "--work", str(work), "--vllm-url", server]))
    assert list(result["arms"]) == ["ours", "generate x 2", "vllm"]
    assert all(arm["samples_per_second"] > 0 for arm in result["arms"].values())
    assert "| generate x 2 |" in sampling.markdown(result)


# Numbers ------------------------------------------------------------------------------------------------------------------


@families
def test_the_counted_weights_are_those_of_the_model(work: Path, family: str) -> None:
    options = options_of(work, family, lora_r=4)
    model = arms.build_arms(["ours"], options)["ours"].model
    layers = model.get_base_model().model.language_model.layers
    linear = sum(p.numel() for name, p in layers.named_parameters() if name.endswith("base_layer.weight"))
    adapter = sum(p.numel() for name, p in layers.named_parameters() if "lora_" in name)
    decoder = flops.Decoder.of(json.loads((options.folder / "config.json").read_text()))
    assert (decoder.weights, decoder.adapter(4)) == (linear, adapter)


def test_operations_of_an_update_by_hand() -> None:
    decoder = flops.Decoder(layers=1, hidden=2, intermediate=3, query=2, key=1, vocabulary=5)
    # 4 + 2 + 2 + 4 weights of attention and 18 of the MLP; the adapter of rank 1 has 4 + 3 + 3 + 4 + 5 + 5 + 5 = 29.
    assert (decoder.weights, decoder.adapter(1)) == (30, 29)
    # The first layer's query, key and value: 4 + 2 + 2 weights and 3 x 2 of the adapter need no gradient of their input.
    # Three prompt tokens, completions of one and two: 5 tokens, 3 + (2 + 1) + (4 + 3) = 13 pairs, 3 predictions.
    assert flops.shared(decoder, 3, [1, 2], rank=1) == flops.Work(
        forward=5 * (60 + 58) + 4 * 2 * 13 + 2 * 2 * 5 * 3, backward=5 * (60 + 116 - 28) + 8 * 2 * 13 + 2 * 2 * 5 * 3
    )
    # Rows of four and five: 9 tokens, 10 + 15 pairs.
    assert flops.row_by_row(decoder, 3, [1, 2], rank=0) == flops.Work(
        forward=9 * 60 + 4 * 2 * 25 + 2 * 2 * 5 * 3, backward=9 * (60 - 16) + 8 * 2 * 25 + 2 * 2 * 5 * 3
    )


class Products(measure.Phases):
    """Counts what matrix products cost, in the place of time."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _added_product}) as counted:
            yield
        self.seconds[name] += sum(number for kind, number in _all(counted) if kind in ("aten.mm", "aten.addmm", "aten.addmm_"))


def _added_product(into: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: object) -> int:
    """torch counts a product that is added to something, but not one that is added in place."""
    return 2 * a[0] * a[1] * b[1]


def _all(counted: FlopCounterMode) -> list[tuple[str, int]]:
    return [(str(kind), number) for kind, number in counted.get_flop_counts().get("Global", {}).items()]


def test_the_operations_of_an_update_are_those_pytorch_counts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The count takes every token through both factors of the adapter; adding them to the weight first needs fewer operations.
    monkeypatch.setattr("polyground.models.lora._merges", lambda x_SI, weight: False)
    options = options_of(work, "qwen3_vl")
    case = case_of(options, groups=3)
    phases = Products(torch.device("cpu"))
    arms.build_arms(["ours"], options)["ours"].step(case, phases, beta=0.0, rollout=False)
    decoder = flops.Decoder.of(json.loads((options.folder / "config.json").read_text()))
    with_attention = flops.shared(decoder, case.prompt_tokens, [3, 3, 3], rank=options.lora_r)
    before = case.prompt_tokens - 1
    attention = 4 * decoder.query * decoder.layers * (before * (before + 1) / 2 + 3 * (3 * before + 6))
    assert phases.seconds["forward"] == pytest.approx(with_attention.forward - attention, rel=1e-6)
    assert phases.seconds["backward"] == pytest.approx(with_attention.backward - 2 * attention, rel=1e-6)


def test_arms_take_turns_in_both_directions() -> None:
    assert list(measure.alternating("ab", rounds=3)) == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_sums_are_taken_before_the_median() -> None:
    rounds = [{"forward": 1.0, "backward": 9.0}, {"forward": 2.0, "backward": 2.0}, {"forward": 9.0, "backward": 1.0}]
    found = measure.medians(rounds)
    assert (found["forward"], found["backward"], found["update"], found["step"]) == (2.0, 2.0, 10.0, 10.0)


def test_the_tiny_prompt_of_four_images_has_about_1100_tokens(work: Path) -> None:
    folder = models.model_folder(work, "tiny", "qwen3_vl")
    loaded = load_model(folder)
    case = build_case(Cell(images=4, groups=1, completion=1), loaded.family, work / "images")
    assert 1100 <= case.prompt_tokens <= 1200
    assert 6e6 < sum(p.numel() for p in loaded.model.parameters()) < 8e6
