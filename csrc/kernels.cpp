#include "kernels.hpp"

namespace utnetv2 {

#define UTNETV2_DECLARE(ISA)                                                                                         \
    namespace ISA {                                                                                                  \
    void channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance);                               \
    void channel_moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,             \
                                  const Tensor& mean, const Tensor* other, const Tensor& grad_x);                    \
    void depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out);               \
    void depthwise_conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);         \
    void scale_shift(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, const Tensor& out);       \
    void scale_shift_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift,     \
                              bool relu, const Tensor& grad_x, const Tensor& grad_scale, const Tensor& grad_shift);  \
    const Kernels table{&channel_moments, &channel_moments_backward, &depthwise_conv,                                \
                        &depthwise_conv_backward_weight, &scale_shift, &scale_shift_backward};                       \
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
