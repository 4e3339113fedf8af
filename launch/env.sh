# shellcheck shell=bash
# Environment variables that speed up runs on CPU: `. launch/env.sh` before python. Variables that
# are already set keep their values. glibc reads them when the process starts, so Python cannot set
# them itself.

# hugetlb: malloc uses huge pages. XLA allocates its buffers again in every step, and mapping small
# pages costs kernel time.
# arena_max: one arena for all threads. The arenas of threads grow by small pages in spite of
# hugetlb. With one arena, a restart maps 37,000 pages instead of 104,000.
# glibc 2.35 and later support these settings; older versions ignore them.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1}"
