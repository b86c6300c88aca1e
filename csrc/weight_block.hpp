// A part of the weight of a dense convolution whose gradient is summed at once.
#pragma once

#include <cstdint>

#include "kernel_tools.hpp"

namespace utnetv2 {
namespace {

// A tap of the depth axis, channels [output, output + outputs) and [input, input + inputs).
struct WeightBlock {
    int64_t tap, output, outputs, input, inputs;
};

// Block `i` of a weight of so many channels, cut into blocks of at most `output_block` and `input_block` of them.
inline WeightBlock make_weight_block(int64_t i, int64_t outputs, int64_t output_block, int64_t inputs,
                                     int64_t input_block) {
    const int64_t output_blocks = divide_up(outputs, output_block), input_blocks = divide_up(inputs, input_block);
    WeightBlock b;
    b.output = i % output_blocks * output_block, i /= output_blocks;
    b.outputs = smaller(output_block, outputs - b.output);
    b.input = i % input_blocks * input_block;
    b.inputs = smaller(input_block, inputs - b.input);
    b.tap = i / input_blocks;
    return b;
}

}  // namespace
}  // namespace utnetv2
