"""Broken models through the gate, by the thousand: ``python tests/mutate_models.py --count 200000 --seed 0``.

Valid models are changed at random, in their bytes and in their structure. Each goes through the gate and, where that
takes it, through the passes that every build begins with. Processes do the work under the operating system's limits:
10 seconds of CPU for a model, 2 GB of memory. Anything but success or a refusal in one line is a fault: a crash, a
traceback, a limit. A fault prints its seed and number, and keeps the model.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import graphs
import networks
import numpy as np
import onnx
from gated import node, small
from onnx import AttributeProto, TensorProto, helper

SECONDS = 10
MEMORY = 2 << 30
# Seconds of the clock: for what waits and takes no CPU.
_WAITING = 300
# Starting a worker takes as long as 300 mutations.
_BATCH = 2000
_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 40, -(1 << 62))
_TEXTS = ("", "x", "y", "w", "a\0b", "\x1b[31m", "ü" * 300, "../x", "ai.onnx", "N,C")


def mutated(models: Sequence[bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The mutation's kind and the bytes of the model that it made; the same for the same numbers."""
    dice = random.Random(f"{seed}:{number}")
    data = dice.choice(models)
    if dice.random() < 0.4:
        change = dice.choice(_OF_BYTES)
        return change.__name__, change(dice, bytearray(data), models)
    proto = onnx.ModelProto.FromString(data)
    names = []
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        edit = dice.choice(_OF_STRUCTURE)
        names.append(edit.__name__)
        try:
            edit(dice, proto)
        except (ValueError, TypeError, IndexError):
            # Protobuf takes no such value there.
            continue
    return names[0], proto.SerializeToString()


