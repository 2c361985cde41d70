"""Write the tables of docs/scaling.md: what runs of a million questions and models of 72B need, computed and not measured.

`python scripts/scaling.py` prints them; `--write` puts them into the page; `--measure` times what of it this machine can show.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyground.answer import Answer, Located
from polyground.config import GrpoConfig, SftConfig
from polyground.geometry import Box
from polyground.memory import Estimate, ModelSize, Prompts, grpo_memory, model_size, sft_memory
from polyground.records import Example
from polyground.shards import Shard, gather, part_folder, part_identity, shard_of
from polyground.storage import RunFolder, atomic_write_rows, atomic_write_text

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"

PEAK = 989e12
"""Dense bfloat16 FLOP/s of an H100 SXM, by its data sheet."""
BANDWIDTH = 3.35e12
"""Bytes/s of its memory."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes/s a GPU can send: within a machine, and through one 400 Gbit/s adapter of its own."""
MFU = 0.4
"""Share of the peak that forwards and backwards are taken to reach."""
DECODING = 0.5
"""Share of the memory's bandwidth that decoding is taken to reach."""

QUESTIONS = 1_000_000
IMAGE_TOKENS, TEXT_TOKENS, COMPLETION, GROUP = 2048, 150, 256, 8
TOGETHER = 64
"""Completions decoded at once."""


def decoder(hidden: int, intermediate: int, layers: int, heads: int, keys: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": 152064,
    }


def qwen2_5(tower: int, *sizes: int) -> dict[str, Any]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": tower, "in_chans": 3, "patch_size": 14}
    return {
        "model_type": "qwen2_5_vl",
        **decoder(*sizes),
        "max_position_embeddings": 128000,
        "vision_config": {**vision, "out_hidden_size": sizes[0]},
    }


MODELS = {
    "7B": qwen2_5(3420, 3584, 18944, 28, 28, 4),
    "32B": qwen2_5(3456, 5120, 27648, 64, 40, 8),
    "72B": qwen2_5(3456, 8192, 29568, 80, 64, 8),
}
"""Sizes of Qwen2.5-VL as its config.json files have them."""


def sizes() -> dict[str, ModelSize]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config))
            found[name] = model_size(Path(folder) / name)
    return found


# ---------------------------------------------------------------- memory

SHARED = ("weights", "adapter", "gradients", "optimiser")
"""What FSDP and ZeRO-3 share out."""


def shared_out(estimate: Estimate, size: ModelSize, devices: int, *, sampling_whole: bool) -> float:
    """Bytes on each of so many devices under FSDP; two decoder layers and what lies outside the layers are whole at a time."""
    weights = estimate.lasting["weights"]
    layer = 2 * (size.parameters - size.vision_parameters - 2 * size.decoder.vocab * size.decoder.hidden) / size.decoder.layers
    outside = weights - layer * size.decoder.layers
    lasting = sum(part / devices if name in SHARED else part for name, part in estimate.lasting.items())
    whole = dict.fromkeys(estimate.phases, outside + 2 * layer)
    if sampling_whole:
        # Rollouts in the training process: the sampler runs on whole weights.
        whole |= dict.fromkeys(("images", "sampling"), float(weights))
    return lasting + max(whole[phase] + sum(parts.values()) for phase, parts in estimate.phases.items())


def memory_table() -> Iterator[tuple[str, ...]]:
    yield ("model", "stage", "one process or DDP", "FSDP over 8", "over 32", "over 64")
    prompts = Prompts(tokens=IMAGE_TOKENS + TEXT_TOKENS, image_tokens=IMAGE_TOKENS)
    common = {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1}
    for name, size in sizes().items():
        sft = sft_memory(size, SftConfig(**common), dtype="bfloat16", prompts=prompts, completion=COMPLETION)
        rl = GrpoConfig(**common, num_generations=GROUP, max_completion_length=COMPLETION)
        grpo = grpo_memory(size, rl, dtype="bfloat16", prompts=prompts)
        rows = (
            ("SFT", sft, False),
            ("GRPO, rollouts in the process", grpo, True),
            ("GRPO, rollouts on a server", update_alone(grpo), False),
        )
        for stage, estimate, whole in rows:
            shared = (shared_out(estimate, size, devices, sampling_whole=whole) for devices in (8, 32, 64))
            yield (name, stage, gib(estimate.total), *map(gib, shared))


def update_alone(estimate: Estimate) -> Estimate:
    phases = {name: parts for name, parts in estimate.phases.items() if name != "sampling"}
    return Estimate(lasting=estimate.lasting, phases=phases, batch=estimate.batch)


# ---------------------------------------------------------------- work


@dataclass(frozen=True, slots=True)
class Work:
    """Of one question, on the average."""

    forward: float
    """FLOP of forwards over known tokens (prompts, the reference)."""
    learnt: float
    """FLOP of forward, recomputation and backward."""
    decoded: float
    """Tokens written one after another."""
    cached: float
    """Tokens of keys and values that each step reads for one completion."""


