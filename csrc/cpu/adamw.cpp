// masked_adamw: cuts all tensors of a launch into tasks of blocks, and adds up their visible changes.
#include <algorithm>
#include <vector>

#include "adamw_kernel.h"
#include "tasks.h"

namespace offprin::cpu {
namespace {

constexpr int64_t TASK_BLOCKS = 64;

const AdamwKernels& kernels_for(Isa isa) {
#if OFFPRIN_X86
  if (isa == Isa::AVX512) return avx512::adamw_kernels;
  if (isa == Isa::AVX2) return avx2::adamw_kernels;
#endif
  (void)isa;
  return generic::adamw_kernels;
}

}  // namespace

void masked_adamw(const MaskedAdamw& job, Isa isa, int threads) {
  const AdamwKernels& k = kernels_for(isa);
  if (job.changes != nullptr) std::fill_n(job.changes, job.tensors, int64_t{0});
  // Blocks of all tensors in a row: first[t] is where those of tensor t begin.
  std::vector<int64_t> first{0};
  int64_t coordinates = 0;
  for (int64_t t = 0; t < job.tensors; ++t) {
    const int64_t numel = job.slots[t * adamw::SLOTS + adamw::NUMEL];
    first.push_back(first.back() + divide_up(numel, adamw::BLOCK));
    coordinates += numel;
  }
  if (coordinates < SMALL) threads = 1;
  parallel_for(divide_up(first.back(), TASK_BLOCKS), threads, [&](int64_t task) {
    const int64_t end = std::min(first.back(), (task + 1) * TASK_BLOCKS);
    int64_t block = task * TASK_BLOCKS;
    for (int64_t t = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1; block < end; ++t) {
      const size_t tensor = static_cast<size_t>(t);
      const int64_t last = std::min(end, first[tensor + 1]);
      if (last == block) continue;
      const int64_t changes = k.step(job, job.slots + t * adamw::SLOTS, block - first[tensor], last - block);
      // Blocks of one tensor may be stepped by several threads.
      if (changes != 0 && job.changes != nullptr) __atomic_fetch_add(job.changes + t, changes, __ATOMIC_RELAXED);
      block = last;
    }
  });
}

}  // namespace offprin::cpu