def flip(dice: random.Random, data: bytearray, _models: Sequence[bytes]) -> bytes:
    for _ in range(dice.choice((1, 2, 8, 64))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def overwrite(dice: random.Random, data: bytearray, _models: Sequence[bytes]) -> bytes:
    start = dice.randrange(len(data))
    data[start : start + dice.randrange(1, 32)] = dice.randbytes(dice.randrange(32))
    return bytes(data)


def truncate(dice: random.Random, data: bytearray, _models: Sequence[bytes]) -> bytes:
    return bytes(data[: dice.randrange(len(data))])


def repeat(dice: random.Random, data: bytearray, _models: Sequence[bytes]) -> bytes:
    start = dice.randrange(len(data))
    part = data[start : start + dice.randrange(1, 400)]
    return bytes(data[:start] + part * dice.choice((2, 3, 50)) + data[start:])


def splice(dice: random.Random, data: bytearray, models: Sequence[bytes]) -> bytes:
    other = dice.choice(models)
    return (
        bytes(data[: dice.randrange(len(data))]) + other[dice.randrange(len(other)) :]
    )


def _tensor_dims(dice: random.Random, dims: Any) -> None:
    kind = dice.randrange(4)
    if kind == 0 and dims:
        dims[dice.randrange(len(dims))] = dice.choice(_NUMBERS)
    elif kind == 1:
        dims.append(dice.choice(_NUMBERS))
    elif kind == 2 and dims:
        dims.pop()
    else:
        dims.extend([1] * dice.choice((2, 6, 60)))


def weights_shape(dice: random.Random, proto: onnx.ModelProto) -> None:
    _tensor_dims(dice, dice.choice(proto.graph.initializer).dims)


def weights_bytes(dice: random.Random, proto: onnx.ModelProto) -> None:
    tensor = dice.choice(proto.graph.initializer)
    tensor.raw_data = dice.choice(
        (b"", tensor.raw_data[:-1], tensor.raw_data * 2, dice.randbytes(64))
    )


def weights_type(dice: random.Random, proto: onnx.ModelProto) -> None:
    dice.choice(proto.graph.initializer).data_type = dice.randrange(30)


def input_shape(dice: random.Random, proto: onnx.ModelProto) -> None:
    values = (*proto.graph.input, *proto.graph.output)
    dims = dice.choice(values).type.tensor_type.shape.dim
    kind = dice.randrange(4)
    if kind == 0:
        dice.choice(dims).dim_value = dice.choice(_NUMBERS)
    elif kind == 1:
        dice.choice(dims).dim_param = dice.choice(_TEXTS)
    elif kind == 2:
        dims.add(dim_value=dice.choice(_NUMBERS))
    else:
        del dims[dice.randrange(len(dims)) :]


def input_type(dice: random.Random, proto: onnx.ModelProto) -> None:
    values = (*proto.graph.input, *proto.graph.output)
    dice.choice(values).type.tensor_type.elem_type = dice.randrange(30)


def operator(dice: random.Random, proto: onnx.ModelProto) -> None:
    kinds = [schema.name for schema in onnx.defs.get_all_schemas()]
    dice.choice(proto.graph.node).op_type = dice.choice(kinds)


def domain(dice: random.Random, proto: onnx.ModelProto) -> None:
    dice.choice(proto.graph.node).domain = dice.choice(_TEXTS)


def wiring(dice: random.Random, proto: onnx.ModelProto) -> None:
    nodes = proto.graph.node
    names = [name for each in nodes for name in (*each.input, *each.output)]
    names += [*_TEXTS, *(tensor.name for tensor in proto.graph.initializer)]
    chosen = dice.choice(nodes)
    ends = dice.choice((chosen.input, chosen.input, chosen.output))
    kind = dice.randrange(3)
    if kind == 0:
        ends[dice.randrange(len(ends))] = dice.choice(names)
    elif kind == 1:
        ends.extend([dice.choice(names)] * dice.choice((1, 2, 600)))
    else:
        ends.pop()


def order(dice: random.Random, proto: onnx.ModelProto) -> None:
    found = proto.graph.node
    kind = dice.randrange(3)
    at = dice.randrange(len(found))
    if kind == 0:
        del found[at]
    elif kind == 1:
        found.append(found[at])
    else:
        first = onnx.NodeProto()
        first.CopyFrom(found[at])
        del found[at]
        found.insert(dice.randrange(len(found) + 1), first)


def attribute(dice: random.Random, proto: onnx.ModelProto) -> None:
    owner = dice.choice([each for each in proto.graph.node if each.attribute])
    found: AttributeProto = dice.choice(owner.attribute)
    kind = dice.randrange(6)
    if kind == 0:
        owner.attribute.remove(found)
    elif kind == 1:
        found.i = dice.choice(_NUMBERS)
    elif kind == 2 and found.ints:
        found.ints[dice.randrange(len(found.ints))] = dice.choice(_NUMBERS)
    elif kind == 3:
        found.ints.extend([dice.choice(_NUMBERS)] * dice.choice((1, 4, 1000)))
    elif kind == 4:
        found.type = dice.choice(AttributeProto.AttributeType.values())
    else:
        found.name = dice.choice(("axis", "axes", "pads", "mode", *_TEXTS))


def new_attribute(dice: random.Random, proto: onnx.ModelProto) -> None:
    owner = dice.choice(proto.graph.node)
    known = onnx.defs.has(owner.op_type)
    own = onnx.defs.get_schema(owner.op_type).attributes if known else ()
    names = [*own, "auto_pad", "to"]
    values = (dice.choice(_NUMBERS), 1e38, float("nan"), "SAME_UPPER", [2, 2], [0.5])
    owner.attribute.append(
        helper.make_attribute(dice.choice(names), dice.choice(values))
    )


def version(dice: random.Random, proto: onnx.ModelProto) -> None:
    if dice.random() < 0.7:
        dice.choice(proto.opset_import).version = dice.choice(
            (1, *range(6, 30), 1 << 40)
        )
    else:
        proto.ir_version = dice.choice(_NUMBERS)


def value_of_weights(dice: random.Random, proto: onnx.ModelProto) -> None:
    """Of shapes, axes and repeats above all: small tensors of integers."""
    small_ones = [
        tensor
        for tensor in proto.graph.initializer
        if tensor.data_type == TensorProto.INT64 and 0 < len(tensor.raw_data) <= 128
    ]
    tensor = dice.choice(small_ones or list(proto.graph.initializer))
    values = np.frombuffer(tensor.raw_data, np.int64 if small_ones else np.uint8).copy()
    values[dice.randrange(len(values))] = dice.choice(_NUMBERS) & (
        -1 if small_ones else 255
    )
    tensor.raw_data = values.tobytes()


def external(dice: random.Random, proto: onnx.ModelProto) -> None:
    tensor = dice.choice(proto.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    for key in ("location", "offset", "length"):
        text = dice.choice((*_TEXTS, *map(str, _NUMBERS), "/etc/passwd"))
        tensor.external_data.add(key=key, value=text)


def function(dice: random.Random, proto: onnx.ModelProto) -> None:
    """A node becomes the call of a function, which may call itself."""
    call = dice.choice(proto.graph.node)
    inside = onnx.NodeProto()
    inside.CopyFrom(call)
    opsets = [*proto.opset_import, helper.make_opsetid("own", 1)]
    if dice.random() < 0.3:
        inside.op_type, inside.domain = "F", "own"
    outputs = list(call.output)
    made = helper.make_function("own", "F", list(call.input), outputs, [inside], opsets)
    proto.functions.append(made)
    del call.attribute[:]
    call.op_type, call.domain = "F", "own"
    proto.opset_import.append(opsets[-1])


_OF_BYTES: list[Callable[[random.Random, bytearray, Sequence[bytes]], bytes]] = [
    *(flip, overwrite, truncate, repeat, splice)
]
_OF_STRUCTURE: list[Callable[[random.Random, onnx.ModelProto], None]] = [
    *(weights_shape, weights_bytes, weights_type, input_shape, input_type, operator),
    *(domain, wiring, wiring, order, attribute, attribute, new_attribute, version),
    *(value_of_weights, value_of_weights, external, function),
]


def small_models() -> list[bytes]:
    made = [
        small(),
        graphs.torchscript_cnn(13),
        graphs.dynamo_cnn(18),
        graphs.tf2onnx_cnn(15),
        networks.resnet18_like(),
        _shapes(),
        _quantised(),
    ]
    return [each.SerializeToString() for each in made]


def _shapes() -> onnx.ModelProto:
    """Shapes computed at run time, and operators whose inputs are numbers."""
    constants = {
        "one": np.array([1]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "twice": np.array([1, 1, 2, 2], np.float32),
        "start": np.array([0]),
        "end": np.array([2]),
        "axis": np.array([1]),
        "parts": np.array([1, 1]),
    }
    made = [
        node("Pad", ["x", "pads"], ["a"], "pad"),
        node("Resize", ["a", "", "twice"], ["b"], "resize"),
        node("Slice", ["b", "start", "end", "axis"], ["c"], "slice"),
        node("Split", ["c", "parts"], ["d", "e"], "split", axis=1),
        node("Concat", ["d", "e", "d"], ["f"], "concat", axis=1),
        node("MaxPool", ["f"], ["g"], "pool", kernel_shape=[3, 3], ceil_mode=1),
        node("Shape", ["g"], ["s"], "shape"),
        node("Gather", ["s", "start"], ["t"], "gather"),
        node("ReduceProd", ["s"], ["u"], "product", keepdims=1),
        node("Concat", ["t", "u"], ["v"], "sizes", axis=0),
        node("Reshape", ["g", "v"], ["h"], "reshape"),
        node("ReduceMean", ["h"], ["m"], "mean", axes=[1], keepdims=1),
        node("Unsqueeze", ["m", "axis"], ["n"], "unsqueeze"),
        node("Tile", ["n", "tiles"], ["y"], "tile"),
    ]
    return small(made, {**constants, "tiles": np.array([1, 1, 4])})


def _quantised() -> onnx.ModelProto:
    constants = {
        "scale": np.float32(0.02),
        "zero": np.uint8(128),
        "w": np.arange(-3, 3, dtype=np.int8).reshape(2, 3, 1, 1),
        "ws": np.float32(0.1),
        "wz": np.int8(0),
    }
    both = ["scale", "zero"]
    made = [
        node("QuantizeLinear", ["x", *both], ["a"], "q"),
        node("DequantizeLinear", ["a", *both], ["b"], "d"),
        node("DequantizeLinear", ["w", "ws", "wz"], ["c"], "dw"),
        node("Conv", ["b", "c"], ["e"], "conv"),
        node("QuantizeLinear", ["e", *both], ["f"], "q2"),
        node("DequantizeLinear", ["f", *both], ["y"], "d2"),
    ]
    return small(made, constants)


def work(
    seed: int, first: int, count: int, models: Sequence[bytes], place: Path
) -> None:
    """In a process of its own, which a fault ends: say each number before it is tried and its outcome after it.

    Behind the outcome: its seconds of CPU, and the most kilobytes of memory that the process has had so far.
    """
    from netship.compile import passes
    from netship.compile.frontend import gate
    from netship.targets.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, first + count):
        kind, data = mutated(models, seed, number)
        place.write_bytes(data)
        print(f"try {number} {kind}", flush=True)
        fault, started = "", time.process_time()
        # Not caught: they end the process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, _WAITING)
        try:
            passes.read(gate.load(place).proto, (), passes.no_dump)
            outcome = "accepted"
        except UserError as error:
            text = str(error)
            outcome = "refused"
            if len(text.splitlines()) != 1 or not text.isprintable():
                fault = f"not one printable line: {text!r:.300}"
        except MemoryError:
            fault = "over the memory"
        except Exception as error:  # noqa: BLE001  (any is a fault)
            fault = f"{type(error).__name__}: {error!s:.300}"
        if fault:
            raise SystemExit(fault.replace("\n", " "))
        seconds = time.process_time() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(outcome, f"{seconds:.3f}", memory, flush=True)


@dataclass
class Outcomes:
    """What became of the mutations: how many of each outcome, a line for each fault, and what the costliest took."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0
    megabytes: float = 0

    def add(self, line: str) -> None:
        outcome, seconds, kilobytes = line.split()
        self.counts[outcome] += 1
        self.seconds = max(self.seconds, float(seconds))
        self.megabytes = max(self.megabytes, float(kilobytes) / 1024)

    def __str__(self) -> str:
        said = ", ".join(f"{n:,} {each}" for each, n in sorted(self.counts.items()))
        return f"{said}; at most {self.seconds:.2f} s of CPU and {self.megabytes:.0f} MB of memory"


def campaign(seed: int, count: int, models: Sequence[Path], keep: Path) -> Outcomes:
    """Try ``count`` mutations."""
    found = Outcomes()
    done = told = 0
    while done < count:
        batch = min(_BATCH, count - done)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model.onnx"
            options = f"--seed {seed} --work {done} --count {batch} --place"
            run = subprocess.run(
                [sys.executable, __file__, *options.split(), place, *models],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = run.stdout.splitlines()
            for line in lines[1::2]:
                found.add(line)
            tries = len(lines[::2])
            if run.returncode:
                said = (run.stderr.strip().splitlines() or [""])[-1]
                ended = f"exit code {run.returncode} ({said[:300]})"
                if not lines:
                    raise SystemExit(f"the worker cannot start: {ended}")
                found.faults.append(f"{seed}:{lines[-1].removeprefix('try ')}: {ended}")
                found.counts["fault"] += 1
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{done + tries - 1}.onnx").write_bytes(
                    place.read_bytes()
                )
            done += max(1, tries)
        for each in found.faults[told:]:
            print(f"\n{each}", end="", file=sys.stderr)
        told = len(found.faults)
        print(f"\r{done:,} of {count:,}: {found}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("faults"))
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("models", type=Path, nargs="*", help="more models to change")
    arguments = parser.parse_args()
    if arguments.work is not None:
        models = small_models() + [path.read_bytes() for path in arguments.models]
        seed, first, count = arguments.seed, arguments.work, arguments.count
        work(seed, first, count, models, arguments.place)
        return 0
    found = campaign(arguments.seed, arguments.count, arguments.models, arguments.keep)
    print("\n".join(found.faults))
    print(f"{found.counts.total():,} mutations: {found}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