def vision_flop(size: ModelSize, image_tokens: int) -> float:
    return 2.0 * size.vision_parameters * image_tokens * size.vision.patches_per_token


def text_parameters(size: ModelSize) -> int:
    """That take part in a product for every token: the table of embeddings is only looked up."""
    return size.parameters - size.vision_parameters - size.decoder.vocab * size.decoder.hidden


def synthesis(size: ModelSize, *, attempts: int = 4, image_tokens: int = 4096, words: int = 150) -> Work:
    prompt = image_tokens + TEXT_TOKENS
    forward = vision_flop(size, image_tokens) + 2.0 * text_parameters(size) * prompt
    return Work(forward, 0, attempts * words, prompt + words / 2)


def supervised(size: ModelSize, *, kept: float = 0.7, words: int = 150) -> Work:
    tokens = IMAGE_TOKENS + TEXT_TOKENS + words
    return Work(kept * vision_flop(size, IMAGE_TOKENS), kept * 6.0 * text_parameters(size) * tokens, 0, 0)


def sampling(size: ModelSize, *, n: int = GROUP, words: int = 128, share: float = 1.0) -> Work:
    prompt = IMAGE_TOKENS + TEXT_TOKENS
    forward = vision_flop(size, IMAGE_TOKENS) + 2.0 * text_parameters(size) * prompt
    return Work(share * forward, 0, share * n * words, prompt + words / 2)


def reinforcement(size: ModelSize, *, kept: float = 0.5, words: int = 128) -> Work:
    """One pass over the kept questions with a KL penalty: rollouts, the reference's forward, the packed update."""
    rollouts = sampling(size, words=words, share=kept)
    packed = kept * text_parameters(size) * (IMAGE_TOKENS + TEXT_TOKENS + GROUP * words)
    return Work(rollouts.forward + 2.0 * packed, 6.0 * packed, rollouts.decoded, rollouts.cached)


def hours(size: ModelSize, work: Work) -> float:
    """GPU hours for all questions. Decoding reads the weights once a step, and every completion's keys and values."""
    products = (work.forward + work.learnt) / (PEAK * MFU)
    keys = 4.0 * size.decoder.full_attention_layers * size.decoder.key
    step = (2.0 * size.parameters + TOGETHER * work.cached * keys) / (BANDWIDTH * DECODING)
    return QUESTIONS * (products + work.decoded / TOGETHER * step) / 3600


def work_table() -> Iterator[tuple[str, ...]]:
    yield ("stage", "model", "tokens written", "PFLOP of products", "GPU hours", "days on 64 GPUs")
    found = sizes()
    stages = [("synthesize, 4 attempts of 150 tokens", "72B", synthesis(found["72B"]))]
    for name in ("7B", "72B"):
        size = found[name]
        stages += [
            ("sft, 70 % kept, one pass", name, supervised(size)),
            ("reject, 8 completions of 128 tokens", name, sampling(size)),
            ("grpo, 50 % kept, one pass", name, reinforcement(size)),
        ]
    for stage, name, work in stages:
        total = hours(found[name], work)
        flop = QUESTIONS * (work.forward + work.learnt) / 1e15
        written = f"{QUESTIONS * work.decoded / 1e6:,.0f} M" if work.decoded else "-"
        yield (stage, name, written, f"{flop:,.0f}", f"{total:,.0f}", f"{total / 24 / 64:.1f}")


def tokens_table() -> Iterator[tuple[str, ...]]:
    yield ("group", "prompt once", "row by row", "ratio")
    for images, words in ((1024, 128), (2048, 256), (4096, 256), (8192, 256)):
        prompt = images + TEXT_TOKENS
        once, rows = prompt + GROUP * words, GROUP * (prompt + words)
        yield (f"{prompt:,} + {GROUP} x {words}", f"{once:,}", f"{rows:,}", f"{rows / once:.1f}")


# ---------------------------------------------------------------- what crosses


def exchange_table() -> Iterator[tuple[str, ...]]:
    yield ("model", "what crosses", "bytes", "NVLink, 8 GPUs", "InfiniBand, 64 GPUs", "against")
    for name, size in sizes().items():
        config = GrpoConfig(bf16=True)
        adapter = 4.0 * config.lora_r * size.lora_width
        packed = IMAGE_TOKENS + TEXT_TOKENS + GROUP * COMPLETION
        update = 6.0 * text_parameters(size) * packed / (PEAK * MFU)
        yield (
            name,
            "DDP: gradients of the adapter, once a step",
            gib(adapter),
            seconds(2 * 7 / 8 * adapter / NVLINK),
            seconds(2 * 63 / 64 * adapter / INFINIBAND),
            f"{seconds(update)} for one group's update",
        )
        weights = 2.0 * size.parameters
        yield (
            name,
            "FSDP: weights, for forward, recomputation and backward of each group",
            gib(3 * weights),
            seconds(3 * 7 / 8 * weights / NVLINK),
            seconds(3 * 63 / 64 * weights / INFINIBAND),
            f"{seconds(update)} for one group's update",
        )


