// What adamw.cpp and the kernels of masked_adamw compiled once per instruction set share.
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace offprin::cpu {

struct AdamwKernels {
  // Steps blocks of one tensor, from the block `first` on; returns its visible changes, 0 where they are not wanted.
  int64_t (*step)(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks);
};

namespace generic {
extern const AdamwKernels adamw_kernels;
}
namespace avx2 {
extern const AdamwKernels adamw_kernels;
}
namespace avx512 {
extern const AdamwKernels adamw_kernels;
}

}  // namespace offprin::cpu
