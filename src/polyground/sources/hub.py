"""Rows of a data set of the Hugging Face hub, through `datasets`; code that a data set brings along is never run.

An address is `hub:owner/name`, then `@config` and `:split` where the data set has several, or `hub:owner/name/file.json` for one
annotation file of a repository. A local folder in a published layout is read by the same code: `hub:./BLINK@Jigsaw:val`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyground.errors import DataError
from polyground.extras import install_command
from polyground.sources.reading import HUB, stream_rows

HUB_IDS: dict[str, str] = {
    "mig_bench": "hub:Michael4933/MIG-Bench/MIG_data.json",
    "blink": "hub:BLINK-Benchmark/BLINK:val",
    "mmiu": "hub:FanqingM/MMIU-Benchmark:test",
    "ref_l4": "hub:JierunChen/Ref-L4:test",
    "llmseg": "hub:GD-ML/UniVG-R1-data/zero_shot_evaluation/LLMSeg_eval.json",
    "revos": "hub:GD-ML/UniVG-R1-data/zero_shot_evaluation/ReVOS_eval.json",
}
"""Where a source is published on the hub, for those whose repository and file or split were seen there. BLINK brings its images;
for the others unpack the archives beside the annotation (`images.zip`, `images.tar.gz`, one zip per relation of MMIU;
SuleBai/UniVG-R1-zeroshot for the last two) and set images_root. MC-Bench is on the authors' drive, OdinW at GLIPModel/GLIP."""

_ADDRESS = re.compile(r"(?P<name>[^@:]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?")
_FILE = re.compile(r"(?P<repository>[^/]+/[^/]+)/(?P<file>.+\.(?:json|jsonl|parquet))")


@dataclass(frozen=True, slots=True)
class _Address:
    text: str
    name: str
    config: str | None
    split: str | None

    @property
    def is_local(self) -> bool:
        return Path(self.name).exists()


def hub_rows(address: str) -> Iterator[Any]:
    """The rows at an address, in order, one in memory at a time; images stay undecoded, as `{"bytes": …, "path": …}`.

    A data set of several configurations gives all of them, one after the other, unless one is named. Raises DataError, saying
    what to do, where `datasets` is not installed, there is no such data set, configuration or split, or the hub is out of reach.
    """
    place = _parsed(address)
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise DataError(f"{address}: reading from the hub needs datasets; {install_command('train')}") from error
    if found := None if place.is_local else _FILE.fullmatch(place.name):
        yield from (row for _, row in stream_rows(_downloaded(place, found["repository"], found["file"])))
        return
    for config in [place.config] if place.config else _configs(place):
        with _explained(place):
            yield from _rows(place, config)


def _parsed(address: str) -> _Address:
    found = _ADDRESS.fullmatch(address.removeprefix(HUB))
    if found is None or not address.startswith(HUB):
        raise DataError(f"{address}: an address of the hub is hub:owner/name, then @config and :split where there are several")
    place = _Address(address, found["name"], found["config"], found["split"])
    if place.name.startswith(("/", "./", "../")) and not place.is_local:
        raise DataError(f"{address}: there is no folder {place.name}; download the data set there")
    return place


def _configs(place: _Address) -> list[str]:
    from datasets import get_dataset_config_names

    with _explained(place):
        return list(get_dataset_config_names(place.name))


def _rows(place: _Address, config: str) -> Iterator[Any]:
    import datasets

    # A slice ("test[:10]") and the copy of an earlier download are out of a stream's reach.
    offline = datasets.config.HF_HUB_OFFLINE and not place.is_local
    streaming = not offline and "[" not in (place.split or "")
    loaded = datasets.load_dataset(place.name, config, split=place.split, streaming=streaming)
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise DataError(
                f"{place.text}: has the splits {', '.join(map(str, loaded))}; name one, as in {place.text}:{[*loaded][-1]}"
            )
        [loaded] = loaded.values()
    if loaded.features is not None:
        loaded = loaded.cast(datasets.Features({name: _undecoded(kind) for name, kind in loaded.features.items()}))
    yield from loaded


def _undecoded(feature: Any) -> Any:
    """The feature with every image in it left as bytes and path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if isinstance(inner := getattr(feature, "feature", None), datasets.Image):
        return type(feature)(_undecoded(inner))
    return feature


def _downloaded(place: _Address, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _explained(place):
        return Path(hf_hub_download(repository, file, repo_type="dataset"))


@contextmanager
def _explained(place: _Address) -> Iterator[None]:
    """What `datasets` and the hub raise, as a DataError that says what to do."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except (DatasetsError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{place.text}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    said = " ".join(str(error).split())
    said = f"{said[:299]}…" if len(said) > 300 else said
    match error:
        case DatasetNotFoundError():
            return f"no such data set, or it is private or gated ({said}); check the name, or log in with `hf auth login`"
        case DataFilesNotFoundError():
            return f"the data set has no files to read ({said}); name one, as in hub:owner/name/file.json"
        case ConnectionError():
            return f"the hub is out of reach ({said}); download the data set and give its folder instead"
        case RuntimeError() if "script" in said.lower():
            return f"the data set is loaded by its own code, which is never run ({said}); download it and give its files"
        case ValueError():
            return f"no such configuration or split, or a file that does not hold what it should ({said})"
        case _:
            return f"cannot be read ({said}); download the data set and give its folder instead"
