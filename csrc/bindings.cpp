// The Python face of the extension.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu_features.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace {

using utnetv2::InstructionSet;
using utnetv2::Kernels;
using utnetv2::Tensor;

std::atomic<InstructionSet> instruction_set{utnetv2::widest_instruction_set()};

void use_instruction_set(const std::string& wanted) {
    for (const auto set : {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512})
        if (wanted == utnetv2::name(set)) {
            if (set > utnetv2::widest_instruction_set())
                throw std::invalid_argument("this processor has no " + wanted + " instructions");
            instruction_set = set;
            return;
        }
    throw std::invalid_argument("instruction set must be 'baseline', 'avx2' or 'avx512', not '" + wanted + "'");
}

// (data_ptr, dtype, shape, strides), as ops/cpu.py makes it.
Tensor as_tensor(const py::tuple& described) {
    Tensor tensor;
    tensor.data = reinterpret_cast<void*>(described[0].cast<uintptr_t>());
    tensor.dtype = static_cast<utnetv2::DType>(described[1].cast<int>());
    const auto sizes = described[2].cast<py::tuple>(), strides = described[3].cast<py::tuple>();
    tensor.dimensions = static_cast<int>(sizes.size());
    if (tensor.dimensions > utnetv2::MAX_DIMENSIONS) throw std::invalid_argument("too many dimensions");
    for (int i = 0; i < tensor.dimensions; ++i) {
        tensor.sizes[i] = sizes[i].cast<int64_t>();
        tensor.strides[i] = strides[i].cast<int64_t>();
    }
    return tensor;
}

// What Python gives for each kind of kernel argument, and that argument made of it.
template <class Argument>
struct FromPython {
    using type = Argument;
    Argument value;
    explicit FromPython(Argument given) : value(given) {}
    Argument get() const { return value; }
};

template <>
struct FromPython<const Tensor&> {
    using type = py::tuple;
    Tensor tensor;
    explicit FromPython(const py::tuple& given) : tensor(as_tensor(given)) {}
    const Tensor& get() const { return tensor; }
};

template <>
struct FromPython<const Tensor*> {
    using type = std::optional<py::tuple>;
    std::optional<Tensor> tensor;
    explicit FromPython(const std::optional<py::tuple>& given) {
        if (given) tensor = as_tensor(*given);
    }
    const Tensor* get() const { return tensor ? &*tensor : nullptr; }
};

template <class... Arguments>
void run(void (*kernel)(Arguments...), const FromPython<Arguments>&... arguments) {
    const py::gil_scoped_release release;
    kernel(arguments.get()...);
}

// Defines the kernel that `MEMBER` is in the table of the instruction set in use.
template <auto MEMBER, class... Arguments>
void def_kernel(py::module_& module, const char* name, void (*)(Arguments...)) {
    module.def(name, [](const typename FromPython<Arguments>::type&... given) {
        run<Arguments...>(utnetv2::kernels(instruction_set).*MEMBER, FromPython<Arguments>(given)...);
    });
}

template <auto MEMBER>
void def_kernel(py::module_& module, const char* name) {
    def_kernel<MEMBER>(module, name, utnetv2::kernels(InstructionSet::baseline).*MEMBER);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() =
        "CPU kernels of utnetv2_fast. Import torch first, so that both use one OpenMP runtime. A tensor is a tuple "
        "(data_ptr, dtype, shape, strides); arguments are not checked here but in utnetv2_fast.ops.";
    module.def(
        "instruction_set", [] { return utnetv2::name(instruction_set); },
        "The instructions that the kernels use: 'baseline', 'avx2' or 'avx512'; the widest that the processor has, "
        "unless use_instruction_set chose another.");
    module.def(
        "widest_instruction_set", [] { return utnetv2::name(utnetv2::widest_instruction_set()); },
        "The widest instructions that the processor and the kernels have.");
    module.def("use_instruction_set", &use_instruction_set, py::arg("name"),
               "Let the kernels use these instructions from now on; ValueError where the processor lacks them.");
    module.def("thread_count", &utnetv2::thread_count, "How many threads the kernels use.");
    module.def("keep_freed_memory", &utnetv2::keep_freed_memory,
               "Keep the memory of freed tensors for the next ones; whether the C library here can be told so.");

#define UTNETV2_DEFINE(NAME) def_kernel<&Kernels::NAME>(module, #NAME);
    UTNETV2_KERNELS(UTNETV2_DEFINE)
}
