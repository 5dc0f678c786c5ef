"""Measured speeds: what a record says, the class of problems it is about, the file it is in.

One JSON file a device, with the device's identity in it; a record is valid for the versions it
was measured with and for no others. Reading and writing never raise: see
:mod:`adasplash2.cache`.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adasplash2 import cache
from adasplash2.contract import Backend, Config
from adasplash2.failures import may_pass
from adasplash2.problem import Kind, Operand, Problem, RowProblem, said_by

FORMAT = "adasplash2 measured speeds"
SCHEMA = 1
"""Raise it when the meaning of a field changes; files of a higher one are left alone."""

KEPT_VERSIONS = 8
"""Sets of versions whose records stay for one class and backend: a few environments of one user,
without growing for ever."""

FOLDER = "speeds"
"""Of :data:`adasplash2.cache.PARTS`."""

MAX_BYTES = 8 * 2**20
"""Of a file: some 10,000 records."""

MAX_NAME, MAX_TEXT, MAX_ENTRIES = 300, 8192, 64
"""Characters of a name in a record and of a text in its tables, and entries of a table."""

MAX_INTEGER = 2**63 - 1
MILLISECONDS = 1e-6, 1e9
"""Least and most of a time."""

SKEW = datetime.timedelta(days=1)
"""How far the clocks of machines that share a folder may differ. What is dated later is taken for
the oldest, and pushes nothing out."""


def problem_class(problem: Problem | RowProblem) -> str:
    """What a record is about: problems that differ in batch, heads and little in length alike.

    The kind of ``problem`` in words, without what changes little: several kinds are of one class,
    which has all of each. So what is decided by records is decided by kinds. What :data:`_SAID` and
    :data:`_LEFT_OUT` do not know, as an option that is new, makes classes of its own wherever it is
    not its default.

    Lengths count as the nearest power of 4. How sparse the rows will be is not known before a call
    has run: records are measured on several sparsities (:data:`adasplash2.tuning.SHARPNESS`).
    """
    return _in_words(problem.kind)


@functools.lru_cache(maxsize=1024)
def _in_words(kind: Kind) -> str:
    said, values = dict.fromkeys(_SAID, ""), {}
    for name, value, default in said_by(kind):
        values[name] = value
        if name in _SAID:
            said[name] = _SAID[name](value)
        elif name not in _LEFT_OUT and value != default:
            said[name] = f"{name} {value}"
    if "length" in values:
        return " ".join(("rows", *filter(None, said.values())))
    said["head_dim"] += f",{values['head_dim_v']}"
    said["length_q"] += f",{_bucket(values['length_k'])}"
    return " ".join(("attention", *filter(None, said.values())))


def _bucket(length: int) -> int:
    return 4 ** round(math.log(length, 4)) if length > 1 else 1


def _operand(operand: Operand) -> str:
    """Its name, and dtype and size of a mask, which is as large as nothing else."""
    if operand.name != "attn_mask":
        return operand.name
    dtype = str(operand.dtype).removeprefix("torch.")
    return f"attn_mask {dtype} {''.join('n' if wide else '1' for wide in operand.spread)}"


_SAID: dict[str, Callable[[Any], str]] = {
    "dtype": lambda dtype: str(dtype).removeprefix("torch."),
    "head_dim": lambda width: f"head_dim {width}",
    "length": lambda length: f"length {_bucket(length)}",
    "length_q": lambda length: f"lengths {_bucket(length)}",
    "is_causal": lambda is_causal: "causal" if is_causal else "full",
    "window": lambda window: "" if window == (-1, -1) else f"window {_bucket(max(window))}",
    "softcap": lambda softcap: "softcap" if softcap else "",
    "dropout_p": lambda dropout_p: "dropout" if dropout_p else "",
    "operands": lambda operands: " ".join(map(_operand, operands)),
    "page_size": lambda size: f"pages of {_bucket(size)}" if size else "",
    "group": lambda size: f"group {size}",
    "alphas": lambda alphas: "alphas" if alphas else "",
    "alpha": lambda alpha: f"alpha {alpha if alpha in (1.5, 2.0) else 'general'}",
    "needs_grad": lambda needs_grad: "training" if needs_grad else "inference",
}
"""Fields in a class's name, in their order, and how."""

_LEFT_OUT = {
    *("device",),  # has a file of its own
    *("rows", "all_rows", "scale", "bottom_right", "is_exact"),  # change little
    *("head_dim_v", "length_k"),  # said beside another
}


