"""Compiles one .cu file for the emulator: g++ to assembly, a table of shared arrays, an object.

Static ``__shared__`` arrays become function-local statics of a telling alignment.  The compiler
places them side by side and tells nobody where they are, so this step puts a gap behind each (an
index too large hits no neighbour) and lists address, size and name in a section that the runtime
reads.

    compile.py OUTPUT DEPFILE SOURCE COMPILER FLAGS...
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GAP = 256
NAME = r"_ZZ[\w.]+"  # function-local statics
ALIGNMENT = 512  # of __shared__ in include/cuda_runtime.h


def with_shared_table(assembly: str) -> str:
    """Return the assembly with gaps behind function-local statics and a table of them."""
    sizes: dict[str, int] = {}
    section, alignment = "", 0
    pending = None
    out = []
    for line in assembly.splitlines():
        if match := re.match(r"\s*\.(section\s+(\S+?)[,\s]|bss|data|text)", line + " "):
            section = match[2] or f".{match[1]}"
        if match := re.match(r"\s*\.align\s+(\d+)", line):
            alignment = int(match[1])
        if match := re.match(rf"\s*\.comm\s+({NAME}),(\d+),{ALIGNMENT}$", line):
            sizes[match[1]] = int(match[2])
            line = f"\t.comm\t{match[1]},{int(match[2]) + GAP},{ALIGNMENT}"
        elif match := re.match(rf"\s*\.size\s+({NAME}),\s*(\d+)", line):
            pending = (match[1], int(match[2])) if alignment == ALIGNMENT else None
        elif pending and section.startswith(".bss") and re.match(r"\s*\.zero\s", line):
            sizes[pending[0]] = pending[1]
            line += f"\n\t.zero\t{GAP}"
            pending = None
        out.append(line)
    for number, (name, size) in enumerate(sizes.items()):
        out += [
            f'\t.section .rodata\n.Llatentdem_name{number}:\n\t.string "{name}"',
            '\t.section latentdem_shared,"aw"\n\t.balign 8',
            f"\t.quad {name}\n\t.quad {size}\n\t.quad .Llatentdem_name{number}",
        ]
    return "\n".join(out) + '\n\t.section .note.GNU-stack,"",@progbits\n'


def main() -> None:
    """Compile as the command line says."""
    output, depfile, source, compiler, *flags = sys.argv[1:]
    listing = Path(output).with_suffix(".s")
    subprocess.run(
        [
            compiler, *flags, "-x", "c++", "-DLATENTDEM_CUDA_EMULATION", "-fsanitize=thread",
            "-fno-gnu-unique", "-fno-tree-loop-distribute-patterns", "-MMD", "-MF", depfile,
            "-MT", output, "-S", source, "-o", str(listing),
        ],
        check=True,
    )  # fmt: skip
    listing.write_text(with_shared_table(listing.read_text()))
    subprocess.run([compiler, "-c", str(listing), "-o", output], check=True)


if __name__ == "__main__":
    main()
