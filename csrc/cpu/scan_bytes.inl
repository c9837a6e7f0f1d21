// The stages of update_scan that live on byte shuffles and fused arithmetic: AVX2 and AVX-512.

// Lines of the next block to fetch for every 64 elements, so that each stage fetches about as long as it computes.
constexpr int EXPONENT_LINES = 1, DISTANCE_LINES = 1, NORM_LINES = 2;

constexpr int ROUND = 32;  // vectors between two counts

// Positional population count: for each of the 8 bits, how many bytes have it set. Full adders sum vectors vertically,
// and only every thirty-second vector is counted out.
struct BitSums {
  alignas(64) uint8_t bits[5][WIDTH];  // running sums' bits of weight 1, 2, 4, 8 and 16

  // Calls use(j, count) for every bit j, and clears the sums.
  template <typename Use>
  void finish(Use use) {
    for (int level = 0; level < 5; ++level) count_out(load_words(bits[level]), 1 << level, use);
    __builtin_memset(bits, 0, sizeof bits);
  }

  // Adds up a round; calls use(j, count) for every bit j with what no longer fits the sums.
  template <typename Use>
  void add_round(const uint8_t (*hot)[WIDTH], Use use) {
    count_out(add(hot), ROUND, use);
  }

 private:
  // Adds a round of vectors to the running bits; returns the bits of weight ROUND.
  Words add(const uint8_t (*hot)[WIDTH]) {
    Words ones = load_words(bits[0]), twos = load_words(bits[1]), fours = load_words(bits[2]);
    Words eights = load_words(bits[3]), sixteens = load_words(bits[4]), thirty_two;
    Words two[2], four[4], eight[2], sixteen[2];
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
    store_words(bits[0], ones);
    store_words(bits[1], twos);
    store_words(bits[2], fours);
    store_words(bits[3], eights);
    store_words(bits[4], sixteens);
    return thirty_two;
  }

  template <typename Use>
  static void count_out(Bytes v, int64_t weight, Use use) {
    const int64_t counts[8] = {count_bit<0>(v), count_bit<1>(v), count_bit<2>(v), count_bit<3>(v),
                               count_bit<4>(v), count_bit<5>(v), count_bit<6>(v), count_bit<7>(v)};
    for (int j = 0; j < 8; ++j) use(j, weight * counts[j]);
  }
};

// Histograms of the base's exponents, of all and of changed elements: the sixteen exponents up to `top` become one-hot
// bytes.
struct Exponents {
  static constexpr int SLACK = 3;  // the window follows the data down when it lies this much too high
  enum Table { ALL_HIGH, ALL_LOW, CHANGED_HIGH, CHANGED_LOW, TABLES };

  BitSums sums[TABLES];
  int top;

  void begin() {
    __builtin_memset(sums, 0, sizeof sums);
    top = -1;
  }

  // Bit j of a table's bytes stands for the j-th exponent below the table's first.
  auto bins_of(int table, Tally& tally) const {
    int64_t* bins = tally.exponents[table / 2];
    const int first = top - 8 * (table % 2);
    return [=](int j, int64_t count) {
      if (j <= first) bins[first - j] += count;
    };
  }

  void finish(Tally& tally) {
    if (top < 0) return;
    for (int t = 0; t < TABLES; ++t) sums[t].finish(bins_of(t, tally));
    top = -1;
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
      // Steps below the top; those outside the window get their top bit set, which makes the lookup give 0.
      const Bytes steps = add_saturated(subtract_bytes(splat_byte(top), exponents_of(codes)), splat_byte(0x70));
      const uint64_t outside = top_bits(steps);
      if (__builtin_expect(outside != 0, 0)) count_outside(codes, outside, changed, tally);
      const Bytes hot_high = lookup(high, steps), hot_low = lookup(low, steps);
      store_words(hot[ALL_HIGH][v], hot_high);
      store_words(hot[ALL_LOW][v], hot_low);
      store_words(hot[CHANGED_HIGH][v], keep_bytes(hot_high, changed));
      store_words(hot[CHANGED_LOW][v], keep_bytes(hot_low, changed));
    }
    for (int t = 0; t < TABLES; ++t) sums[t].add_round(hot[t], bins_of(t, tally));
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
};

// ULP distances. Most are small: those up to 126 become bytes with bit j set from 2^(j+1) on. The others, and all that
// lie between different signs, are far and looked at one by one: in trained weights only weights near zero go far.
struct Distances {
  static constexpr unsigned FAR = 127;
  static constexpr int STEPS = 6;  // thresholds that bytes tell, from 2^1 on

  BitSums sums;
  int64_t far[17];  // far distances by the number of their bits
  int64_t taken;    // far distances that the bytes took to reach all their thresholds

  void begin() { __builtin_memset(this, 0, sizeof *this); }

  // The bit sums' use of their counts.
  static auto thresholds_of(Tally& tally) {
    return [&](int j, int64_t count) {
      if (j < STEPS) tally.at_least[j + 1] += count;
    };
  }

