// The stages of update_scan over one L1-resident block, written once over the vector layer. Included inside the
// namespace of an instruction set. `n` is a multiple of 64: blocks are padded with pairs of zeros, which are never
// "changed".

constexpr int GROUPS = 64 / LANES;  // vectors for one word of mask

// What a first look at a block tells; it decides which short cuts the later stages may take.
struct Survey {
  unsigned base_largest, tuned_largest, smallest;  // magnitudes of codes

  bool nonfinite() const { return base_largest >= INFINITY_CODE || tuned_largest >= INFINITY_CODE; }
  bool nan() const { return base_largest > INFINITY_CODE || tuned_largest > INFINITY_CODE; }
  bool zeros() const { return smallest == 0; }
};

// Where the next block lies. Its lines are fetched a few at a time by the longer stages of this one: fetched all at
// once they would make that stage wait, and memory would be idle during the others.
struct Ahead {
  const uint8_t *next, *after;  // lines of the two sources by turns

  inline __attribute__((always_inline)) void fetch(int lines) {
    for (; lines > 0; --lines) {
      const uint8_t* line = next;
      __builtin_prefetch(line);
      next = after;
      after = line + 64;
    }
  }
};

// Surveys the block and writes the words of "stored bits differ".
static Survey survey(const uint8_t* a, const uint8_t* b, int64_t n, Ahead& ahead, int lines_ahead,
                     uint64_t* words) {
  const Codes magnitude = splat(MAGNITUDE);
  Codes base_largest = zero(), tuned_largest = zero(), least = splat(0xFFFF);
  for (int64_t w = 0; w < n / 64; ++w) {
    ahead.fetch(lines_ahead);
    Flags f[GROUPS];
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; ++g) {
      const Codes x = load_once(a + 128 * w + 2 * LANES * g), y = load_once(b + 128 * w + 2 * LANES * g);
      const Codes x_size = x & magnitude, y_size = y & magnitude;
      base_largest = larger(base_largest, x_size);
      tuned_largest = larger(tuned_largest, y_size);
      least = smaller(least, smaller(x_size, y_size));
      f[g] = equal(x, y);
    }
    words[w] = ~word(f);
  }
  return {largest(base_largest), largest(tuned_largest), smallest(least)};
}

// Calls use(w, x, y) for every word w, with the GROUPS vectors of base and tuned codes.
template <typename Use>
OFFPRIN_INLINE void each_word(const uint8_t* a, const uint8_t* b, int64_t n, Use use) {
  for (int64_t w = 0; w < n / 64; ++w) {
    Codes x[GROUPS], y[GROUPS];
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; ++g) {
      x[g] = load_once(a + 128 * w + 2 * LANES * g);
      y[g] = load_once(b + 128 * w + 2 * LANES * g);
    }
    use(w, x, y);
  }
}

OFFPRIN_INLINE Codes size_of(Codes x) { return x & splat(MAGNITUDE); }
OFFPRIN_INLINE Flags is_nan(Codes x) { return at_least(size_of(x), splat(INFINITY_CODE + 1)); }
OFFPRIN_INLINE Flags is_zero(Codes x) { return equal(size_of(x), zero()); }
OFFPRIN_INLINE Codes apart(Codes x, Codes y) { return subtract(larger(x, y), smaller(x, y)); }
// On the ordered line: the difference of the magnitudes, or their sum where the signs differ.
OFFPRIN_INLINE Codes ulp_distances(Codes x, Codes y) {
  const Codes x_size = size_of(x), y_size = size_of(y);
  return sum_where(x ^ y, x_size, y_size, apart(x_size, y_size));
}

// Takes pairs of zeros and pairs of NaN out of "stored bits differ".
static void forgive_zeros_and_nan(const uint8_t* a, const uint8_t* b, int64_t n, uint64_t* words) {
  each_word(a, b, n, [&](int64_t w, const Codes* x, const Codes* y) {
    Flags f[GROUPS];
    for (int g = 0; g < GROUPS; ++g) f[g] = (is_nan(x[g]) & is_nan(y[g])) | is_zero(x[g] | y[g]);
    words[w] &= ~word(f);
  });
}

static void words_stored(const uint8_t* a, const uint8_t* b, int64_t n, uint64_t* words) {
  each_word(a, b, n, [&](int64_t w, const Codes* x, const Codes* y) {
    Flags f[GROUPS];
    for (int g = 0; g < GROUPS; ++g) f[g] = equal(x[g], y[g]);
    words[w] = ~word(f);
  });
}

// ULP distance >= least, or one NaN.
static void words_ulp(const uint8_t* a, const uint8_t* b, int64_t n, unsigned least, uint64_t* words) {
  each_word(a, b, n, [&](int64_t w, const Codes* x, const Codes* y) {
    Flags f[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
      const Flags x_nan = is_nan(x[g]), y_nan = is_nan(y[g]);
      f[g] = (at_least(ulp_distances(x[g], y[g]), splat(static_cast<int>(least))) & ~(x_nan | y_nan)) | (x_nan ^ y_nan);
    }
    words[w] = word(f);
  });
}

// One comparison of fp32 values for all 64 elements of a word; plain loops that the compiler vectorises.
template <typename Changed>
OFFPRIN_INLINE void words_of_values(const float* a, const float* b, int64_t n, uint64_t* words, Changed changed) {
  for (int64_t w = 0; w < n / 64; ++w) {
    uint8_t flags[64];
    for (int i = 0; i < 64; ++i) flags[i] = changed(a[64 * w + i], b[64 * w + i]);
    words[w] = nonzero_bytes(flags);
  }
}

