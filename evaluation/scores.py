"""What pictures scored: a record of each beside it, and one small file of all at a size, of which alone the report is made.

A file says what its pictures have in common (checkpoint, size, steps, arithmetic, judge), and has a record for each
method and prompt. Methods are known by name, settings and weights. What several runs and machines scored adds up; what was
drawn or judged otherwise is refused.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Record = dict[str, np.ndarray]  # of one picture, or of several: stacked
BASE = "base"
TIMES = ("seconds", "base seconds")  # what another run of the same measures otherwise
ANEW = "name another report with -o, or leave those scores aside with --anew"


class Refused(ValueError):
    """What is asked for does not go together: the line that says what and what to do instead."""


def keep(record: Record, file: Path) -> None:
    """A picture's record, all of it or, where this is cut short, nothing."""
    kinds = [(name, value.dtype, value.shape) for name, value in record.items()]
    packed = io.BytesIO()
    np.save(packed, np.array(tuple(record.values()), kinds))
    replace_file(file, packed.getvalue())


def kept(file: Path) -> Record:
    packed = np.load(file)
    return {name: packed[name] for name in packed.dtype.names}


def checksum(file: Path) -> str:
    """Of weights: pictures are drawn, and read, otherwise by others."""
    return f"{zlib.crc32(file.read_bytes()):08x}"


def replace_file(file: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(file)


@dataclass
class Scores:
    """Of pictures at one size. about: what they have in common. tables: the report's, that they are for.

    records: (method's label or "base", prompt) -> what the picture scored. real: of the true renders.
    """

    about: dict[str, str | int]
    tables: list[str] = field(default_factory=list)
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    real: Record = field(default_factory=dict)
    model: str = ""  # as the report calls it

    def prompts(self, labels: list[str]) -> list[int]:
        """Those that there is a picture of by each of these methods."""
        found = [{prompt for own, prompt in self.records if own == label} for label in (BASE, *labels)]
        return sorted(set.intersection(*found))

    def of(self, label: str, prompts: list[int]) -> Record:
        """The records of these prompts, stacked."""
        records = [self.records[label, prompt] for prompt in prompts]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}

    def refuse(self, about: dict[str, str | int], where: Path) -> None:
        """Raise it where these scores are not of pictures that were drawn and judged so. where: theirs."""
        for name in dict.fromkeys((*about, *self.about)):
            own, other = self.about.get(name, "unknown"), about.get(name, "unknown")
            if own != other:
                raise Refused(f"{where} holds scores with {name} {own}, not {other}: {ANEW}")

    def add(self, other: Scores, where: Path) -> None:
        """Another's records. Of what both have, the own ones stay: Refused if they differ in more than time."""
        other.refuse(self.about, where)
        for (label, prompt), record in other.records.items():
            own = self.records.setdefault((label, prompt), record)
            same = own.keys() == record.keys() and all(
                np.array_equal(own[name], record[name]) for name in own if name not in TIMES
            )
            if not same:
                raise Refused(f"{where} holds other scores of {label}, prompt {prompt}, by other code or machines: {ANEW}")
        self.tables += [title for title in other.tables if title not in self.tables]
        self.real = self.real or other.real
        self.model = self.model or other.model

    def write(self, file: Path) -> None:
        """The same scores, the same bytes."""
        keys = sorted(self.records)
        labels = list(dict.fromkeys(label for label, _ in keys if label != BASE))
        about = {**self.about, "model": self.model, "tables": sorted(self.tables), "methods": labels}
        arrays = {f"real/{name}": value for name, value in self.real.items()}
        for group, own in ((BASE, [key for key in keys if key[0] == BASE]), ("made", [key for key in keys if key[0] != BASE])):
            arrays[f"{group}/prompt"] = np.array([prompt for _, prompt in own], np.uint16)
            if group == "made":
                arrays["made/method"] = np.array([labels.index(label) for label, _ in own], np.uint8)
            for name in self.records[own[0]] if own else ():
                arrays[f"{group}/{name}"] = np.stack([self.records[key][name] for key in own])
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_BZIP2) as members:  # with the dates of 1980
            members.writestr(zipfile.ZipInfo("about.json"), json.dumps(about, indent=1, sort_keys=True), zipfile.ZIP_BZIP2)
            for name, array in arrays.items():
                packed = io.BytesIO()
                np.save(packed, array)
                members.writestr(zipfile.ZipInfo(f"{name}.npy"), packed.getvalue(), zipfile.ZIP_BZIP2)
        replace_file(file, archive.getvalue())

    @classmethod
    def read(cls, file: Path) -> Scores:
        with zipfile.ZipFile(file) as archive:
            about = json.loads(archive.read("about.json"))
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name))) for name in names}
        groups: dict[str, Record] = {"real": {}, BASE: {}, "made": {}}
        for name, array in arrays.items():
            group, own = name.split("/", 1)
            groups[group][own] = array
        model, tables, labels = (about.pop(name) for name in ("model", "tables", "methods"))
        own = cls(about, tables, real=groups["real"], model=model)
        for group in (BASE, "made"):
            columns = groups[group]
            prompts, methods = columns.pop("prompt").tolist(), columns.pop("method", None)
            for row, prompt in enumerate(prompts):
                label = BASE if methods is None else labels[methods[row]]
                own.records[label, prompt] = {name: column[row, ...] for name, column in columns.items()}
        return own
