"""CPU kernels in C++, for operations that XLA:CPU runs far below the machine's limits.

The sources (`*.cc`, `*.h`) are in this folder. `build` compiles them on first use, and `calls`
wraps them as JAX functions. msllm also runs without them; `unavailable_reason()` then says why
they cannot be used.
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
