"""Rejection sampling, k completions of each of several questions: this package, transformers' `generate`, and a vLLM server.

    python benchmarks/sampling.py --out benchmarks/results/NAME [--vllm-url http://127.0.0.1:8000/v1]

All decode exactly the same number of tokens per completion at temperature 1, from image files and text to token ids. Every
round asks about pictures nobody has seen, so that no cache of an earlier round helps; the models, servers included, are warm.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from arms import TEMPERATURE, NeverStopping
from cases import QUESTION, write_images
from measure import Phases, alternating, environment
from tables import table

from models import FAMILIES, PRESETS, model_folder
from polyground.conventions import read_config
from polyground.models import Loaded, load_family, load_model
from polyground.records import Message
from polyground.sampling.local import Decoding, LocalSampler

Sample = Callable[[list[list[Path]]], list[int]]
"""Samples for the images of each question; returns the length of every completion."""


def ours(loaded: Loaded, *, k: int, tokens: int, batch_size: int, decoding: Decoding) -> Sample:
    """This package's sampler, which encodes and prefills a question once for all its completions."""
    family = NeverStopping(loaded.family)
    there: Any = replace(loaded, family=family)  # type: ignore[arg-type]
    sampler = LocalSampler(there, batch_size=batch_size, decoding=decoding)

    def sample(questions: list[list[Path]]) -> list[int]:
        messages = [[Message("user", (*images, QUESTION))] for images in questions]
        keys = [str(i) for i in range(len(questions))]
        groups = sampler.sample(messages, n=k, temperature=TEMPERATURE, max_tokens=tokens, seed=random.getrandbits(30), keys=keys)
        return [len(completion.token_ids) for group in groups for completion in group]

    return sample


def generate(folder: Path, *, k: int, tokens: int, per_call: int, dtype: str, device: torch.device) -> Sample:
    """transformers' `generate(num_return_sequences=k)`, `per_call` questions at a time."""
    family: Any = load_family(folder)
    weights = getattr(transformers, read_config(folder)["architectures"][0])
    model = weights.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()
    image = model.config.image_token_id

    def sample(questions: list[list[Path]]) -> list[int]:
        lengths = []
        for start in range(0, len(questions), per_call):
            prompts = [family.encode([Message("user", (*images, QUESTION))]) for images in questions[start : start + per_call]]
            longest = max(map(len, prompts))
            ids = torch.full((len(prompts), longest), family.pad_token_id)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(prompts):
                ids[i, longest - len(prompt) :] = prompt.input_ids
                mask[i, longest - len(prompt) :] = 1
            vision = {name: torch.cat([p.vision[name] for p in prompts]) for name in prompts[0].vision}
            inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).int(), **vision}
            with torch.no_grad():
                found = model.generate(
                    **{name: value.to(device) for name, value in inputs.items()},
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=k,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    suppress_tokens=[image],
                )
            lengths += [found.shape[1] - longest] * len(found)
        return lengths

    return sample


