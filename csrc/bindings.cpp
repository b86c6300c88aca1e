// The Python face of the extension.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu_features.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace py = pybind11;

namespace {

using utnetv2::InstructionSet;
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

std::optional<Tensor> as_optional(const std::optional<py::tuple>& described) {
    return described ? std::optional(as_tensor(*described)) : std::nullopt;
}

const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

const utnetv2::Kernels& kernels() { return utnetv2::kernels(instruction_set); }

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

    module.def(
        "channel_moments",
        [](const py::tuple& x, const py::tuple& mean, const py::tuple& variance) {
            const Tensor x_ = as_tensor(x), mean_ = as_tensor(mean), variance_ = as_tensor(variance);
            const py::gil_scoped_release release;
            kernels().channel_moments(x_, mean_, variance_);
        },
        py::arg("x"), py::arg("mean"), py::arg("variance"));
    module.def(
        "channel_moments_backward",
        [](const py::tuple& grad_mean, const py::tuple& grad_variance, const py::tuple& x, const py::tuple& mean,
           const std::optional<py::tuple>& other, const py::tuple& grad_x) {
            const Tensor grad_mean_ = as_tensor(grad_mean), grad_variance_ = as_tensor(grad_variance);
            const Tensor x_ = as_tensor(x), mean_ = as_tensor(mean), grad_x_ = as_tensor(grad_x);
            const auto other_ = as_optional(other);
            const py::gil_scoped_release release;
            kernels().channel_moments_backward(grad_mean_, grad_variance_, x_, mean_, pointer(other_), grad_x_);
        },
        py::arg("grad_mean"), py::arg("grad_variance"), py::arg("x"), py::arg("mean"), py::arg("other").none(true),
        py::arg("grad_x"));
    module.def(
        "depthwise_conv",
        [](const py::tuple& x, const py::tuple& weight, const std::optional<py::tuple>& bias, const py::tuple& out) {
            const Tensor x_ = as_tensor(x), weight_ = as_tensor(weight), out_ = as_tensor(out);
            const auto bias_ = as_optional(bias);
            const py::gil_scoped_release release;
            kernels().depthwise_conv(x_, weight_, pointer(bias_), out_);
        },
        py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("out"));
    module.def(
        "depthwise_conv_backward_weight",
        [](const py::tuple& grad_out, const py::tuple& x, const py::tuple& grad_weight) {
            const Tensor grad_out_ = as_tensor(grad_out), x_ = as_tensor(x), grad_weight_ = as_tensor(grad_weight);
            const py::gil_scoped_release release;
            kernels().depthwise_conv_backward_weight(grad_out_, x_, grad_weight_);
        },
        py::arg("grad_out"), py::arg("x"), py::arg("grad_weight"));
    module.def(
        "scale_shift",
        [](const py::tuple& x, const py::tuple& scale, const py::tuple& shift, bool relu, const py::tuple& out) {
            const Tensor x_ = as_tensor(x), scale_ = as_tensor(scale), shift_ = as_tensor(shift);
            const Tensor out_ = as_tensor(out);
            const py::gil_scoped_release release;
            kernels().scale_shift(x_, scale_, shift_, relu, out_);
        },
        py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("relu"), py::arg("out"));
    module.def(
        "scale_shift_backward",
        [](const py::tuple& grad_out, const py::tuple& x, const py::tuple& scale, const py::tuple& shift, bool relu,
           const py::tuple& grad_x, const py::tuple& grad_scale, const py::tuple& grad_shift) {
            const Tensor grad_out_ = as_tensor(grad_out), x_ = as_tensor(x), scale_ = as_tensor(scale);
            const Tensor shift_ = as_tensor(shift), grad_x_ = as_tensor(grad_x), grad_scale_ = as_tensor(grad_scale);
            const Tensor grad_shift_ = as_tensor(grad_shift);
            const py::gil_scoped_release release;
            kernels().scale_shift_backward(grad_out_, x_, scale_, shift_, relu, grad_x_, grad_scale_, grad_shift_);
        },
        py::arg("grad_out"), py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("relu"), py::arg("grad_x"),
        py::arg("grad_scale"), py::arg("grad_shift"));
}