# ---------------------------------------------------------------- sharing out


def prompt_lengths(count: int, seed: int) -> list[int]:
    """Two to six images of 256 to 1,024 tokens, and 150 of text: the ragged prompts of several-image grounding."""
    rng = random.Random(seed)
    return [TEXT_TOKENS + sum(rng.randint(256, 1024) for _ in range(rng.randint(2, 6))) for _ in range(count)]


def balance_table() -> Iterator[tuple[str, ...]]:
    from polyground.training.processes import balanced

    yield ("processes x groups each", "as they come", "dealt out by length")
    for processes, each in ((2, 2), (8, 2), (8, 4), (64, 2), (64, 8)):
        plain, dealt = [], []
        for step in range(200):
            costs = prompt_lengths(processes * each, step)
            order = balanced(costs, processes=processes, batch=1)
            plain.append(slowest(costs, range(len(costs)), processes))
            dealt.append(slowest(costs, order, processes))
        yield (f"{processes} x {each}", f"{mean(plain):.2f}", f"{mean(dealt):.2f}")


def slowest(costs: Sequence[float], order: Sequence[int], processes: int) -> float:
    """The largest share of a step in units of the mean; one group at a time to each process in turn."""
    loads = [sum(costs[order[i]] for i in range(p, len(order), processes)) for p in range(processes)]
    return max(loads) / mean(loads)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def shards_table() -> Iterator[tuple[str, ...]]:
    yield ("questions", "parts", "smallest part", "largest part", "largest / mean")
    for questions, parts in ((20_000, 8), (1_000_000, 8), (1_000_000, 64), (1_000_000, 512)):
        found = Counter(shard_of(f"question/{i}", parts) for i in range(questions)).values()
        yield (f"{questions:,}", f"{parts}", f"{min(found):,}", f"{max(found):,}", f"{max(found) * parts / questions:.3f}")


TABLES = {
    "memory": memory_table,
    "tokens": tokens_table,
    "work": work_table,
    "exchange": exchange_table,
    "balance": balance_table,
    "shards": shards_table,
}


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"


def seconds(value: float) -> str:
    return f"{1000 * value:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def markdown(rows: Iterator[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(page: str, tables: dict[str, str]) -> str:
    """The page with each table put between its marks."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{PAGE}: no marks {begin} … {end}")
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


# ---------------------------------------------------------------- measured here


def measure() -> Iterator[str]:
    count = 20_000
    examples = [_example(i) for i in range(10)]
    tracemalloc.start()
    held = [_example(i) for i in range(count)]
    yield f"an example in memory: {tracemalloc.get_traced_memory()[0] / count:,.0f} bytes ({len(held):,} with 4 images each)"
    tracemalloc.stop()
    yield f"an example as a row: {len(json.dumps(examples[0].to_json())):,} bytes"
    since = time.process_time()
    for i in range(count):
        shard_of(f"question/{i}", 64)
    yield f"hashing: {count / (time.process_time() - since):,.0f} keys a second of CPU time"
    with tempfile.TemporaryDirectory() as folder:
        yield _gathering(Path(folder), 100_000)


def _gathering(out: Path, count: int) -> str:
    keys = [f"question/{i}" for i in range(count)]
    texts = ["<think>" + "word " * 40 + "</think>"] * GROUP
    for i in range(4):
        shard = Shard(i, 4)
        part = RunFolder(part_folder(out, "reject", shard), "reject", part_identity({}, shard), own=True)
        rows = ({"key": key, "rollouts": [{"text": text} for text in texts]} for key in shard.of(keys, keys))
        atomic_write_rows(part.file("rollouts.jsonl"), rows)
        part.finish({})
    since = time.process_time()
    gather(RunFolder(out / "reject", "reject", {}), out, "reject", {"rollouts.jsonl": keys}, field="key")
    took = time.process_time() - since
    size = (out / "reject" / "rollouts.jsonl").stat().st_size
    return f"putting {count:,} rows of {size / count:,.0f} bytes together from 4 parts: {took:.1f} s of CPU time"


def _example(number: int) -> Example:
    return Example(
        key=f"question/{number}",
        task="region",
        images=tuple(Path(f"data/images/{number:07d}_{i}.jpg") for i in range(4)),
        question=f"Find the region of image 1 in the other images, number {number}.",
        target=Answer((Located(2, Box(0.1, 0.2, 0.5, 0.75)),)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--measure", action="store_true", help="time hashing, examples and gathering on this machine")
    options = parser.parse_args()
    if options.measure:
        for line in measure():
            print(line, flush=True)
        return
    tables = {name: markdown(table()) for name, table in TABLES.items()}
    if options.write:
        atomic_write_text(PAGE, written(PAGE.read_text(encoding="utf-8"), tables))
    else:
        sys.stdout.write("\n\n".join(f"{name}\n{table}" for name, table in tables.items()) + "\n")


if __name__ == "__main__":
    main()
