// The ceiling for benchmarks: reads memory with the kernels' own threads and does nothing else with it.
#include <atomic>

#include "../kernels.h"
#include "parallel.h"

namespace offprin::cpu {

uint64_t read_ceiling(const void* data, int64_t bytes, int threads) {
  typedef uint64_t Vector __attribute__((vector_size(64)));
  constexpr int64_t PIECE = 1 << 20;
  std::atomic<uint64_t> result{0};
  parallel_for((bytes + PIECE - 1) / PIECE, threads, [&](int64_t piece) {
    const char* begin = static_cast<const char*>(data) + piece * PIECE;
    const int64_t steps = (bytes - piece * PIECE < PIECE ? bytes - piece * PIECE : PIECE) / 256;
    // four sums, so that no load waits for the one before it
    Vector sums[4] = {};
    for (int64_t i = 0; i < steps; ++i) {
      for (int j = 0; j < 4; ++j) {
        Vector loaded;
        __builtin_memcpy(&loaded, begin + 256 * i + 64 * j, sizeof loaded);
        sums[j] ^= loaded;
      }
    }
    const Vector sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t folded = 0;
    for (int lane = 0; lane < 8; ++lane) folded ^= sum[lane];
    result.fetch_xor(folded, std::memory_order_relaxed);
  });
  return result;
}

}  // namespace offprin::cpu