static void words_values(const Rule& rule, const float* a, const float* b, int64_t n, uint64_t* words) {
  const float threshold = static_cast<float>(rule.threshold);
  if (rule.code == BITWISE)
    words_of_values(a, b, n, words, [](float x, float y) { return values_differ(x, y); });
  else if (rule.code == STORAGE)
    words_of_values(a, b, n, words, [](float x, float y) { return bits_of(x) != bits_of(y); });
  else if (rule.code == ETA)
    words_of_values(a, b, n, words, [=](float x, float y) { return values_apart(x, y, threshold, true); });
  else
    words_of_values(a, b, n, words, [=](float x, float y) { return values_apart(x, y, threshold, false); });
}

// Sign flips and transitions between zero and nonzero.
static void count_transitions(const uint8_t* a, const uint8_t* b, int64_t n, const Survey& seen, int64_t* counters) {
  if (!seen.zeros() && !seen.nan()) {
    each_word(a, b, n, [&](int64_t, const Codes* x, const Codes* y) {
      Flags flip[GROUPS];
      for (int g = 0; g < GROUPS; ++g) flip[g] = at_least(x[g] ^ y[g], splat(SIGN));
      counters[SIGN_FLIPS] += __builtin_popcountll(word(flip));
    });
    return;
  }
  each_word(a, b, n, [&](int64_t, const Codes* x, const Codes* y) {
    Flags flip[GROUPS], born[GROUPS], dead[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
      const Flags number = ~(is_nan(x[g]) | is_nan(y[g])), x_zero = is_zero(x[g]), y_zero = is_zero(y[g]);
      flip[g] = at_least(x[g] ^ y[g], splat(SIGN)) & number & ~(x_zero | y_zero);
      born[g] = x_zero & ~y_zero & number;
      dead[g] = y_zero & ~x_zero & number;
    }
    counters[SIGN_FLIPS] += __builtin_popcountll(word(flip));
    counters[ZERO_TO_NONZERO] += __builtin_popcountll(word(born));
    counters[NONZERO_TO_ZERO] += __builtin_popcountll(word(dead));
  });
}

static void count_nonfinite(const uint8_t* a, const uint8_t* b, int64_t n, int64_t* counters) {
  each_word(a, b, n, [&](int64_t, const Codes* x, const Codes* y) {
    Flags x_nan[GROUPS], x_inf[GROUPS], y_nan[GROUPS], y_inf[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
      x_nan[g] = is_nan(x[g]);
      y_nan[g] = is_nan(y[g]);
      x_inf[g] = equal(size_of(x[g]), splat(INFINITY_CODE));
      y_inf[g] = equal(size_of(y[g]), splat(INFINITY_CODE));
    }
    counters[NAN_BASE] += __builtin_popcountll(word(x_nan));
    counters[INF_BASE] += __builtin_popcountll(word(x_inf));
    counters[NAN_TUNED] += __builtin_popcountll(word(y_nan));
    counters[INF_TUNED] += __builtin_popcountll(word(y_inf));
  });
}

// What the distances of a block tell the other stages. UNTOLD sign flips have to be counted by themselves.
struct Distant {
  static constexpr int64_t UNTOLD = -1;

  unsigned distance;    // the largest
  unsigned magnitudes;  // largest difference of the codes' magnitudes, unless there is a NaN
  int64_t sign_flips;   // unless there are zeros
};

// Writes the ULP distances, 0 where either is NaN.
static Distant write_distances(const uint8_t* a, const uint8_t* b, int64_t n, const Survey& seen, uint16_t* distances,
                               Tally& tally) {
  Codes most = zero(), most_apart = zero();
  uint8_t* out = reinterpret_cast<uint8_t*>(distances);
  if (seen.nan()) {
    each_word(a, b, n, [&](int64_t w, const Codes* x, const Codes* y) {
      Flags one_nan[GROUPS];
      for (int g = 0; g < GROUPS; ++g) {
        const Flags x_nan = is_nan(x[g]), y_nan = is_nan(y[g]);
        const Codes d = only(~(x_nan | y_nan), ulp_distances(x[g], y[g]));
        one_nan[g] = x_nan ^ y_nan;
        most = larger(most, d);
        store(out + 128 * w + 2 * LANES * g, d);
      }
      tally.nan_against_number += __builtin_popcountll(word(one_nan));
    });
  } else {
    for (int64_t i = 0; i < n / LANES; ++i) {
      const Codes x = load_once(a + 2 * LANES * i), y = load_once(b + 2 * LANES * i);
      const Codes x_size = size_of(x), y_size = size_of(y), difference = apart(x_size, y_size);
      const Codes d = sum_where(x ^ y, x_size, y_size, difference);
      most = larger(most, d);
      most_apart = larger(most_apart, difference);
      store(out + 2 * LANES * i, d);
    }
  }
  return {largest(most), largest(most_apart), Distant::UNTOLD};
}

// Counts the distances that reach 2^j, for every j from `first` up to `last` that matters.
static void count_reach(const uint16_t* distances, int64_t n, unsigned most, int first, int last, Tally& tally) {
  for (int j = first; j <= last && most >> j != 0; ++j) {
    Codes counts = zero();
    for (int64_t i = 0; i < n / LANES; ++i)
      counts = count_up(counts, at_least(load(distances + LANES * i), splat(1 << j)));
    tally.at_least[j] += code_total(counts);
  }
}
