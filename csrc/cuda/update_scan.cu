// Mask, row counts and rule counts of update_scan in CUDA C++.
//
// A thread takes eight consecutive columns: one 16-byte load of bf16 from either side, one byte of mask. No element crosses
// lanes, a warp writes 32 bytes of mask at once, and four such groups are in flight before the first is used.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "../numerics.h"

namespace offprin::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int GROUP = 8;  // columns per thread: one byte of mask
constexpr int BLOCKS_PER_SM = 8;  // in the grid: a few waves
constexpr int BLOCKS_RESIDENT = 2;  // at most 128 registers: 512 threads with 128 bytes in flight each cover memory latency

// Groups in flight per thread: four where a group is two 16-byte loads; element loads would only spend registers on it.
template <bool ALIGNED>
constexpr int UNROLL = ALIGNED ? 4 : 1;

struct Shape {
  int64_t rows, columns, row_groups;  // row_groups: mask bytes of a row, padding included
};

struct Rules {
  int32_t count;
  int32_t code[MAX_RULES];
  float threshold[MAX_RULES];
  bool uncast;  // count on the un-cast values too
};

struct Outputs {
  uint8_t* mask;
  unsigned long long* row_counts;
  unsigned long long* rule_counts;  // [rules, 2]
};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("update_scan: ") + what + " failed: " + cudaGetErrorString(error));
  }
}

template <int DTYPE>
__device__ float load_fp32(const void* data, int64_t index) {
  if constexpr (DTYPE == FP32) {
    return static_cast<const float*>(data)[index];
  } else {
    const uint32_t bits = static_cast<const uint16_t*>(data)[index];
    return DTYPE == BF16 ? bf16_to_fp32(bits) : fp16_to_fp32(bits);
  }
}

// Eight columns of both sides as bf16 codes, and as fp32 values where something un-cast is counted.
struct Columns {
  uint16_t a[GROUP], b[GROUP];
  float x[GROUP], y[GROUP];
};

template <int BASE, int TUNED, bool ALIGNED>
__device__ void load(Columns& c, const void* base, const void* tuned, int64_t first, int valid, bool additive) {
  if constexpr (ALIGNED) {
    // the whole group exists and lies on 16 bytes
    const uint4 a = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + first);
    const uint4 b = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tuned) + first);
    memcpy(c.a, &a, sizeof a);
    memcpy(c.b, &b, sizeof b);
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
      const bool exists = i < valid;
      c.x[i] = exists ? load_fp32<BASE>(base, first + i) : 0.0f;
      c.y[i] = exists ? load_fp32<TUNED>(tuned, first + i) : 0.0f;
      if (additive) c.y[i] = add_fp32(c.x[i], c.y[i]);
      c.a[i] = BASE == BF16 ? bits_of(c.x[i]) >> 16 : round_to_bf16(c.x[i]);
      c.b[i] = TUNED == BF16 && !additive ? bits_of(c.y[i]) >> 16 : round_to_bf16(c.y[i]);
    }
  }
}

template <typename Predicate>
__device__ uint32_t byte_of(Predicate changed) {
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) byte |= static_cast<uint32_t>(changed(i)) << i;
  return byte;
}

__device__ uint32_t changed_codes(const Columns& c, int32_t code, float threshold) {
  switch (code) {
    case BITWISE:
    case ULP: {
      const int32_t limit = code == ULP ? static_cast<int32_t>(threshold) : 0;
      return byte_of([&](int i) {
        const bool a_nan = is_nan_code(c.a[i]), b_nan = is_nan_code(c.b[i]);
        return a_nan || b_nan ? a_nan != b_nan : ulp_distance(c.a[i], c.b[i]) > limit;
      });
    }
    case STORAGE:
      return byte_of([&](int i) { return c.a[i] != c.b[i]; });
    default:
      return byte_of([&](int i) {
        return values_apart(bf16_to_fp32(c.a[i]), bf16_to_fp32(c.b[i]), threshold, code == ETA);
      });
  }
}

__device__ uint32_t changed_values(const Columns& c, int32_t code, float threshold) {
  switch (code) {
    case BITWISE:
      return byte_of([&](int i) { return values_differ(c.x[i], c.y[i]); });
    case STORAGE:
      return byte_of([&](int i) { return bits_of(c.x[i]) != bits_of(c.y[i]); });
    default:
      return byte_of([&](int i) { return values_apart(c.x[i], c.y[i], threshold, code == ETA); });
  }
}

// Sum over the block, valid in thread 0.
__device__ unsigned block_sum(unsigned value) {
  __shared__ unsigned warps[THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  unsigned total = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp : warps) total += warp;
  }
  __syncthreads();
  return total;
}

