// Column counts are kept in bytes and emptied into 64-bit sums before a byte can overflow. Included inside the
// namespace of an instruction set.

constexpr int64_t COUNTER_ROWS = 255;  // rows after which a byte counter must be emptied

// Adds the byte counters to the sums and clears them. The lock is for threads at work on other rows of these columns.
static void empty_counters(uint8_t* counters, int64_t columns, int64_t* sums, pthread_mutex_t* lock) {
  pthread_mutex_lock(lock);
  for (int64_t i = 0; i < columns; ++i) sums[i] += counters[i];
  pthread_mutex_unlock(lock);
  __builtin_memset(counters, 0, static_cast<size_t>((columns + 63) / 64 * 64));
}
