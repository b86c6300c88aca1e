"""What the C library does with memory that freed tensors leave behind."""

from __future__ import annotations


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; returns whether that can be had here.

    By default the C library returns large blocks to the system, and a training step on a CPU then spends much of its
    time on fresh pages. Once told, a process never shrinks again before it ends. Needs the C++ extension and glibc.
    """
    from utnetv2_fast.ops.extension import load_extension

    extension = load_extension()
    return extension is not None and extension.keep_freed_memory()
