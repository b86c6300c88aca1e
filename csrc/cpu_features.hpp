// Which instructions the processor and the system it runs allow, found out at run time.
#pragma once

namespace utnetv2 {

enum class InstructionSet { baseline, avx2, avx512 };  // from the narrowest to the widest

// The widest set that the kernels are compiled for and that runs here.
InstructionSet widest_instruction_set();

const char* name(InstructionSet set);

}  // namespace utnetv2