// Block x strides over the groups of a row, block y over rows.
template <int BASE, int TUNED, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, BLOCKS_RESIDENT)
    scan(const void* base, const void* tuned, bool additive, Shape shape, Rules rules, Outputs out) {
  // a thread sees far fewer than 2^32 columns of one row range, so 32-bit counts hold between the atomics
  unsigned counts[MAX_RULES][2] = {};
  for (int64_t row = blockIdx.y; row < shape.rows; row += gridDim.y) {
    unsigned in_row = 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
    for (int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; group < shape.row_groups;
         group += stride * UNROLL<ALIGNED>) {
      Columns columns[UNROLL<ALIGNED>];
#pragma unroll
      for (int u = 0; u < UNROLL<ALIGNED>; ++u) {
        const int64_t column = (group + u * stride) * GROUP;
        const int valid = static_cast<int>(max(int64_t{0}, min(int64_t{GROUP}, shape.columns - column)));
        if (ALIGNED ? valid == GROUP : valid > 0) {
          load<BASE, TUNED, ALIGNED>(columns[u], base, tuned, row * shape.columns + column, valid, additive);
        } else {
          columns[u] = Columns{};
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL<ALIGNED>; ++u) {
        const uint32_t byte = changed_codes(columns[u], rules.code[0], rules.threshold[0]);
        if (out.mask != nullptr && group + u * stride < shape.row_groups) {
          out.mask[row * shape.row_groups + group + u * stride] = static_cast<uint8_t>(byte);
        }
        in_row += __popc(byte);
#pragma unroll
        for (int r = 1; r < MAX_RULES; ++r) {
          if (r < rules.count) counts[r][0] += __popc(changed_codes(columns[u], rules.code[r], rules.threshold[r]));
        }
        if constexpr (!ALIGNED) {
#pragma unroll
          for (int r = 0; r < MAX_RULES; ++r) {
            if (rules.uncast && r < rules.count && rules.code[r] != ULP) {
              counts[r][1] += __popc(changed_values(columns[u], rules.code[r], rules.threshold[r]));
            }
          }
        }
      }
    }
    counts[0][0] += in_row;
    if (out.row_counts != nullptr) {
      const unsigned total = block_sum(in_row);
      if (threadIdx.x == 0 && total != 0) atomicAdd(out.row_counts + row, total);
    }
  }
#pragma unroll
  for (int r = 0; r < MAX_RULES; ++r) {
#pragma unroll
    for (int uncast = 0; uncast < 2; ++uncast) {
      if (r >= rules.count) continue;
      const bool defined = uncast == 0 || (rules.uncast && rules.code[r] != ULP);
      const unsigned total = defined ? block_sum(counts[r][uncast]) : 0;
      unsigned long long* target = out.rule_counts + 2 * r + uncast;
      if (threadIdx.x == 0 && defined && total != 0) atomicAdd(target, total);
      if (threadIdx.x == 0 && !defined && blockIdx.x == 0 && blockIdx.y == 0) {
        *target = static_cast<unsigned long long>(UNDEFINED);
      }
    }
  }
}

using Kernel = void (*)(const void*, const void*, bool, Shape, Rules, Outputs);

template <int BASE>
Kernel pick_tuned(int32_t tuned) {
  switch (tuned) {
    case BF16: return scan<BASE, BF16, false>;
    case FP16: return scan<BASE, FP16, false>;
    default: return scan<BASE, FP32, false>;
  }
}

Kernel pick(int32_t base, int32_t tuned) {
  switch (base) {
    case BF16: return pick_tuned<BF16>(tuned);
    case FP16: return pick_tuned<FP16>(tuned);
    default: return pick_tuned<FP32>(tuned);
  }
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

void update_scan(const UpdateScan& job, void* stream) {
  if (job.col_counts || job.counters || job.ulp_histogram || job.exponent_histogram || job.norms) {
    throw std::runtime_error("update_scan: the CUDA library makes masks, row counts and rule counts only");
  }
  Shape shape{job.rows, job.columns, row_bytes(job.columns)};
  Rules rules{};
  rules.count = job.rules;
  for (int32_t r = 0; r < job.rules; ++r) {
    rules.code[r] = job.rule[r].code;
    rules.threshold[r] = static_cast<float>(job.rule[r].threshold);
  }
  const bool plain = job.base_dtype == BF16 && job.tuned_dtype == BF16 && !job.additive;
  rules.uncast = !plain;
  // rows without padding are one long row, unless rows are counted
  if (shape.columns % 64 == 0 && job.row_counts == nullptr) {
    shape = Shape{shape.rows > 0 ? 1 : 0, shape.rows * shape.columns, shape.rows * shape.row_groups};
  }
  const bool aligned = plain && shape.columns % GROUP == 0 && on_16_bytes(job.base) && on_16_bytes(job.tuned);
  const Kernel kernel = aligned ? scan<BF16, BF16, true> : pick(job.base_dtype, job.tuned_dtype);

  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int64_t wanted = int64_t{processors} * BLOCKS_PER_SM;
  const int64_t per_block = int64_t{THREADS} * (aligned ? UNROLL<true> : UNROLL<false>);
  const int64_t x = std::clamp<int64_t>((shape.row_groups + per_block - 1) / per_block, 1, wanted);
  const int64_t y = std::clamp<int64_t>((wanted + x - 1) / x, 1, std::clamp<int64_t>(shape.rows, 1, 65535));
  const Outputs out{job.mask, reinterpret_cast<unsigned long long*>(job.row_counts),
                    reinterpret_cast<unsigned long long*>(job.rule_counts)};
  kernel<<<dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      job.base, job.tuned, job.additive, shape, rules, out);
  check(cudaGetLastError(), "launch");
}

}  // namespace offprin::cuda
