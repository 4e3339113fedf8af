# shellcheck shell=bash
# Settings that make a run on CPU faster: `. launch/env.sh` before python. What is already set stays as it is.

# Huge pages for memory from malloc. XLA asks for its buffers anew in every step, and with small pages the kernel spends
# the time mapping them: a train step of configs/quickstart.py took 2.89 CPU-seconds with this and 3.36 without. glibc
# 2.35 and later; others ignore it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
