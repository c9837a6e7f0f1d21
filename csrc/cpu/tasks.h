// What the task side of both ops needs: locks for strips of columns, and clearing large outputs.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "sizes.h"

namespace offprin::cpu {


// A task on fewer elements than this is over before a second thread has woken up (some 30 us).
constexpr int64_t SMALL = 1 << 17;

// Locks for the sums of strips of columns; strips far apart may share one.
class ColumnLocks {
 public:
  ColumnLocks() {
    for (pthread_mutex_t& lock : locks_) pthread_mutex_init(&lock, nullptr);
  }
  ~ColumnLocks() {
    for (pthread_mutex_t& lock : locks_) pthread_mutex_destroy(&lock);
  }
  ColumnLocks(const ColumnLocks&) = delete;
  ColumnLocks& operator=(const ColumnLocks&) = delete;

  pthread_mutex_t* of_column(int64_t column) { return locks_ + column / STRIP % COUNT; }

 private:
  static constexpr int COUNT = 64;
  pthread_mutex_t locks_[COUNT];
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Zeroes an output that may be as large as the input.
inline void clear(int64_t* out, int64_t count, int threads) {
  constexpr int64_t PIECE = SMALL;
  parallel_for(divide_up(count, PIECE), threads, [=](int64_t i) {
    const int64_t size = count - i * PIECE < PIECE ? count - i * PIECE : PIECE;
    std::memset(out + i * PIECE, 0, static_cast<size_t>(size) * sizeof *out);
  });
}

}  // namespace offprin::cpu
