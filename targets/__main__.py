"""``python -m targets``: list the targets that ``--target`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from netship.targets.arguments import add_json, as_json, command_parser
from netship.targets.errors import run_command
from netship.targets.presets import (
    PRESETS,
    boards_of,
    faster_cores,
    missing_features,
    native,
    this_cpu,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("targets", "List the targets that --target takes.")
    add_json(parser)
    arguments = parser.parse_args(argv)
    cpu = this_cpu()
    here = native(cpu)
    if arguments.json:
        table = {
            t.name: {
                **asdict(t),
                "features": sorted(t.features),
                "boards": boards_of(t),
            }
            for t in PRESETS
        }
        print(as_json({"native": here.name, "targets": table}))
        return 0
    width = max(len(target.name) for target in PRESETS)
    print(f"{'target':<{width}}  runs here  what it means")
    for target in PRESETS:
        runs = "no" if missing_features(target, cpu) else "yes"
        print(f"{target.name:<{width}}  {runs:<9}  {target.summary}")
    print(f"{'native':<{width}}  {'yes':<9}  this machine ({cpu.model}): {here.name}")
    print("\nBoards and parts mean a target too, by how their names begin:")
    for target in PRESETS:
        if boards := boards_of(target):
            print(f"{target.name:<{width}}  {', '.join(boards)}")
    print("\nOn boards with two kinds of cores, bind the program to the faster ones:")
    for cores, names in sorted(_faster().items()):
        print(f"{'taskset -c ' + cores:<{width}}  {', '.join(names)}")
    print(
        "\nA TVM target string works too: --target 'llvm -keys=cpu -mtriple=aarch64-linux-gnu -mcpu=cortex-a35'"
    )
    return 0


def _faster() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for target in PRESETS:
        for board in boards_of(target):
            if cores := faster_cores(board):
                found.setdefault(cores, []).append(board)
    return found


if __name__ == "__main__":
    run_command(main)
