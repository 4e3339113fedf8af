# shellcheck shell=bash
# Settings that make a run on CPU faster: `. launch/env.sh` before python. Variables that are already set keep their
# values. These settings must be there when the process starts, so Python cannot set them itself.

# hugetlb: malloc takes memory in huge pages. XLA allocates its buffers anew in every step, and with small pages the
# kernel spends the time mapping them: a train step of configs/quickstart.py took 2.89 CPU-seconds with this setting and
# 3.36 without.
# arena_max: one arena for all threads. The arenas of threads grow by small pages in spite of hugetlb; with one arena, a
# restart maps 37,000 pages instead of 104,000.
# glibc 2.35 and later read these; older versions ignore them.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1}"
