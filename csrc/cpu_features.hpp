// Which instructions the processor and the system it runs allow, found out at run time.
#pragma once

namespace utnetv2 {

enum class InstructionSet { baseline, avx2, avx512 };

// The widest set that every kernel is compiled for and that runs here.
InstructionSet instruction_set();

const char* name(InstructionSet set);

}  // namespace utnetv2
