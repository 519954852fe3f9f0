"""Images for training and for evaluation by lists of names, whatever the format of the data."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from gsscale_nerfstudio.errors import GSScaleError

NO_LIST = "list of filenames for split"
"""In what Nerfstudio says where transforms.json has lists for other splits only."""


class ListedImages(DataParser):
    """The images of another dataparser, split by lists. Its own splits do not count.

    Args:
        parser: knows images, cameras and points.
        train_list: text file with the names of training images; None: all others.
        eval_list: the same for evaluation, while training (``val``) and afterwards (``test``).

    Raises:
        GSScaleError: a list cannot be read or has no names.
    """

    def __init__(self, parser: DataParser, train_list: Path | None, eval_list: Path | None) -> None:
        super().__init__(parser.config)
        self.includes_time = parser.includes_time
        self._parser = parser
        self._train = None if train_list is None else NameList(train_list)
        self._eval = None if eval_list is None else NameList(eval_list)

    @property
    def downscale_factor(self) -> Any:
        """The other dataparser's. Nerfstudio sets it to 1 where no image is to be opened."""
        return getattr(self._parser, "downscale_factor", None)

    @downscale_factor.setter
    def downscale_factor(self, factor: Any) -> None:
        self._parser.downscale_factor = factor  # type: ignore[attr-defined]

    def _generate_dataparser_outputs(
        self, split: str = "train", **kwargs: Any
    ) -> DataparserOutputs:
        """Images, masks and cameras of a split; the rest is the same for all.

        Raises:
            GSScaleError: the lists and the images do not go together.
        """
        train, held_out = self._splits
        return train if split == "train" else held_out

    @cached_property
    def _splits(self) -> tuple[DataparserOutputs, DataparserOutputs]:
        images = all_images(self._parser)
        train, held_out = split(images.image_filenames, self._train, self._eval)
        unused = len(images.image_filenames) - len(train) - len(held_out)
        CONSOLE.print(
            f"gsscale: by the lists, {len(train):,} images are for training, {len(held_out):,} for "
            f"evaluation, and {unused:,} are left out",
            highlight=False,
            soft_wrap=True,
        )
        return select(images, train), select(images, held_out)


class NameList:
    """Names of images, from a text file.

    One is on a line; empty lines, and those that begin with #, do not count. A name is the end of
    an image's path, as ``a.jpg`` and ``left/a.jpg``, and can lack the suffix.

    Args:
        path: of the file.

    Raises:
        GSScaleError: it cannot be read, or has no names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Some editors begin a file with a mark of its encoding.
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise GSScaleError(
                f"the list of images {path} cannot be read ({error}); save it as UTF-8 (PowerShell "
                "writes another encoding by >)"
            ) from error
        except OSError as error:
            raise GSScaleError(
                f"the list of images {path} cannot be read ({error}); give the path of a text file "
                "to --pipeline.datamanager.train-list and eval-list, seen from the current folder. "
                "A run that is loaded looks where its config.yml says, from the current folder, too"
            ) from error
        self._names = [Path(line) for line in lines if line and not line.startswith("#")]
        if not self._names:
            raise GSScaleError(
                f"the list of images {path} has no names; write one on each line, or leave it out"
            )

    def find(self, files: Sequence[Path]) -> set[int]:
        """Indices of the images that are named, in ``files``.

        Raises:
            GSScaleError: a name is no image's, or several images'.
        """
        paths = [Path(os.path.abspath(file)) for file in files]  # names can be as long
        ends = defaultdict(list)
        for index, path in enumerate(paths):
            for end in {path.name, path.stem}:
                ends[end].append(index)
        return {self._find(name, ends.get(name.name, []), paths) for name in self._names}

    def _find(self, name: Path, candidates: list[int], paths: list[Path]) -> int:
        """The candidate with the name's folders, too."""
        folders, n = name.parts[:-1], len(name.parts)
        found = [index for index in candidates if paths[index].parts[-n:-1] == folders]
        if not found:
            raise GSScaleError(
                f"{name} in the list of images {self.path} is no image of the data set; names are "
                f"the end of a path, with as many folders as you like, like that of {paths[0]}"
            )
        if len(found) > 1:
            raise GSScaleError(
                f"{name} in the list of images {self.path} can be {paths[found[0]]} or "
                f"{paths[found[1]]}; write the end of the path from a folder on where they differ"
            )
        return found[0]


