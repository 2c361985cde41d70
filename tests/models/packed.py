"""A packed group and its rows one by one, for comparing what a model says of both."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from polyground.batches import pack_group
from polyground.losses import token_scores
from polyground.models import Loaded, Prompt, load_model
from polyground.training.scores import score_group

TEMPERATURE = 0.9
RAGGED = [[70, 71, 72, 73, 74], [80], [65, 66, 67, 68, 69, 70, 71, 72, 73], [90, 91]]
SINGLE = [[70], [71], [72]]


def with_adapter(folder: Path) -> Loaded:
    """With an adapter on every linear layer that changes what the model says."""
    loaded = load_model(folder)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=loaded.family.lora_targets, init_lora_weights=False)
    return Loaded(get_peft_model(loaded.model, lora), loaded.family, loaded.path, loaded.config)


def packed_logprobs(loaded: Loaded, prompt: Prompt, completions: list[list[int]]) -> Tensor:
    features = loaded.family.encode_images(loaded.model, prompt)
    packed = pack_group(prompt, completions)
    return score_group(loaded.model, loaded.family, packed, features, temperature=TEMPERATURE).logprobs_N


def row_logprobs(loaded: Loaded, prompt: Prompt, completions: list[list[int]]) -> Tensor:
    """The same, each completion in a forward pass of its own."""
    rows = []
    for completion in completions:
        ids = torch.tensor(completion)
        after = (torch.arange(len(ids)) + prompt.next_position).expand(3, -1)
        output = loaded.family.forward(
            loaded.model,
            input_ids=torch.cat([prompt.input_ids, ids])[None],
            position_ids=torch.cat([prompt.position_ids, after], dim=1)[:, None],
            features=[loaded.family.encode_images(loaded.model, prompt)],
            use_cache=False,
        )
        rows.append(token_scores(output.logits[0, len(prompt) - 1 : -1], ids, temperature=TEMPERATURE).logprobs_N)
    return torch.cat(rows)


def gradients(loaded: Loaded, logprobs: Tensor) -> dict[str, Tensor]:
    loaded.model.zero_grad()
    weights = torch.linspace(-1, 1, len(logprobs)).exp()
    (logprobs * weights).sum().backward()
    return {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of one weight's gradient, relative to its length."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
