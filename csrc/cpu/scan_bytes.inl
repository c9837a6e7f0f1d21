// The stages of update_scan that live on byte shuffles and fused arithmetic: AVX2 and AVX-512.

// Lines of the next block to fetch for every 64 elements, so that each stage fetches about as long as it computes.
constexpr int EXPONENT_LINES = 1, NORM_LINES = 2;

// Histograms of the base's exponents, of all and of changed elements, by positional population count: the sixteen
// exponents up to `top` become one-hot bytes, which full adders sum vertically; only every thirty-second vector is
// counted out.
struct Exponents {
  static constexpr int ROUND = 32;   // vectors between two counts
  static constexpr int SLACK = 3;    // the window follows the data down when it lies this much too high
  enum Table { ALL_HIGH, ALL_LOW, CHANGED_HIGH, CHANGED_LOW, TABLES };

  alignas(64) uint8_t sums[TABLES][5][WIDTH];  // running bits of weight 1, 2, 4, 8 and 16
  int top;

  void begin() {
    __builtin_memset(sums, 0, sizeof sums);
    top = -1;
  }

  // Adds `weight` times the number of bytes with bit j set to the bin of the j-th exponent below the table's first.
  void count_out(int table, Bytes v, int64_t weight, Tally& tally) const {
    int64_t* bins = tally.exponents[table / 2];
    const int first = top - 8 * (table % 2);
    const int64_t counts[8] = {count_bit<0>(v), count_bit<1>(v), count_bit<2>(v), count_bit<3>(v),
                               count_bit<4>(v), count_bit<5>(v), count_bit<6>(v), count_bit<7>(v)};
    for (int j = 0; j < 8 && j <= first; ++j) bins[first - j] += weight * counts[j];
  }

  void finish(Tally& tally) {
    for (int t = 0; t < TABLES && top >= 0; ++t)
      for (int level = 0; level < 5; ++level) count_out(t, load_words(sums[t][level]), 1 << level, tally);
    begin();
  }

  void add_block(const uint8_t* a, const uint64_t* words, int64_t n, unsigned largest_code, Ahead& ahead,
                 Tally& tally) {
    const int largest_exponent = static_cast<int>(largest_code >> MANTISSA_BITS);
    if (largest_exponent > top || largest_exponent < top - SLACK) {
      finish(tally);
      top = largest_exponent;
    }
    for (int64_t done = 0; done < n; done += ROUND * WIDTH) {
      const int64_t left = (n - done) / WIDTH;
      const uint8_t* changed = reinterpret_cast<const uint8_t*>(words) + done / 8;
      add_round(a + 2 * done, changed, left < ROUND ? left : ROUND, ahead, tally);
    }
  }

 private:
  void add_round(const uint8_t* a, const uint8_t* words, int64_t vectors, Ahead& ahead, Tally& tally) {
    static const uint8_t high[16] = {1, 2, 4, 8, 16, 32, 64, 128, 0, 0, 0, 0, 0, 0, 0, 0};
    static const uint8_t low[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128};
    alignas(64) uint8_t hot[TABLES][ROUND][WIDTH];
    for (int64_t v = 0; v < ROUND; ++v) {
      if (v >= vectors) {
        for (int t = 0; t < TABLES; ++t) store_words(hot[t][v], zero_words());
        continue;
      }
      if (WIDTH == 64 || v % 2 == 0) ahead.fetch(EXPONENT_LINES);
      uint64_t changed = 0;
      __builtin_memcpy(&changed, words + v * (WIDTH / 8), WIDTH / 8);
      const uint8_t* codes = a + 2 * WIDTH * v;
      const Codes first = shift_right<8>(doubled(load(codes))), second = shift_right<8>(doubled(load(codes + WIDTH)));
      const Bytes exponent = pack_ordered(first, second);
      // Steps below the top; those outside the window get their top bit set, which makes the lookup give 0.
      const Bytes steps = add_saturated(subtract_bytes(splat_byte(top), exponent), splat_byte(0x70));
      const uint64_t outside = top_bits(steps);
      if (__builtin_expect(outside != 0, 0)) count_outside(codes, outside, changed, tally);
      const Bytes hot_high = lookup(high, steps), hot_low = lookup(low, steps);
      store_words(hot[ALL_HIGH][v], hot_high);
      store_words(hot[ALL_LOW][v], hot_low);
      store_words(hot[CHANGED_HIGH][v], keep_bytes(hot_high, changed));
      store_words(hot[CHANGED_LOW][v], keep_bytes(hot_low, changed));
    }
    for (int t = 0; t < TABLES; ++t) count_out(t, add_up(hot[t], sums[t]), ROUND, tally);
  }

