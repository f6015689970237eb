"""Columns from results in JSON files: of ``bench compare``, ``runtime_demo.check`` and ``meter``, with their origins."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import from_json

from netship.devices.sessions.session import Origin
from netship.runtime_demo.columns import (
    COUNTED,
    Column,
    Fact,
    estimated,
    in_bytes,
    in_ms,
    threads,
)
from netship.targets.errors import UserError
from netship.targets.escapes import counted, magnitude, millions
from netship.targets.files import read_text

_Count = Annotated[FiniteFloat, Field(ge=0, lt=1e18)]
_Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
# An infinite error is null.
_Error = _Count | None
_Text = Annotated[str, Field(max_length=1000)]
_Threads = Annotated[int, Field(gt=0, le=1024)]


class _Runtime(BaseModel):
    title: _Text
    version: _Text
    instructions: _Count | None = None
    core_cycles: _Count = 0.0
    memory_cycles: _Count = 0.0
    max_abs_error: _Count | None = None
    same_top1: bool | None = None
    refused: _Text | None = None
    at_best: bool = False


class _Compared(BaseModel):
    """`bench compare --json`."""

    model: _Text
    cpu: _Text
    board: _Text = "board not recorded"
    threads: _Threads = 1
    meter: _Text
    origin: Literal["estimated"]
    runtimes: list[_Runtime]

    def columns(self, _file: Path) -> list[Column]:
        return [self._column(each) for each in self.runtimes]

    def _column(self, row: _Runtime) -> Column:
        facts = {}
        if row.instructions is not None:
            cycles = row.core_cycles + row.memory_cycles
            where = [self.board, threads(self.threads)]
            where += ["at best"] if row.at_best else []
            facts = estimated(self.cpu, self.meter, row.instructions, cycles, *where)
        if row.max_abs_error is not None:
            text = magnitude(row.max_abs_error)
            facts["error"] = Fact(row.max_abs_error, text, Origin.EMULATED)
        if row.same_top1 is not None:
            same = int(row.same_top1)
            facts["top1"] = Fact(same, f"{same}/1", Origin.EMULATED)
        name = f"{row.title} {row.version}".strip()
        return Column(name, f"{self.model}, {self.cpu}", facts, row.refused or "")


class _Metered(BaseModel):
    """`meter --json`."""

    cpu: _Text
    memory_model: _Text = "board not recorded"
    threads: _Threads = 1
    meter: _Text
    origin: Literal["estimated"]
    instructions: _Count
    core_cycles: _Count
    memory_cycles: _Count

    def columns(self, file: Path) -> list[Column]:
        cycles = self.core_cycles + self.memory_cycles
        # "Raspberry Pi 4, 1.5 GHz"
        where = self.memory_model.rpartition(", ")[0], threads(self.threads)
        facts = estimated(self.cpu, self.meter, self.instructions, cycles, *where)
        return [Column(file.stem, f"python -m meter, {self.cpu}", facts)]


class _MeteredSteps(BaseModel):
    """`meter --json` of a C project."""

    cpu: _Text
    part: _Text | None
    megahertz: _Count | None
    meter: _Text
    origin: Literal["estimated"]
    code: _Text | None
    weights: _Text | None
    instructions: _Count
    cycles: _Count
    milliseconds: _Count | None
    fits: bool | None = None

    def columns(self, file: Path) -> list[Column]:
        facts = estimated(self.cpu, self.meter, self.instructions, self.cycles)
        about = f"python -m meter, {self.cpu}"
        if self.part:
            place = f"{self.part}, code in {self.code}, weights in {self.weights}, meter {self.meter}"
            facts["cycles"] = facts["cycles"]._replace(where=place)
            about += f", {self.part}"
        if self.part and self.milliseconds is not None:
            facts["latency"] = in_ms(self.milliseconds, Origin.ESTIMATED, place)
            about += ", does not fit" if self.fits is False else ""
        return [Column(file.stem, about, facts)]


class _Times(BaseModel):
    median: _Count
    p90: _Count


class _Checked(BaseModel):
    """`runtime_demo.check --json`, of this machine or of a board."""

    bundle: _Text
    target: _Text
    device: Literal["measured on host", "measured on board", "emulated"]
    images: Annotated[int, Field(gt=0, lt=1 << 40)]
    compared: _Text
    threads: _Threads
    passed: bool
    board: dict[str, object] | _Text | None = None
    latency_ms: _Times | None = None
    max_abs_error: _Error
    relative_error: _Error
    cosine: Annotated[FiniteFloat, Field(ge=-1.001, le=1.001)]
    top1_agreement: _Share | None = None
    top5_agreement: _Share | None = None
    labelled: Annotated[int, Field(ge=0, lt=1 << 40)] = 0
    labelled_right: Annotated[int, Field(ge=0)] = 0
    instructions: _Count | None = None
    ram_bytes: _Count | None = None
    flash_bytes: _Count | None = None
    arena_bytes: _Count | None = None

    @model_validator(mode="after")
    def _right_are_labelled(self) -> _Checked:
        if self.labelled_right > self.labelled:
            raise ValueError("labelled_right is more than labelled")
        return self

    def columns(self, file: Path) -> list[Column]:
        origin = self.device
        facts = {"cosine": Fact(self.cosine, f"{self.cosine:.6f}", origin)}
        for name, error in (
            ("error", self.max_abs_error),
            ("of_range", self.relative_error),
        ):
            value = inf if error is None else error
            facts[name] = Fact(value, magnitude(value), origin)
        # Another machine or another time: never in one ratio with what is measured now.
        where = f"{threads(self.threads)}, {self._board() or 'machine not recorded'}, {file}"
        if self.latency_ms:
            facts["latency"] = in_ms(self.latency_ms.median, origin, where)
            facts["p90"] = in_ms(self.latency_ms.p90, origin, where)
        for name, share in (
            ("top1", self.top1_agreement),
            ("top5", self.top5_agreement),
        ):
            if share is not None:
                same = f"{round(share * self.images)}/{self.images}"
                facts[name] = Fact(share, same, origin)
        if self.labelled > 0:
            share = self.labelled_right / self.labelled
            text = f"{self.labelled_right}/{self.labelled}"
            facts["labelled"] = Fact(share, text, origin)
        if self.instructions is not None and isinstance(self.board, str):
            text = millions(self.instructions)
            facts["instructions"] = Fact(self.instructions, text, origin, self.board)
        for name, size, of in (
            ("ram", self.ram_bytes, origin),
            ("flash", self.flash_bytes, origin),
            ("arena", self.arena_bytes, COUNTED),
        ):
            if size is not None:
                facts[name] = in_bytes(size, of)
        checked = "passed" if self.passed else "FAILED"
        inputs = counted(self.images, self.compared.removesuffix("s"))
        about = f"{self.target}, {checked} on {inputs}, from {file.name}"
        return [Column(self.bundle, about, facts)]

    def _board(self) -> str:
        if not isinstance(self.board, dict):
            return self.board or ""
        words = (self.board.get("board"), self.board.get("cpu_model"))
        return ", ".join(word[:80] for word in words if isinstance(word, str) and word)


_FORMS: dict[str, type[_Compared | _Checked | _Metered | _MeteredSteps]] = {
    "runtimes": _Compared,
    "bundle": _Checked,
    "operators": _Metered,
    "steps": _MeteredSteps,
}


def read(path: Path) -> list[Column]:
    """The columns of one file.

    Raises:
        UserError: it is no such file.
    """
    takes = "--peers takes what bench compare, runtime_demo.check or meter printed with --json"
    try:
        found = from_json(read_text(path))
        form = next(form for key, form in _FORMS.items() if key in found)
        return form.model_validate(found).columns(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {takes}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}; {takes}") from None
    except (ValueError, TypeError, StopIteration):
        raise UserError(f"{path}: not a result; {takes}") from None
