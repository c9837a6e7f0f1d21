// The ceiling for benchmarks: reads memory with the kernels' own threads and does nothing else with it.
#include <atomic>

#include "../kernels.h"
#include "parallel.h"

namespace offprin::cpu {
namespace {

typedef uint64_t Vector __attribute__((vector_size(16)));

// Four streams, as kernels with several inputs have: one alone does not keep the memory controllers busy.
constexpr int64_t STREAMS = 4;
constexpr int64_t PIECE = 1 << 20;

uint64_t read_streams(const char* begin, int64_t apart, int64_t bytes) {
  Vector sums[STREAMS][2] = {};
  for (int64_t i = 0; i < bytes; i += 64) {
    for (int64_t stream = 0; stream < STREAMS; ++stream) {
      for (int j = 0; j < 4; ++j) {
        Vector loaded;
        __builtin_memcpy(&loaded, begin + stream * apart + i + 16 * j, sizeof loaded);
        sums[stream][j % 2] ^= loaded;
      }
    }
  }
  Vector sum{};
  for (const auto& pair : sums) sum ^= pair[0] ^ pair[1];
  return sum[0] ^ sum[1];
}

}  // namespace

uint64_t read_ceiling(const void* data, int64_t bytes, int threads) {
  std::atomic<uint64_t> result{0};
  const int64_t apart = bytes / STREAMS / PIECE * PIECE;
  parallel_for(apart / PIECE, threads, [&](int64_t piece) {
    const char* begin = static_cast<const char*>(data) + piece * PIECE;
    result.fetch_xor(read_streams(begin, apart, PIECE), std::memory_order_relaxed);
  });
  return result;
}

}  // namespace offprin::cpu