  static void count_outside(const uint8_t* codes, uint64_t outside, uint64_t changed, Tally& tally) {
    for (; outside != 0; outside &= outside - 1) {
      const int i = __builtin_ctzll(outside);
      uint16_t code;
      __builtin_memcpy(&code, codes + 2 * i, sizeof code);
      const unsigned exponent = (code & MAGNITUDE) >> MANTISSA_BITS;
      ++tally.exponents[0][exponent];
      tally.exponents[1][exponent] += static_cast<int64_t>(changed >> i & 1);
    }
  }

  // Adds a round of vectors to the running bits; returns the bits of weight ROUND.
  static Words add_up(const uint8_t (*hot)[WIDTH], uint8_t (*sum)[WIDTH]) {
    Words ones = load_words(sum[0]), twos = load_words(sum[1]), fours = load_words(sum[2]), eights = load_words(sum[3]);
    Words sixteens = load_words(sum[4]), thirty_two, two[2], four[4], eight[2], sixteen[2];
    for (int half = 0; half < 2; ++half, hot += 16) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        full_add(two[0], ones, ones, load_words(hot[4 * q]), load_words(hot[4 * q + 1]));
        full_add(two[1], ones, ones, load_words(hot[4 * q + 2]), load_words(hot[4 * q + 3]));
        full_add(four[q], twos, twos, two[0], two[1]);
      }
      full_add(eight[0], fours, fours, four[0], four[1]);
      full_add(eight[1], fours, fours, four[2], four[3]);
      full_add(sixteen[half], eights, eights, eight[0], eight[1]);
    }
    full_add(thirty_two, sixteens, sixteens, sixteen[0], sixteen[1]);
    store_words(sum[0], ones);
    store_words(sum[1], twos);
    store_words(sum[2], fours);
    store_words(sum[3], eights);
    store_words(sum[4], sixteens);
    return thirty_two;
  }
};

constexpr int64_t NORM_BATCH = 256;  // elements

// Thresholds 2^0 .. 2^(T-1) over distances that fit in bytes.
template <int T>
OFFPRIN_INLINE void count_byte_distances(const uint16_t* distances, int64_t n, int64_t* at_least_counts) {
  Bytes counts[T];
  for (int j = 0; j < T; ++j) counts[j] = zero_words();
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Bytes d = pack(load(distances + i), load(distances + i + LANES));
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) counts[j] = count_up_at_least(counts[j], d, splat_byte(1 << j));
  }
  for (int j = 0; j < T; ++j) at_least_counts[j] += byte_total(counts[j]);
}

// Thresholds from 2^8 on. Few distances reach them in trained weights (those of weights near zero), so that these are
// looked at one by one.
static void count_far_distances(const uint16_t* distances, int64_t n, unsigned most, int64_t* at_least_counts) {
  uint64_t far[BLOCK_WORDS];
  int64_t count = 0;
  for (int64_t w = 0; w < n / 64; ++w) {
    Flags f[GROUPS];
    for (int g = 0; g < GROUPS; ++g) f[g] = at_least(load(distances + 64 * w + LANES * g), splat(256));
    far[w] = word(f);
    count += __builtin_popcountll(far[w]);
  }
  if (count > n / 32) return count_wide_distances(distances, n, most, 8, at_least_counts);
  for (int64_t w = 0; w < n / 64; ++w) {
    for (uint64_t left = far[w]; left != 0; left &= left - 1) {
      const unsigned distance = distances[64 * w + __builtin_ctzll(left)];
      for (int j = 8; distance >> j != 0; ++j) ++at_least_counts[j];
    }
  }
}

// Distances |b - a| > bound in fp32, where no element is NaN.
static int64_t count_apart(const uint8_t* a, const uint8_t* b, int64_t n, float bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += LANES) {
    const Codes x = load_once(a + 2 * i), y = load_once(b + 2 * i);
    count += count_larger(subtract_floats(even_values(y), even_values(x)), bound);
    count += count_larger(subtract_floats(odd_values(y), odd_values(x)), bound);
  }
  return count;
}