def versions(backend: Backend) -> dict[str, str]:
    """What a record of ``backend`` depends on beside the device."""
    return {"adasplash2": version("adasplash2"), "torch": torch.__version__, **backend.versions()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The fastest configuration of one backend for one class of problems.

    Attributes:
        problem_class: of :func:`problem_class`.
        backend: name of the backend.
        versions: what the measurement depends on, of :func:`versions`.
        config: the fastest configuration.
        milliseconds: of a call with it, geometric mean of the medians over sparsities.
        default_milliseconds: the same for the configuration without tuning.
        measured: when, in UTC.
    """

    problem_class: str
    backend: str
    versions: Mapping[str, str]
    config: Config
    milliseconds: float
    default_milliseconds: float
    measured: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Records of one key replace each other."""
        return self.problem_class, self.backend, json.dumps(dict(self.versions), sort_keys=True)

    @staticmethod
    def parse(data: Any) -> Record:
        """A record as JSON has it.

        Raises:
            ValueError: it is none.
        """
        expected = {field.name for field in fields(Record)}
        if not isinstance(data, dict) or set(data) != expected:
            raise ValueError(f"a record has the fields {', '.join(sorted(expected))}")
        for name in ("problem_class", "backend", "measured"):
            if not _is_name(data[name]):
                raise ValueError(f"{name} is no name: {cache.shown(data[name])}")
        for name in ("milliseconds", "default_milliseconds"):
            least, most = MILLISECONDS
            if type(data[name]) not in (int, float) or not least <= data[name] <= most:
                raise ValueError(f"{name} is no time: {cache.shown(data[name])}")
        for name, is_value in (("versions", _is_text), ("config", _is_setting)):
            table = data[name]
            if (
                not isinstance(table, dict)
                or len(table) > MAX_ENTRIES
                or not all(_is_name(key) and is_value(value) for key, value in table.items())
            ):
                raise ValueError(f"{name} is no table: {cache.shown(table)}")
        if _time(data["measured"]) is None:
            raise ValueError(f"measured is no time: {cache.shown(data['measured'])}")
        return Record(**data)

    @property
    def age(self) -> datetime.datetime:
        """When it was measured; the beginning of time where its date is in the future."""
        time = _time(self.measured)
        latest = datetime.datetime.now(datetime.UTC) + SKEW
        return time if time and time <= latest else datetime.datetime.fromtimestamp(0, datetime.UTC)


def _is_text(value: object) -> bool:
    """Whether it can be shown: no control characters, no halves of characters."""
    return type(value) is str and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _is_name(value: object) -> bool:
    return _is_text(value) and len(str(value)) <= MAX_NAME


def _is_setting(value: object) -> bool:
    return _is_text(value) or (type(value) is int and abs(value) <= MAX_INTEGER)


def _time(text: str) -> datetime.datetime | None:
    """A point in time as :func:`now` writes it."""
    try:
        time = datetime.datetime.fromisoformat(text)
        return time.astimezone(datetime.UTC) if time.tzinfo else None
    except (ValueError, OverflowError):
        return None


def now() -> str:
    """For :attr:`Record.measured`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def identity(device: torch.device) -> Mapping[str, str]:
    """What tells a device from others, and is the same for its equals in one machine."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
        }
    if device.type == "cpu":
        return {"type": "cpu", "name": _processor(), "architecture": platform.machine()}
    return {"type": device.type}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError as error:
        if may_pass(error):  # else the name would be another one in this process
            raise
    return platform.processor() or "unknown"


class _NotOurs(ValueError):
    """The file holds something else than records of this device."""


class _Newer(ValueError):
    """The file belongs to a later release."""


