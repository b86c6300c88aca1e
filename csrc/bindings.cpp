// The Python face of the extension.
#include <pybind11/pybind11.h>

#include "cpu_features.hpp"
#include "memory.hpp"
#include "parallel.hpp"

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU kernels of utnetv2_fast. Import torch first, so that both use one OpenMP runtime.";
    module.def(
        "instruction_set", [] { return utnetv2::name(utnetv2::instruction_set()); },
        "The instructions that the kernels use on this processor: 'baseline', 'avx2' or 'avx512'.");
    module.def("thread_count", &utnetv2::thread_count, "How many threads the kernels use.");
    module.def("keep_freed_memory", &utnetv2::keep_freed_memory,
               "Keep the memory of freed tensors for the next ones; whether the C library here can be told so.");
}