def split(
    files: Sequence[Path], train: NameList | None, held_out: NameList | None
) -> tuple[list[int], list[int]]:
    """Indices of images for training and for evaluation, in ascending order.

    Args:
        files: all images.
        train, held_out: which are meant; one may be None and stands for all others.

    Raises:
        GSScaleError: a list does not fit the images or the other list, or leaves it nothing.
    """
    first, second = (set() if names is None else names.find(files) for names in (train, held_out))
    others = set(range(len(files))) - first - second
    lists = " and ".join(str(names.path) for names in (train, held_out) if names is not None)
    if both := first & second:
        raise GSScaleError(
            f"{files[min(both)]} is in both lists of images, {lists} ({len(both)} such images); "
            "remove it from one, because held-out images are not to be trained"
        )
    if (train is None or held_out is None) and not others:
        raise GSScaleError(
            f"the list {lists} has all {len(files)} images, so that none is left for "
            f"{'training' if train is None else 'evaluation'}; remove some from it, or give the "
            "other list, too (--pipeline.datamanager.train-list, eval-list)"
        )
    return (
        sorted(others if train is None else first),
        sorted(others if held_out is None else second),
    )


def all_images(parser: DataParser) -> DataparserOutputs:
    """Every image of a data set once, in the order of paths; points and the rest are those of the
    first split that there is.

    A split that a format has no images for is told in a line.
    """
    if isinstance(parser, ColmapDataParser):
        # Its lists, beside images/, would leave images out, and insist on all three being there.
        # And its reconstruction, which can be large, need not be read for each split.
        parser._get_image_indices = lambda files, split: np.arange(len(files))  # type: ignore[method-assign]
        parts = [parser.get_dataparser_outputs(split="train")]
    else:
        parts, missing = [], dict[str, Exception]()
        for name in ("train", "val", "test"):
            try:
                parts.append(parser.get_dataparser_outputs(split=name))
            except (OSError, RuntimeError) as error:
                if name == "train" and NO_LIST not in str(error):
                    raise  # points come with it, too: whatever it is, it is to be mended
                missing[name] = error
        if not parts:
            raise missing["train"]
        for name, reason in missing.items():
            CONSOLE.print(
                f"gsscale: the data set has no images for {name} ({reason}); the lists choose "
                "among the others",
                highlight=False,
                soft_wrap=True,
            )
    images = join([part for part in parts if part.image_filenames] or parts[:1])
    files = images.image_filenames
    place = {file: index for index, file in enumerate(files)}  # an image in several splits: once
    return select(images, [place[file] for file in sorted(place)])


def join(parts: Sequence[DataparserOutputs]) -> DataparserOutputs:
    """Images, masks and cameras of several splits in a row; the rest is the first one's."""
    first = parts[0]
    return replace(
        first,
        image_filenames=_chain([part.image_filenames for part in parts]),
        mask_filenames=_chain([part.mask_filenames for part in parts]),
        cameras=_chain_cameras([part.cameras for part in parts]),
        metadata={
            **first.metadata,
            **{name: _chain([part.metadata[name] for part in parts]) for name in _lists(first)},
        },
    )


def select(outputs: DataparserOutputs, indices: list[int]) -> DataparserOutputs:
    """Some images, with their masks and cameras; the rest as it is."""

    def chosen(values: list[Any] | None) -> Any:
        return None if values is None else [values[index] for index in indices]

    lists = {name: chosen(outputs.metadata[name]) for name in _lists(outputs)}
    return replace(
        outputs,
        image_filenames=chosen(outputs.image_filenames),
        mask_filenames=chosen(outputs.mask_filenames),
        cameras=outputs.cameras[torch.tensor(indices, dtype=torch.long)],
        metadata={**outputs.metadata, **lists},
    )


def _lists(outputs: DataparserOutputs) -> list[str]:
    """Names of metadata with an entry for each image, such as ``depth_filenames``."""
    n = len(outputs.image_filenames)
    return [k for k, v in outputs.metadata.items() if isinstance(v, list) and len(v) == n]


def _chain(lists: list[Any]) -> Any:
    """One list of several, or None if each is."""
    return None if all(each is None for each in lists) else [x for each in lists for x in each]


def _chain_cameras(parts: list[Cameras]) -> Cameras:
    """One [n1 + n2 + ...] of several, [n1], [n2], ...; what is no tensor is the first one's."""

    def chain(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], dict):
            return {key: chain([value[key] for value in values]) for key in values[0]}
        return values[0]

    return Cameras(**{f.name: chain([getattr(c, f.name) for c in parts]) for f in fields(Cameras)})
