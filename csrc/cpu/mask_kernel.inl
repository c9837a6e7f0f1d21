// mask_algebra over one task's part, written once over the vector layer. Included inside the namespace of an
// instruction set, after column_counters.inl.

constexpr int64_t WORDS = static_cast<int64_t>(sizeof(Words) / sizeof(uint64_t));  // words in a vector

static void pack(const uint8_t* dense, int64_t columns, uint64_t* words) {
  const int64_t whole = columns / 64, left = columns % 64;
  for (int64_t w = 0; w < whole; ++w) words[w] = nonzero_bytes(dense + 64 * w);
  if (left == 0) return;
  uint8_t tail[64] = {};
  __builtin_memcpy(tail, dense + 64 * whole, static_cast<size_t>(left));
  words[whole] = nonzero_bytes(tail);
}

static void unpack(const uint64_t* words, int64_t columns, uint8_t* dense) {
  const int64_t whole = columns / 64, left = columns % 64;
  for (int64_t w = 0; w < whole; ++w) store_counters(dense + 64 * w, add_bits(zero_counters(), words[w], 1));
  if (left == 0) return;
  uint8_t tail[64];
  store_counters(tail, add_bits(zero_counters(), words[whole], 1));
  __builtin_memcpy(dense + 64 * whole, tail, static_cast<size_t>(left));
}

constexpr int64_t CHUNK = 64;  // words counted at once

static int64_t popcount(const uint64_t* words, int64_t n) {
  Words sum = zero_words();
  int64_t i = 0;
  for (; i + CHUNK <= n; i += CHUNK) sum = add_words(sum, common_bits<CHUNK / WORDS>(words + i, words + i));
  int64_t total = word_total(sum);
  for (; i < n; ++i) total += __builtin_popcountll(words[i]);
  return total;
}

// Chunks are short, so that memory streams while the pairs of a chunk are counted.
static void pairs(const uint64_t* const* masks, int64_t count, int64_t begin, int64_t n, uint64_t* sums) {
  int64_t w = begin;
  for (; w + CHUNK <= begin + n; w += CHUNK) {
    uint64_t* sum = sums;
    for (int64_t i = 0; i < count; ++i) {
      // Far enough ahead for the counting in between to hide the wait.
      for (int64_t line = 0; line < CHUNK; line += 8) __builtin_prefetch(masks[i] + w + 4 * CHUNK + line);
      for (int64_t j = i; j < count; ++j, sum += WIDEST_VECTOR)
        store_words(sum, add_words(load_words(sum), common_bits<CHUNK / WORDS>(masks[i] + w, masks[j] + w)));
    }
  }
  for (; w < begin + n; ++w) {
    uint64_t* sum = sums;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i; j < count; ++j, sum += WIDEST_VECTOR)
        *sum += static_cast<uint64_t>(__builtin_popcountll(masks[i][w] & masks[j][w]));
  }
}

OFFPRIN_INLINE uint64_t bit_counts(uint64_t word) { return static_cast<uint64_t>(__builtin_popcountll(word)); }

// Votes on one vector of coordinates, as binary numbers that lie across `planes`; then a count for each possible vote.
// A COUNT other than 0 is the number of masks: the planes then live in registers.
template <typename W, int COUNT, typename Load, typename Add>
OFFPRIN_INLINE void vote(int64_t masks, Load load_mask, Add add_votes) {
  const int64_t count = COUNT != 0 ? COUNT : masks;
  W planes[COUNT != 0 ? 4 : 32];
  int used = 0;
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) {
    W carry = load_mask(i);
#pragma GCC unroll 4
    for (int p = 0; p < used; ++p) {
      const W sum = planes[p] ^ carry;
      carry = planes[p] & carry;
      planes[p] = sum;
    }
    // A new plane is needed whenever the number of masks so far reaches a power of two.
    if (((i + 1) & i) == 0) planes[used++] = carry;
  }
#pragma GCC unroll 8
  for (int64_t votes = 1; votes <= count; ++votes) {
    W agreed = votes & 1 ? planes[0] : ~planes[0];
#pragma GCC unroll 4
    for (int p = 1; p < used; ++p) agreed = agreed & (votes >> p & 1 ? planes[p] : ~planes[p]);
    add_votes(votes, agreed);
  }
}

