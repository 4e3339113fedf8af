# shellcheck shell=bash
# Settings that make a run on CPU faster: `. launch/env.sh` before python. What is already set stays as it is.

# Huge pages for memory from malloc (hugetlb). XLA asks for its buffers anew in every step, and with small pages the kernel
# spends the time mapping them: a train step of configs/quickstart.py took 2.89 CPU-seconds with this and 3.36 without.
# One arena for all threads (arena_max): in those that malloc gives to threads, memory grows by small pages all the same; a
# restart maps 37,000 instead of 104,000. glibc 2.35 and later; others ignore it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1}"
