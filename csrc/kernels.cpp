#include "kernels.hpp"

namespace utnetv2 {

#define UTNETV2_DECLARE(ISA)                                                                                  \
    namespace ISA {                                                                                           \
    void depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out);        \
    void depthwise_conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);  \
    void conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);            \
    const Kernels table{&depthwise_conv, &depthwise_conv_backward_weight, &conv_backward_weight};             \
    }

UTNETV2_DECLARE(baseline)
#ifdef UTNETV2_X86
UTNETV2_DECLARE(avx2)
UTNETV2_DECLARE(avx512)
#endif

const Kernels& kernels(InstructionSet set) {
    switch (set) {
#ifdef UTNETV2_X86
        case InstructionSet::avx512: return avx512::table;
        case InstructionSet::avx2: return avx2::table;
#endif
        default: return baseline::table;
    }
}

}  // namespace utnetv2