static void count_distances(const uint16_t* distances, int64_t n, unsigned most, int64_t* at_least_counts) {
  static_assert(BLOCK / WIDTH <= 255, "byte counters must not overflow");
  // Packing to bytes takes 16-bit lanes as signed.
  if (most >= 0x8000) return count_wide_distances(distances, n, most, 0, at_least_counts);
  if (most >= 256) count_far_distances(distances, n, most, at_least_counts);
  if (most >= 32) return count_byte_distances<8>(distances, n, at_least_counts);
  if (most >= 8) return count_byte_distances<5>(distances, n, at_least_counts);
  if (most >= 4) return count_byte_distances<3>(distances, n, at_least_counts);
  if (most >= 2) return count_byte_distances<2>(distances, n, at_least_counts);
  if (most >= 1) return count_byte_distances<1>(distances, n, at_least_counts);
}

// Adds one batch to the sums: fp32 values whose even elements come first, and their updates (EXACT) or tuned values.
template <bool EXACT>
OFFPRIN_INLINE void add_batch(const float (*base)[NORM_BATCH / 2], const float (*other)[NORM_BATCH / 2],
                              NormSums& sums) {
  constexpr int HALF = NORM_LANES / 2 / DOUBLES;  // accumulators for the even elements, and as many for the odd ones
  Doubles total[NORMS - 1][2 * HALF];
  for (int s = 0; s < NORMS - 1; ++s)
    for (int h = 0; h < 2 * HALF; ++h) total[s][h] = load_doubles(sums.lanes[s] + DOUBLES * h);
  for (int64_t i = 0; i < NORM_BATCH / 2; i += NORM_LANES / 2) {
#pragma GCC unroll 4
    for (int h = 0; h < 2 * HALF; ++h) {
      const int64_t at = i + DOUBLES * (h % HALF);
      const Doubles value = widen(base[h / HALF] + at), second = widen(other[h / HALF] + at);
      const Doubles update = EXACT ? second : subtract_doubles(second, value);
      total[BASE_SQUARED][h] = EXACT ? fused(value, value, total[BASE_SQUARED][h])
                                     : unfused(value, value, total[BASE_SQUARED][h]);
      total[UPDATE_SQUARED][h] = EXACT ? fused(update, update, total[UPDATE_SQUARED][h])
                                       : unfused(update, update, total[UPDATE_SQUARED][h]);
      total[BASE_DOT_UPDATE][h] = EXACT ? fused(value, update, total[BASE_DOT_UPDATE][h])
                                        : unfused(value, update, total[BASE_DOT_UPDATE][h]);
    }
  }
  for (int s = 0; s < NORMS - 1; ++s)
    for (int h = 0; h < 2 * HALF; ++h) store_doubles(sums.lanes[s] + DOUBLES * h, total[s][h]);
}

// EXACT: every difference is exact in fp32 and every product in fp64, so that fp32 subtraction and fused sums give the
// same bits as the general form.
template <bool EXACT>
OFFPRIN_INLINE void add_code_norms_as(const uint8_t* a, const uint8_t* b, int64_t n, Ahead& ahead, NormSums& sums) {
  // In batches through memory: converting to fp64 on load saves the shuffle that splits a vector in two.
  alignas(64) float base[2][NORM_BATCH / 2], other[2][NORM_BATCH / 2];
  Words most = zero_words();
  for (int64_t done = 0; done < n; done += NORM_BATCH) {
    const int64_t size = n - done < NORM_BATCH ? n - done : NORM_BATCH;
    if (size < NORM_BATCH) {
      __builtin_memset(base, 0, sizeof base);
      __builtin_memset(other, 0, sizeof other);
    }
    for (int64_t i = 0; i < size; i += LANES) {
      const Codes x = load_once(a + 2 * (done + i)), y = load_once(b + 2 * (done + i));
      const Floats x_even = even_values(x), x_odd = odd_values(x), y_even = even_values(y), y_odd = odd_values(y);
      const Floats d_even = subtract_floats(y_even, x_even), d_odd = subtract_floats(y_odd, x_odd);
      most = larger_size(larger_size(most, d_even), d_odd);
      store_floats(base[0] + i / 2, x_even);
      store_floats(base[1] + i / 2, x_odd);
      store_floats(other[0] + i / 2, EXACT ? d_even : y_even);
      store_floats(other[1] + i / 2, EXACT ? d_odd : y_odd);
    }
    ahead.fetch(NORM_LINES * NORM_BATCH / 64);
    add_batch<EXACT>(base, other, sums);
  }
  const unsigned size = largest_size(most);
  if (size > sums.largest) sums.largest = size;
}

static void add_code_norms(const uint8_t* a, const uint8_t* b, int64_t n, bool exact, Ahead& ahead,
                           NormSums& sums) {
  exact ? add_code_norms_as<true>(a, b, n, ahead, sums) : add_code_norms_as<false>(a, b, n, ahead, sums);
}
