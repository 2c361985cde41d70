"""Pretraining of the tiny base: the vision tower alone on a dense loss, then the whole model on next tokens.

The vision tower is run on a whole batch of equal images at once, which computes what the model's own forward computes image
by image; everything else is the model's own code.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from polyground.geometry import PER_MILLE, Box, iou
from polyground.training.pretrain_data import CELLS, IGNORED, MERGE, Encoder, Plan, Rows, Seen, Step, patches, steps_ahead
from polyground.worlds.pretraining import Mix, Sample, find_question
from polyground.worlds.scenes import COLOURS, SHAPES, SIZES, TEXTURES, render, sample_scene

# Shapes: S images, K patches of an image, D values of a patch, M merged tokens of an image, H width, B rows, T tokens.

_CLASSES = (len(COLOURS), len(SHAPES), len(SIZES), len(TEXTURES))
_PER_TOKEN = 1 + sum(_CLASSES) + 4
GAZING_LAYERS = (2, 3)
"""Layers of the text model whose first head is taught to look at the object that a token is about."""


class FastVision:
    """The model's vision tower over a batch of images of one size."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        self.tower = model.model.visual
        half = CELLS // MERGE
        order = np.arange(CELLS * CELLS).reshape(half, MERGE, half, MERGE).transpose(0, 2, 1, 3).reshape(-1)
        self._cell = torch.from_numpy(order.copy())
        rows_columns = torch.stack([self._cell // CELLS, self._cell % CELLS], dim=-1)
        self._cos, self._sin = self.tower.rotary_pos_emb(torch.zeros(1), rows_columns)

    def __call__(self, pixels_SKD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Merged tokens [S * M, H] and the deepstack features, each [S * M, H]."""
        tower = self.tower
        proj = tower.patch_embed.proj
        # Both frames of a still image are equal, so the temporal kernel sums up; a linear map is much faster than a
        # three-dimensional convolution on a CPU.
        hidden = F.linear(pixels_SKD, proj.weight.sum(2).flatten(1), proj.bias)
        hidden = hidden + tower.pos_embed.weight[self._cell]
        deep = []
        for index, block in enumerate(tower.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)]
                deep.append(merger(hidden.flatten(0, 1)))
        return tower.merger(hidden.flatten(0, 1)), deep

    def _attend(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        images, cells, width = hidden.shape
        q, k, v = attention.qkv(hidden).view(images, cells, 3, attention.num_heads, -1).permute(2, 0, 1, 3, 4)
        q, k = apply_rotary_pos_emb_vision(q, k, self._cos, self._sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # At these sizes plain matrix products beat the CPU's flash kernel, above all backward.
        out = (q @ k.transpose(2, 3) * attention.scaling).softmax(-1) @ v
        return attention.proj(out.transpose(1, 2).reshape(images, cells, width))


def normalised(pixels_SKD: np.ndarray) -> Tensor:
    """Bytes as floats in [-1, 1], as the vision tower takes them."""
    return torch.from_numpy(pixels_SKD).float().div_(127.5).sub_(1.0)


def dense_loss(head: nn.Module, merged: Tensor, seen: Seen) -> Tensor:
    """Is an object's centre in this token's square, and then which colour, shape, size, texture and edges; all read linearly.

    One object a token, not one a patch: what attention copies from a token is then a linear map of it, edges included.
    """
    out = head(merged).float().view(*seen.present_SM.shape, _PER_TOKEN)
    present = torch.from_numpy(seen.present_SM)
    loss = 2 * F.binary_cross_entropy_with_logits(out[..., 0], present.float())
    found, classes, edges = out[present], torch.from_numpy(seen.classes_SM4)[present], torch.from_numpy(seen.edges_SM4)[present]
    at = 1
    for column, count in enumerate(_CLASSES):
        loss = loss + F.cross_entropy(found[:, at : at + count], classes[:, column])
        at += count
    return loss + 20 * F.smooth_l1_loss(found[:, at:], edges, beta=0.02)


def text_loss(model: Qwen3VLForConditionalGeneration, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Summed next-token loss of the learned tokens, and the tokens predicted in their place, row after row."""
    labels = torch.from_numpy(rows.labels_BT)[:, 1:]
    learned = labels != IGNORED
    logits, wanted = model.lm_head(hidden[:, :-1][learned]).float(), labels[learned]
    return F.cross_entropy(logits, wanted, reduction="sum"), logits.argmax(-1)


def box_loss(head: nn.Module, hidden: Tensor, rows: Rows) -> Tensor:
    """Summed distance of the boxes read linearly off the tokens that open them, or that end a phrase for their object.

    It says where a phrase points before any figure is written, and is less noisy than figures one by one.
    """
    found = head(hidden.flatten(0, 1)[torch.from_numpy(rows.located_N)]).float()
    return F.smooth_l1_loss(found, torch.from_numpy(rows.boxes_N4), beta=0.02, reduction="sum") / 4


class Gaze:
    """Keeps what the first head of some layers of the text model attends to, for each thread its own."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        self._local = threading.local()
        layers = [model.model.language_model.layers[number] for number in GAZING_LAYERS]
        self._hooks = [layer.self_attn.register_forward_hook(self._keep) for layer in layers]

    def _keep(self, module: nn.Module, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        self._local.seen = [*self.seen, output[1][:, 0]][-len(GAZING_LAYERS) :]

    @property
    def seen(self) -> list[Tensor]:
        """[B, T, T] of each layer watched, from this thread's last `read`; needs eager attention."""
        return getattr(self._local, "seen", [])

    def loss(self, rows: Rows) -> Tensor:
        """Summed -log of the attention that tokens about an object pay to the image token with its centre.

        The mean over the layers watched; of this thread's last `read`, which is forgotten.
        """
        weights, self._local.seen = self.seen, []
        b, t = torch.from_numpy(rows.about_P2).unbind(1)
        at = torch.from_numpy(rows.at_P)
        return -torch.stack([(one[b, t, at].float() + 1e-6).log().sum() for one in weights]).mean()

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def read(model: Qwen3VLForConditionalGeneration, merged: Tensor, deep: list[Tensor], rows: Rows) -> Tensor:
    """[B, T, H] last hidden states of the rows."""
    text = model.model.language_model
    ids = torch.from_numpy(rows.input_ids_BT)
    embeds = text.embed_tokens(ids)
    seen = ids == model.config.image_token_id
    extra: dict[str, Any] = {}
    if len(rows.images):
        shown = torch.from_numpy(rows.images)

        def pick(features: Tensor) -> Tensor:
            return features.view(-1, (CELLS // MERGE) ** 2, features.shape[-1])[shown].flatten(0, 1)

        embeds = embeds.masked_scatter(seen[..., None], pick(merged).to(embeds.dtype))
        extra = {"visual_pos_masks": seen, "deepstack_visual_embeds": [pick(features) for features in deep]}
    positions = torch.from_numpy(rows.positions_3BT)
    return text(inputs_embeds=embeds, position_ids=positions, use_cache=False, **extra).last_hidden_state


class Optimisers:
    """Muon for the weight matrices inside the blocks, AdamW for embeddings, norms, biases and heads."""

    def __init__(self, model: nn.Module, head: nn.Module, box_head: nn.Module, *, kind: str) -> None:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            # The mergers are the largest matrices and few: orthogonalising them costs more than it gains.
            matrix = parameter.ndim == 2 and (".blocks." in name or ".layers." in name)
            # The dense loss does not reach the deepstack mergers: they start with the text model.
            tower = "visual" in name and "deepstack" not in name
            groups.setdefault((matrix and kind == "muon", tower), []).append(parameter)
        groups[(False, True)].extend(head.parameters())
        groups[(False, False)].extend(box_head.parameters())

        def chosen(inner: bool) -> list[dict[str, Any]]:
            return [{"params": found} for (i, _), found in groups.items() if i == inner]

        self.each: list[torch.optim.Optimizer] = [torch.optim.AdamW(chosen(False), betas=(0.9, 0.98), weight_decay=0.01)]
        if kind == "muon":
            self.each.append(torch.optim.Muon(chosen(True), weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self._towers = [[t for (i, t) in groups if i == inner] for inner in (False, True)]

    def step(self, learning_rate: float, *, tower_share: float) -> None:
        """One step; the vision tower's and its head's at a share of the learning rate."""
        for optimiser, towers in zip(self.each, self._towers, strict=False):
            for group, tower in zip(optimiser.param_groups, towers, strict=True):
                group["lr"] = learning_rate * (tower_share if tower else 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def schedule(step: int, steps: int, *, warmup: int) -> float:
    """Share of the peak learning rate: linear up over `warmup` steps, then linear down to a fiftieth."""
    return min((step + 1) / warmup, max(0.02, (steps - step) / max(1, steps - warmup)))


class HeldOutFinds:
    """Fixed questions about scenes never trained on, answered with the right tokens fed in (teacher-forced)."""

    def __init__(self, encoder: Encoder, *, count: int, seed: int) -> None:
        rng = Random(f"held-out/{seed}")
        scenes = [sample_scene(rng) for _ in range(count)]
        asked = [find_question(rng, scene) for scene in scenes]
        self.encoder = encoder
        self.boxes = [item.box for _, _, item in asked]
        self.pixels = normalised(np.stack([patches(render(scene)) for scene in scenes]))
        self.rows = encoder.pad([Sample((k,), prompt, completion) for k, (prompt, completion, _) in enumerate(asked)])

    @torch.no_grad()
    def accuracy(self, model: Qwen3VLForConditionalGeneration, box_head: nn.Module, vision: FastVision) -> tuple[float, float]:
        """Shares of the boxes with IoU of at least 0.5: as written, and as read linearly off the token that opens them."""
        hidden = read(model, *vision(self.pixels), self.rows)
        _, predicted = text_loss(model, hidden, self.rows)
        per_row = (self.rows.labels_BT[:, 1:] != IGNORED).sum(1).tolist()
        good = 0
        for ids, truth in zip(predicted.split(per_row), self.boxes, strict=True):
            text = self.encoder.decode(ids.tolist())
            try:
                numbers = [float(n) for n in text.split('[{"bbox_2d": [')[1].split("]")[0].split(",")]
                good += iou(PER_MILLE.read(numbers), truth) >= 0.5
            except (ValueError, IndexError):
                continue
        pointed = box_head(hidden.flatten(0, 1)[torch.from_numpy(self.rows.located_N)]).float().clamp(0, 1).tolist()
        pairs = zip(pointed, self.boxes, strict=True)
        hits = sum(x0 < x1 and y0 < y1 and iou(Box(x0, y0, x1, y1), truth) >= 0.5 for (x0, y0, x1, y1), truth in pairs)
        return good / len(self.boxes), hits / len(self.boxes)


def save_weights(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Replace the folder's weights in one move; they are stored in bfloat16."""
    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    new = folder / "model.safetensors.new"
    save_file(tensors, new, metadata={"format": "pt"})
    new.replace(folder / "model.safetensors")


class Trainer:
    """Everything that changes while training, and where it is kept."""

    def __init__(self, settings: Any, *, model_folder: Path, work: Path) -> None:
        self.recipe, self.model_folder, self.work = settings, model_folder, work
        torch.manual_seed(settings.seed)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.train()
        self.vision = FastVision(self.model)
        self.gaze = Gaze(self.model)
        self.head = nn.Linear(self.model.config.text_config.hidden_size, _PER_TOKEN)
        self.box_head = nn.Linear(self.model.config.text_config.hidden_size, 4)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self.optimisers = self._fresh_optimisers()
        self.pool = ThreadPoolExecutor(settings.threads, initializer=lambda: torch.set_num_threads(1))
        self.encoder = Encoder(model_folder / "tokenizer.json")
        self.held_out = HeldOutFinds(self.encoder, count=settings.held_out, seed=settings.seed)
        self.curve: list[dict[str, float]] = []

    def _fresh_optimisers(self) -> Optimisers:
        return Optimisers(self.model, self.head, self.box_head, kind=self.settings.optimiser)

    @property
    def settings(self) -> Any:
        """The recipe as it stands at this step."""
        return self.recipe.at(self.step)

    @property
    def checkpoint(self) -> Path:
        """The file that a stopped run goes on from."""
        return self.work / "last.pt"

    def save(self) -> None:
        """Write checkpoint, weights and curve; a kill leaves the checkpoint before this one whole."""
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "box_head": self.box_head.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers.each],
            "at": (self.step, self.samples, self.seconds),
            "curve": self.curve,
        }
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.checkpoint)
        save_weights(self.model, self.model_folder)
        (self.work / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.box_head.load_state_dict(state["box_head"])
        at_the_turn = state["at"][0] == self.settings.vision_steps
        for optimiser, kept in () if at_the_turn else zip(self.optimisers.each, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step, self.samples, self.seconds = state["at"]
        self.curve = state["curve"]

    def learn(self, step: Step, *, seeing_only: bool) -> tuple[float, float]:
        """Accumulate the gradients of one step; returns the dense loss and the loss per learned token."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged, deep = self.vision(normalised(step.pixels_SKD))
            dense = dense_loss(self.head, merged, step.seen)
        if seeing_only:
            dense.backward()
            return dense.item(), 0.0
        s = self.settings
        tokens = sum(int((rows.labels_BT[:, 1:] != IGNORED).sum()) for rows in step.parts)
        boxes = max(1, sum(len(rows.boxes_N4) for rows in step.parts))
        about = max(1, sum(len(rows.at_P) for rows in step.parts))
        # The parts share the images: their gradients with respect to the features are summed before the tower's backward.
        leaves = [features.detach().requires_grad_() for features in (merged, *deep)]

        def learn_part(rows: Rows) -> float:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = read(self.model, leaves[0], leaves[1:], rows)
                loss, _ = text_loss(self.model, hidden, rows)
                away = box_loss(self.box_head, hidden, rows)
                astray = self.gaze.loss(rows)
            (loss / tokens + s.box_weight * away / boxes + s.gaze_weight * astray / about).backward()
            return loss.item()

        # Longest first. Each thread computes on one core: its small operations leave two of them half idle.
        total = sum(self.pool.map(learn_part, reversed(step.parts)))
        torch.autograd.backward([s.dense_weight * dense, merged, *deep], [torch.ones(()), *(leaf.grad for leaf in leaves)])
        return dense.item(), total / tokens

    def run(self, report: Any = None) -> None:
        """Train from where it stands to the end, saving now and then."""
        clock = time.monotonic()
        saved = clock
        parameters = [*self.model.parameters(), *self.head.parameters(), *self.box_head.parameters()]
        while self.step < (whole := (s := self.settings).vision_steps + s.steps):
            seeing = self.step < s.vision_steps
            phase, peak = ("see", s.vision_learning_rate) if seeing else ("read", s.learning_rate)
            first, last = (0, s.vision_steps) if seeing else (s.vision_steps, whole)
            upto = min([last, *(at for at in self.recipe.changes if at > self.step)])
            if self.step == first:
                self.optimisers = self._fresh_optimisers()
            dense_sum = loss_sum = count = 0.0
            for step in steps_ahead(self.plan(phase), self.step, upto):
                dense, loss = self.learn(step, seeing_only=seeing)
                torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], s.max_grad_norm)
                now_share = schedule(self.step - first, last - first, warmup=s.warmup_steps)
                self.optimisers.step(peak * now_share, tower_share=1.0 if seeing else s.tower_share)
                self.step += 1
                self.samples += step.samples
                dense_sum, loss_sum, count = dense_sum + dense, loss_sum + loss, count + 1
                now = time.monotonic()
                self.seconds += now - clock
                clock = now
                if self.step % s.logging_steps == 0 or self.step == last:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        found, pointed = (0.0, 0.0) if seeing else self._held_out()
                    self.curve.append(
                        {
                            "step": self.step,
                            "samples": self.samples,
                            "minutes": round(self.seconds / 60, 2),
                            "dense_loss": round(dense_sum / count, 4),
                            "loss": round(loss_sum / count, 4),
                            "find_accuracy": round(found, 4),
                            "pointed": round(pointed, 4),
                        }
                    )
                    dense_sum = loss_sum = count = 0.0
                    if report is not None:
                        report(self.curve[-1])
                if now - saved > s.save_seconds:
                    self.save()
                    saved = time.monotonic()
            self.save()

    def _held_out(self) -> tuple[float, float]:
        return self.held_out.accuracy(self.model, self.box_head, self.vision)

    def plan(self, phase: str) -> Plan:
        """What the producers are to draw: scenes only while the vision tower learns to `see`, samples of text after that."""
        s = self.settings
        return Plan(
            tokenizer=self.model_folder / "tokenizer.json",
            seed=s.seed,
            scenes=s.vision_scenes if phase == "see" else s.scenes,
            samples=0 if phase == "see" else s.samples,
            parts=s.parts,
            mix=Mix(
                listing=s.mix_listing,
                finding=s.mix_finding,
                naming=s.mix_naming,
                several=s.mix_several,
                choosing=s.mix_choosing,
                text=s.mix_text,
            ),
        )
