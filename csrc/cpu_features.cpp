#include "cpu_features.hpp"

namespace utnetv2 {

#ifdef UTNETV2_X86

InstructionSet widest_instruction_set() {
    // These also ask the system whether it saves the wide registers.
    static const InstructionSet set = [] {
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return avx512 ? InstructionSet::avx512 : avx2 ? InstructionSet::avx2 : InstructionSet::baseline;
    }();
    return set;
}

#else

InstructionSet widest_instruction_set() { return InstructionSet::baseline; }

#endif

const char* name(InstructionSet set) {
    switch (set) {
        case InstructionSet::avx512:
            return "avx512";
        case InstructionSet::avx2:
            return "avx2";
        case InstructionSet::baseline:
            break;
    }
    return "baseline";
}

}  // namespace utnetv2