  void finish(Tally& tally) {
    sums.finish(thresholds_of(tally));
    int64_t reach = 0;
    for (int j = 15; j > 0; --j) {
      reach += far[j + 1];
      tally.at_least[j] += reach - (j <= STEPS ? taken : 0);
    }
    begin();
  }

  // Where there is no NaN, `bitwise` are the words of "distance is not 0".
  Distant add_block(const uint8_t* a, const uint8_t* b, const uint64_t* bitwise, int64_t n, const Survey& seen,
                    uint16_t* distances, Ahead& ahead, Tally& tally) {
    Distant result{FAR, FAR, 0};
    bool all_told = true;
    for (int64_t done = 0; done < n; done += ROUND * WIDTH) {
      const int64_t size = n - done < ROUND * WIDTH ? n - done : ROUND * WIDTH;
      const uint8_t *x = a + 2 * done, *y = b + 2 * done;
      if (!seen.nan() && add_round(x, y, bitwise + done / 64, size, ahead, result, tally)) continue;
      const Distant told = write_distances(x, y, size, seen, distances, tally);
      add_any_round(distances, size, told.distance, tally);
      if (told.magnitudes > result.magnitudes) result.magnitudes = told.magnitudes;
      all_told = false;
    }
    if (!all_told) result.sign_flips = Distant::UNTOLD;
    return result;
  }

 private:
  // Any distances: the thresholds that bytes do not tell take one look each at all of them.
  void add_any_round(const uint16_t* distances, int64_t n, unsigned most, Tally& tally) {
    alignas(64) uint8_t steps[ROUND][WIDTH];
    const Codes top = splat(0x7FFF);
    for (int64_t v = 0; v < ROUND; ++v) {
      const uint16_t* d = distances + WIDTH * v;
      const bool inside = v < n / WIDTH;
      store_words(steps[v], inside ? steps_of(pack_signed(smaller(load(d), top), smaller(load(d + LANES), top)))
                                   : zero_words());
    }
    sums.add_round(steps, thresholds_of(tally));
    count_reach(distances, n, most, 0, 0, tally);
    count_reach(distances, n, most, STEPS + 1, 15, tally);
  }

  // Adds nothing and returns false where so many distances are far that one by one would take long.
  bool add_round(const uint8_t* a, const uint8_t* b, const uint64_t* bitwise, int64_t n, Ahead& ahead, Distant& result,
                 Tally& tally) {
    alignas(64) uint8_t steps[ROUND][WIDTH];
    uint64_t which[ROUND], any = 0;
    int64_t count = 0;
    for (int64_t v = 0; v < n / WIDTH; ++v) {
      if (WIDTH == 64 || v % 2 == 0) ahead.fetch(DISTANCE_LINES);
      const uint8_t *x = a + 2 * WIDTH * v, *y = b + 2 * WIDTH * v;
      const Codes first = wrapped_distances(load(x), load(y));
      const Bytes d = pack_signed(first, wrapped_distances(load(x + WIDTH), load(y + WIDTH)));
      store_words(steps[v], steps_of(d));
      which[v] = top_bits(subtract_bytes(d, splat_byte(-1)));
      any |= static_cast<uint64_t>(which[v] != 0) << v;
      count += __builtin_popcountll(which[v]);
    }
    if (count > n / 16) return false;
    for (int64_t v = n / WIDTH; v < ROUND; ++v) store_words(steps[v], zero_words());
    sums.add_round(steps, thresholds_of(tally));
    for (int64_t w = 0; w < n / 64; ++w) tally.at_least[0] += __builtin_popcountll(bitwise[w]);
    for (; any != 0; any &= any - 1) {
      const int v = __builtin_ctzll(any);
      for (uint64_t left = which[v]; left != 0; left &= left - 1) {
        // The bytes are in the order of pack_signed.
        const int i = __builtin_ctzll(left), element = WIDTH * v + i % 16 / 8 * LANES + i / 16 * 8 + i % 8;
        add_far(a + 2 * element, b + 2 * element, result);
      }
    }
    return true;
  }

  void add_far(const uint8_t* a, const uint8_t* b, Distant& result) {
    uint16_t x, y;
    __builtin_memcpy(&x, a, sizeof x);
    __builtin_memcpy(&y, b, sizeof y);
    const unsigned x_size = x & MAGNITUDE, y_size = y & MAGNITUDE, flip = (x ^ y) >> 15;
    const unsigned magnitudes = x_size > y_size ? x_size - y_size : y_size - x_size;
    const unsigned distance = flip ? x_size + y_size : magnitudes;
    ++far[31 - __builtin_clz(2 * distance + 1)];
    // A number against its negative wraps to 0x8000, which the bytes take to reach none.
    taken += flip == 0 || magnitudes != 0;
    result.sign_flips += flip;
    if (magnitudes > result.magnitudes) result.magnitudes = magnitudes;
  }
};

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

constexpr bool NORMS_ASK_DISTANCES = true;  // short distances make them quicker
constexpr int64_t NORM_BATCH = 256;         // elements

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
      most = EXACT ? larger_number(larger_number(most, d_even), d_odd) : larger_size(larger_size(most, d_even), d_odd);
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
