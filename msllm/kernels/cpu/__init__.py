"""CPU kernels in C++, for what XLA:CPU does far below the machine's limits.

The sources (`*.cc`, `*.h`) lie beside this file. `build` compiles them on first use, `calls` calls
them through JAX's foreign function interface. Everything also runs without them:
`unavailable_reason()` says why they are missing.
"""

from msllm.kernels.cpu.build import unavailable_reason
from msllm.kernels.cpu.calls import (
    PANEL,
    PackedWeight,
    TableWeight,
    attend_row,
    matmul_packed,
    matmul_table,
    pack,
    write_row,
)

__all__ = [
    "PANEL",
    "PackedWeight",
    "TableWeight",
    "attend_row",
    "matmul_packed",
    "matmul_table",
    "pack",
    "unavailable_reason",
    "write_row",
]
