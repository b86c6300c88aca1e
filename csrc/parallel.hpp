// Threads come from the OpenMP runtime that torch has loaded, so that torch.set_num_threads governs them.
#pragma once

namespace utnetv2 {

// How many threads a parallel region starts; 1 without OpenMP.
int thread_count();

}  // namespace utnetv2
