// Sizes that tasks and kernels agree on.
#pragma once
#include <cstdint>

namespace offprin::cpu {

constexpr int64_t STRIP = 16384;  // columns that one cell covers: their byte counters fit in L1

}  // namespace offprin::cpu
