// What the C library does with memory that a freed tensor leaves behind.
#pragma once

namespace utnetv2 {

// Keep it for the next tensor instead of returning it to the system: a training step allocates the same large blocks
// again and again, and every fresh page costs a fault. Returns whether the C library can be told so (glibc can).
bool keep_freed_memory();

}  // namespace utnetv2
