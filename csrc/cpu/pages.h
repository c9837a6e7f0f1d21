// Fresh memory costs a trap for every page that is first written; asking for many pages at once costs one system call.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace offprin::cpu {

// Makes the pages that lie wholly inside an output ready for writing. Only a hint: a system that does not know it, or a
// page that is there already, changes nothing. (Huge pages were tried: finding them took longer than all small ones.)
inline void prepare_pages(void* begin, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 4096;
  constexpr int POPULATE_WRITE = 23;  // MADV_POPULATE_WRITE, since Linux 5.14
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  if (begin != nullptr && first < end) madvise(reinterpret_cast<void*>(first), end - first, POPULATE_WRITE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace offprin::cpu