template <int COUNT>
static void agreement_of(const uint64_t* const* masks, int64_t count, int64_t begin, int64_t n, uint64_t* sums) {
  int64_t w = begin;
  for (; w + WORDS <= begin + n; w += WORDS) {
    vote<Words, COUNT>(
        count, [&](int64_t i) { return load_words(masks[i] + w); },
        [&](int64_t votes, Words agreed) {
          uint64_t* sum = sums + votes * WIDEST_VECTOR;
          store_words(sum, add_words(load_words(sum), bit_counts(agreed)));
        });
  }
  for (; w < begin + n; ++w) {
    vote<uint64_t, 0>(
        count, [&](int64_t i) { return masks[i][w]; },
        [&](int64_t votes, uint64_t agreed) { sums[votes * WIDEST_VECTOR] += bit_counts(agreed); });
  }
}

static void agreement(const uint64_t* const* masks, int64_t count, int64_t begin, int64_t n, uint64_t* sums) {
  using Count = void (*)(const uint64_t* const*, int64_t, int64_t, int64_t, uint64_t*);
  constexpr Count fixed[] = {agreement_of<0>, agreement_of<1>, agreement_of<2>, agreement_of<3>, agreement_of<4>,
                             agreement_of<5>, agreement_of<6>, agreement_of<7>, agreement_of<8>};
  fixed[count <= 8 ? count : 0](masks, count, begin, n, sums);
}

// Adds up to seven rows of one word at once: their sum as three bits.
OFFPRIN_INLINE Counters add_sum(Counters c, uint64_t ones, uint64_t twos, uint64_t fours) {
  return add_bits(add_bits(add_bits(c, ones, 1), twos, 2), fours, 4);
}

template <typename W, typename Load>
OFFPRIN_INLINE void add_seven(Load row, W& ones, W& twos, W& fours) {
  W sum, carry[3];
  full_add(carry[0], sum, row(0), row(1), row(2));
  full_add(carry[1], sum, sum, row(3), row(4));
  full_add(carry[2], ones, sum, row(5), row(6));
  full_add(fours, twos, carry[0], carry[1], carry[2]);
}

// Rows [0, rows) of `row_words` words, at most seven of them.
static void count_seven(const uint64_t* words, int64_t stride, int64_t rows, int64_t row_words, uint8_t* counters) {
  int64_t w = 0;
  for (; rows == 7 && w + WORDS <= row_words; w += WORDS) {
    // Strips of rows are too short for the processor to fetch ahead by itself.
    for (int r = 7; r < 14; ++r) __builtin_prefetch(words + r * stride + w);
    Words ones, twos, fours;
    add_seven<Words>([&](int r) { return load_words(words + r * stride + w); }, ones, twos, fours);
    uint64_t sum[3][WORDS];
    store_words(sum[0], ones);
    store_words(sum[1], twos);
    store_words(sum[2], fours);
#pragma GCC unroll 8
    for (int i = 0; i < WORDS; ++i) {
      uint8_t* c = counters + 64 * (w + i);
      store_counters(c, add_sum(load_counters(c), sum[0][i], sum[1][i], sum[2][i]));
    }
  }
  for (; w < row_words; ++w) {
    Counters c = load_counters(counters + 64 * w);
    for (int64_t r = 0; r < rows; ++r) c = add_bits(c, words[r * stride + w], 1);
    store_counters(counters + 64 * w, c);
  }
}

static void columns(const uint64_t* words, int64_t stride, int64_t rows, int64_t columns, uint8_t* counters,
                    int64_t* sums, pthread_mutex_t* lock) {
  constexpr int64_t BATCH = COUNTER_ROWS / 7 * 7;
  for (int64_t row = 0; row < rows; row += 7) {
    const int64_t batch = rows - row < 7 ? rows - row : 7;
    count_seven(words + row * stride, stride, batch, (columns + 63) / 64, counters);
    if ((row + 7) % BATCH == 0 || row + 7 >= rows) empty_counters(counters, columns, sums, lock);
  }
}

extern const MaskKernels mask_kernels = {pack, unpack, popcount, pairs, agreement, columns};
