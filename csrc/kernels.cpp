#include "kernels.hpp"

#include <type_traits>

namespace utnetv2 {

// The functions of each instruction set's kernel files have the types of the table's members.
#define UTNETV2_DECLARATION(NAME) std::remove_pointer_t<decltype(Kernels::NAME)> NAME;
#define UTNETV2_ENTRY(NAME) &NAME,
#define UTNETV2_INSTRUCTION_SET(ISA)                      \
    namespace ISA {                                       \
    UTNETV2_KERNELS(UTNETV2_DECLARATION)                  \
    const Kernels table{UTNETV2_KERNELS(UTNETV2_ENTRY)}; \
    }

UTNETV2_INSTRUCTION_SET(baseline)
#ifdef UTNETV2_X86
UTNETV2_INSTRUCTION_SET(avx2)
UTNETV2_INSTRUCTION_SET(avx512)
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