class Store:
    """The records of one device: those of its file, and those added in this process.

    Raises:
        OSError: they cannot be read now, for a reason that may pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.identity = identity(device)
        name = "-".join(
            self.identity[part] for part in ("type", "name", "capability") if part in self.identity
        )
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
        tag = hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode()).hexdigest()
        self.path = cache.directory() / FOLDER / f"{slug}-{tag[:8]}.json"
        self._records = {record.key: record for record in self._read()}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def names(self, problem_class: str) -> set[str]:
        """Backends with a record of this class, of whatever versions."""
        return {r.backend for r in self._records.values() if r.problem_class == problem_class}

    def find(self, problem_class: str, backend: Backend) -> Record | None:
        """The record of this class that holds for ``backend`` as it is here and now."""
        if backend.name not in self.names(problem_class):
            return None
        key = problem_class, backend.name, json.dumps(versions(backend), sort_keys=True)
        return self._records.get(key)

    def add(self, records: Iterable[Record]) -> bool:
        """Know ``records`` from now on, and keep them on disk beside what other processes wrote
        there meanwhile; False where the disk would not have them."""
        new = {record.key: record for record in records}
        self._records |= new
        if cache.private() in self.path.parents:  # of which has been warned
            return False
        try:
            with cache.locked(self.path):
                for path in cache.leftovers(self.path):
                    path.unlink(missing_ok=True)
                merged = {record.key: record for record in self._parse_or_set_aside()} | new
                cache.write(self.path, self._text(merged.values()))
        except _Newer as error:
            cache.warn(f"adasplash2 keeps no measured speeds in {self.path}: {error}")
            return False
        except cache.Unsafe as error:
            cache.warn(str(error))
            return False
        except OSError as error:
            cache.warn(f"adasplash2 cannot keep measured speeds in {self.path} ({error})")
            return False
        return True

    def _text(self, records: Iterable[Record]) -> bytes:
        kept: list[Record] = []
        count: dict[tuple[str, str], int] = {}
        for record in sorted(records, key=lambda r: r.age, reverse=True):
            about = record.problem_class, record.backend
            count[about] = count.get(about, 0) + 1
            if count[about] <= KEPT_VERSIONS:
                kept.append(record)
        while len(text := self._json(kept)) > MAX_BYTES:  # the oldest go
            kept = kept[: len(kept) // 2]
        return text

    def _json(self, records: list[Record]) -> bytes:
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "device": dict(self.identity),
            "records": [asdict(record) for record in sorted(records, key=lambda r: r.key)],
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    def _read(self) -> list[Record]:
        try:
            try:
                return self._parse()
            except _NotOurs:
                with cache.locked(self.path):  # so that nobody has put a good one there meanwhile
                    return self._parse_or_set_aside()
        except _Newer as error:
            cache.warn(f"adasplash2 ignores the measured speeds in {self.path}: {error}")
        except cache.Unsafe as error:
            cache.warn(str(error))
        except OSError as error:
            if may_pass(error):
                raise
            cache.warn(f"adasplash2 cannot read measured speeds from {self.path} ({error})")
        return []

    def _parse_or_set_aside(self) -> list[Record]:
        """Under the lock: as :meth:`_parse`, and out of the way with a file that is not ours."""
        try:
            return self._parse()
        except _NotOurs as error:
            aside = self.path.with_name(f"{self.path.name}.broken")
            self.path.replace(aside)
            cache.warn(f"adasplash2 set {self.path} aside as {aside.name}: {error}")
            return []

    def _parse(self) -> list[Record]:
        """What the file holds; single records that are broken are left out.

        Raises:
            OSError, _Newer, _NotOurs: it cannot be read, or not by us.
        """
        try:
            content = cache.read(self.path, MAX_BYTES)
        except FileNotFoundError:
            return []
        except cache.Unfit as error:
            raise _NotOurs(str(error)) from None
        records, broken = [], []
        for data in self._check(content):
            try:
                records.append(Record.parse(data))
            except ValueError as error:
                broken.append(str(error))
        if broken:
            more = f", and {len(broken) - 1} more" if broken[1:] else ""
            cache.warn(f"adasplash2 leaves out a record of {self.path}{more}: {broken[0]}")
        return records

    def _check(self, content: bytes) -> list[Any]:
        try:
            data = json.loads(content, parse_int=_integer)
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise _NotOurs(f"it is not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise _NotOurs(f"its format is not {FORMAT!r}")
        schema = data.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise _Newer(f"they have schema {cache.shown(schema)}, this release reads {SCHEMA}")
        if type(schema) is not int or schema != SCHEMA:  # True equals 1
            raise _NotOurs(f"its schema is {cache.shown(schema)}, not {SCHEMA}")
        if data.get("device") != self.identity:
            raise _NotOurs(f"it is about another device, {cache.shown(data.get('device'))}")
        found = data.get("records")
        if not isinstance(found, list):
            raise _NotOurs("it has no list of records")
        return found


def _integer(digits: str) -> int | float:
    """Python refuses thousands of digits, and with them the file: such a number is infinite."""
    return int(digits) if len(digits) < 100 else float(digits)