def vllm(url: str, *, k: int, tokens: int) -> Sample:
    """A server that speaks the OpenAI protocol, all questions at once, `n = k` each, the end token ignored."""
    with urllib.request.urlopen(f"{url}/models", timeout=30) as reply:
        model = json.load(reply)["data"][0]["id"]

    def ask(images: Sequence[Path]) -> list[int]:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_uri(path)}} for path in images]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],
            "n": k,
            "temperature": TEMPERATURE,
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/chat/completions", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            answer = json.load(reply)
        # The protocol counts tokens per request, not per completion.
        return [answer["usage"]["completion_tokens"] // len(answer["choices"])] * len(answer["choices"])

    def sample(questions: list[list[Path]]) -> list[int]:
        with ThreadPoolExecutor(max_workers=len(questions)) as pool:
            return [length for lengths in pool.map(ask, questions) for length in lengths]

    return sample


def run(options: argparse.Namespace) -> dict[str, Any]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, family = torch.device(options.device), options.family or PRESETS[options.preset].families[0]
    folder = options.model or model_folder(options.work, options.preset, family, dtype=options.dtype, device=options.device)
    loaded = load_model(folder, dtype=options.dtype, device=device)
    size = {"k": options.k, "tokens": options.tokens}
    samplers: dict[str, Sample] = {"ours": ours(loaded, batch_size=options.batch_size, decoding=options.decoding, **size)}
    for per_call in sorted({min(options.questions, n) for n in options.generate_batches}):
        samplers[f"generate x {per_call}"] = generate(folder, per_call=per_call, dtype=options.dtype, device=device, **size)
    if options.vllm_url:
        samplers["vllm"] = vllm(options.vllm_url.rstrip("/"), **size)
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    stamp = time.time_ns()
    for i, order in enumerate(alternating(list(samplers), rounds=options.warmup + options.rounds)):
        for name in order:
            # The names of arm and time make the pictures this arm's own.
            seeds = [f"{name}-{stamp}-{i}-{j}" for j in range(options.questions)]
            with tempfile.TemporaryDirectory() as temporary:
                pictures = Path(temporary)
                questions = [write_images(pictures, options.images, side=options.side, seed=seed) for seed in seeds]
                gc.collect()
                phases = Phases(device)
                with phases("rollout"):
                    lengths = samplers[name](questions)
            if len(lengths) != options.questions * options.k or set(lengths) != {options.tokens}:
                raise SystemExit(
                    f"{name}: expected {options.questions * options.k} completions of {options.tokens} tokens: {lengths}"
                )
            if i >= options.warmup:
                seconds[name].append(phases.seconds["rollout"])
    samples = options.questions * options.k
    found = {name: {"seconds": s, "samples_per_second": samples / statistics.median(s)} for name, s in seconds.items()}
    prompt = loaded.family.encode(
        [Message("user", (*write_images(options.work, options.images, side=options.side, seed="p"), QUESTION))]
    )
    return {
        "environment": environment(device) | {"model": str(folder), "dtype": options.dtype},
        "setting": size | {"questions": options.questions, "images": options.images, "side": options.side, "prompt": len(prompt)},
        "arms": found,
    }


def markdown(result: dict[str, Any]) -> str:
    base = result["arms"]["ours"]["samples_per_second"]
    rows = [
        (name, f"{arm['samples_per_second']:.2f}", f"{base / arm['samples_per_second']:.1f}x")
        for name, arm in result["arms"].items()
    ]
    lines = [f"- {name}: {value}" for name, value in {**result["environment"], **result["setting"]}.items()]
    return "\n".join(lines) + "\n\n" + table(("sampler", "samples per second", "ours is faster by"), rows) + "\n"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for sampling.json and sampling.md")
    parser.add_argument("--prepare", type=Path, help="only write the model folder here, and say how to serve it")
    parser.add_argument("--model", type=Path, default=None, help="a model folder to sample from, the one that the server serves")
    parser.add_argument("--family", choices=FAMILIES, default=None)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--k", type=int, default=16, help="completions per question")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--images", type=int, default=4, help="images per question")
    parser.add_argument("--side", type=int, default=448, help="pixels of an image's side")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per completion, decoded by all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64, help="completions our sampler decodes together")
    parser.add_argument("--decoding", choices=get_args(Decoding), default="auto", help="how our sampler decodes")
    parser.add_argument(
        "--generate-batches", type=int, nargs="+", default=[1, 4], help="questions per call of generate, each tried"
    )
    parser.add_argument("--vllm-url", default=None, help="a server's address, ending in /v1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "polyground-benchmarks", help="models, images")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.prepare:
        family = options.family or PRESETS[options.preset].families[0]
        folder = model_folder(options.prepare, options.preset, family, dtype=options.dtype)
        limit = json.dumps({"image": options.images})
        print(
            f"{folder}\npython -m vllm.entrypoints.openai.api_server --model {folder} --served-model-name model --dtype"
            f" {options.dtype} --max-model-len 8192 --limit-mm-per-prompt '{limit}' --port 8000"
        )
        return
    if options.out is None:
        parser.error("--out is needed")
    result = run(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "sampling.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


def _data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    main()
