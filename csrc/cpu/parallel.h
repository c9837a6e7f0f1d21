// Runs independent tasks on a persistent pool of threads.
#pragma once
#include <cstdint>
#include <functional>

namespace offprin::cpu {

// Calls body(0) .. body(count - 1), each once, on at most `threads` threads, the caller's among them. Tasks are claimed
// in order. The first exception is rethrown once every running task has ended; tasks not yet begun are dropped.
// Safe for concurrent callers, and in a child after fork(). Floating-point state is the default one inside tasks.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& body);

}  // namespace offprin::cpu
