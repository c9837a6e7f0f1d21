// AdamW on blocks of one tensor. Included inside the namespace of an instruction set, behind namespace offprin's
// numerics.h and the vector layer.

using adamw::BLOCK;

struct Factors {
  float decay, lerp, beta2, square, eps, scale;
  bool near_grad;
};

OFFPRIN_INLINE float widened(float x) { return x; }
OFFPRIN_INLINE float widened(uint16_t code) { return bf16_to_fp32(code); }
OFFPRIN_INLINE void narrow(float x, float& stored) { stored = x; }
OFFPRIN_INLINE void narrow(float x, uint16_t& stored) { stored = round_to_bf16(x); }
// The value in bf16; of NaN anything.
OFFPRIN_INLINE float visible(float x) {
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
}

// Whether a step changed the value in bf16 (see visibly_differ), given that it never turns NaN into a number.
OFFPRIN_INLINE bool visibly_changed(float before, float after) {
  return ((visible(before) != visible(after)) | (after != after)) & (before == before);
}

// The same for 64 codes, as bits.
OFFPRIN_INLINE uint64_t visibly_changed(const uint16_t* before, const uint16_t* after) {
  constexpr int GROUPS = 64 / LANES;
  Flags same[GROUPS];
#pragma GCC unroll 8
  for (int g = 0; g < GROUPS; ++g) {
    const Codes a = load(before + LANES * g), b = load(after + LANES * g), size = splat(MAGNITUDE);
    same[g] = equal(a, b) | equal((a | b) & size, zero()) | at_least(a & size, splat(INFINITY_CODE + 1));
  }
  return ~word(same);
}

// A parameter in fp32, with what its rounding kept of it.
template <int ROUNDING, typename P>
OFFPRIN_INLINE float opened(P param, const uint16_t* extra, int64_t i) {
  if constexpr (ROUNDING == adamw::MASTER)
    return join_master(param, extra[i]);
  else if constexpr (ROUNDING == adamw::KAHAN)
    return widened(param) + widened(extra[i]);
  else
    return widened(param);
}

template <int ROUNDING, typename P>
OFFPRIN_INLINE void closed(float w, const uint16_t* noise, P& param, uint16_t* extra, int64_t i) {
  if constexpr (ROUNDING == adamw::MASTER) {
    split_master(w, param, extra[i]);
  } else if constexpr (ROUNDING == adamw::STOCHASTIC) {
    param = round_stochastic(w, noise[i]);
  } else {
    narrow(w, param);
    // nothing can be kept of what overflowed
    if constexpr (ROUNDING == adamw::KAHAN)
      extra[i] = round_to_bf16(float_of(offprin::select(is_finite_code(param), bits_of(w - widened(param)), 0)));
  }
}

// One step of n coordinates; every array has an entry for each of them. Those that ROUNDING does not need may be null.
// Not SCALED, the gradient's scale is 1 or -1, and the division is a product: divisions bound the whole step.
template <typename P, typename S, int ROUNDING, bool TRACKED, bool SCALED>
__attribute__((noinline)) static void advance(int64_t n, const Factors& factors, P* __restrict param,
                                              const P* __restrict grad, S* __restrict exp_avg, S* __restrict exp_avg_sq,
                                              uint16_t* __restrict extra, const uint16_t* __restrict noise,
                                              const float* __restrict step_size, const float* __restrict root,
                                              uint16_t* __restrict old, uint32_t* __restrict same) {
  const Factors f = factors;
  for (int64_t i = 0; i < n; ++i) {
    const float g = SCALED ? widened(grad[i]) / f.scale : widened(grad[i]) * f.scale;
    const float m = widened(exp_avg[i]), v = widened(exp_avg_sq[i]);
    const P before = param[i];
    float w = opened<ROUNDING>(before, extra, i) * f.decay;
    const float new_m = __builtin_fmaf(f.lerp, g - m, float_of(offprin::select(f.near_grad, bits_of(g), bits_of(m))));
    const float new_v = __builtin_fmaf(f.square * g, g, f.beta2 * v);
    w -= (step_size[i] * new_m) / (__builtin_sqrtf(new_v) / root[i] + f.eps);
    narrow(new_m, exp_avg[i]);
    narrow(new_v, exp_avg_sq[i]);
    closed<ROUNDING>(w, noise, param[i], extra, i);
    if constexpr (TRACKED && sizeof(P) == 2)
      old[i] = before;
    else if constexpr (TRACKED)
      same[i] = !visibly_changed(before, param[i]);
  }
}

// The lowest `n` bits, n at most 64.
OFFPRIN_INLINE uint64_t lowest(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// how far list_places may write beyond its end
constexpr int64_t LIST_SLACK = 4;

// Writes four places, of which as many count as the word has bits; returns the rest of the word.
OFFPRIN_INLINE uint64_t list_four(uint64_t word, uint32_t place, uint32_t* places) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, word &= word - 1)
    places[i] = place + static_cast<uint32_t>(__builtin_ctzll(word | uint64_t{1} << 63));
  return word;
}

// Writes the places of the set bits, counted from `place` on.
static void list_places(const uint64_t* words, int64_t count, uint32_t place, uint32_t* places) {
  for (int64_t i = 0; i < count; ++i, place += 64) {
    // By fours without asking, for a branch on each bit would be mispredicted once a word.
    const int set = __builtin_popcountll(words[i]);
    uint64_t word = list_four(words[i], place, places);
    for (int listed = 4; listed < set; listed += 4) word = list_four(word, place, places + listed);
    places += set;
  }
}

// how far pick may write beyond its end
constexpr int64_t PICK_SLACK = 32;

// From this many coordinates of a block on, reading all of it in order is faster than going to each: measured at 3.5 %
// of fp32 and 2 % of bf16 parameters.
template <typename P>
constexpr int64_t DENSE = sizeof(P) == 4 ? 36 : 20;

// how far ahead a block that is read in order is fetched
constexpr int64_t AHEAD = 2 * BLOCK, LINE = 64;

template <typename P, typename S, int ROUNDING, bool TRACKED>
class Walk {
 public:
  Walk(const MaskedAdamw& job, const int64_t* slots, int64_t base) : slots_(slots), base_(base) {
    const float* h = job.hypers + slots[adamw::HYPER] * adamw::HYPERS;
    factors_ = {h[adamw::DECAY], h[adamw::LERP], h[adamw::BETA2], h[adamw::SQUARE], h[adamw::EPS],
                h[adamw::SCALE] * h[adamw::SIGN], h[adamw::NEAR_GRAD] != 0};
    cohorts_ = job.cohorts + slots[adamw::FIRST_COHORT] * adamw::COHORTS;
    for (int64_t i = 0; i < BLOCK; ++i) {
      step_size_[i] = cohorts_[adamw::STEP_SIZE];
      root_[i] = cohorts_[adamw::ROOT];
    }
  }

  int64_t run(int64_t first, int64_t blocks) {
    const int64_t numel = slots_[adamw::NUMEL];
    const uint64_t* words = column<const uint64_t>(adamw::MASK);
    const int64_t* prefix = column<const int64_t>(adamw::PREFIX);
    for (int64_t block = first; block < first + blocks; ++block) {
      const int64_t place = block * BLOCK, n = numel - place < BLOCK ? numel - place : BLOCK;
      const int64_t entry = words != nullptr ? prefix[block] : place;
      const int64_t set = words != nullptr ? prefix[block + 1] - entry : n;
      if (set == 0) continue;
      const bool striped = set == n || whole_words(words + place / 64, (n + 63) / 64, set);
      const bool dense = PICKS && ROUNDING != adamw::STOCHASTIC && set >= DENSE<P>;
      if (listed_ + set > BLOCK || striped || dense) flush();
      if (set == n)
        stretch(column<P>(adamw::PARAM) + place, column<const P>(adamw::GRAD) + place, entry, n, nullptr, place);
      else if (striped)
        stripes(words + place / 64, place, entry, set);
      else if (dense)
        sweep(words + place / 64, place, entry, set);
      else
        list(words + place / 64, place, n, entry, set);
    }
    flush();
    return changes_;
  }

 private:
  template <typename T>
  T* column(int slot) const {
    return reinterpret_cast<T*>(slots_[slot]);
  }

  // Whether every word of a block is all ones or all zeros, as masks of whole rows are.
  static bool whole_words(const uint64_t* words, int64_t count, int64_t set) {
    if (set % 64 != 0) return false;
    for (int64_t i = 0; i < count; ++i)
      if (words[i] + 1 > 1) return false;
    return true;
  }

  // Steps the runs of whole words of a block where they lie.
  void stripes(const uint64_t* words, int64_t place, int64_t entry, int64_t set) {
    for (int64_t i = 0, end = entry + set; entry < end; ++i) {
      const int64_t first = i;
      while (entry + 64 * (i - first) < end && words[i] != 0) ++i;
      const int64_t n = 64 * (i - first), at = place + 64 * first;
      if (n == 0) continue;
      stretch(column<P>(adamw::PARAM) + at, column<const P>(adamw::GRAD) + at, entry, n, nullptr, at);
      entry += n;
    }
  }

  // Steps the set coordinates of a block that is read from end to end.
  void sweep(const uint64_t* words, int64_t place, int64_t entry, int64_t set) {
    if constexpr (PICKS) {
      P* const param = column<P>(adamw::PARAM) + place;
      const P* const grad = column<const P>(adamw::GRAD) + place;
      for (int64_t i = 0, at = 0; at < set; ++i) {
        for (int64_t j = 0; j < 64; j += LINE / static_cast<int64_t>(sizeof(P))) {
          __builtin_prefetch(param + 64 * i + j + AHEAD, 1);
          __builtin_prefetch(grad + 64 * i + j + AHEAD);
        }
        pick(param + 64 * i, words[i], param_ + at);
        pick(grad + 64 * i, words[i], grad_ + at);
        at += __builtin_popcountll(words[i]);
      }
      stretch(param_, grad_, entry, set, nullptr, place);
      for (int64_t i = 0, at = 0; at < set; ++i) {
        put(param_ + at, words[i], param + 64 * i);
        at += __builtin_popcountll(words[i]);
      }
    }
  }

  // Notes the coordinates of one more block, and has memory fetch them meanwhile.
  void list(const uint64_t* words, int64_t place, int64_t n, int64_t entry, int64_t set) {
    if (listed_ == 0) entry_ = entry;
    uint32_t* const places = places_ + listed_;
    list_places(words, (n + 63) / 64, static_cast<uint32_t>(place - base_), places);
    const P* const param = column<const P>(adamw::PARAM) + base_;
    const P* const grad = column<const P>(adamw::GRAD) + base_;
    for (int64_t i = 0; i < set; ++i) {
      __builtin_prefetch(param + places[i], 1);
      __builtin_prefetch(grad + places[i]);
    }
    listed_ += set;
  }

  // Steps the listed coordinates. Only their parameters are written: others may be another's to write at this moment.
  void flush() {
    if (listed_ == 0) return;
    P* const param = column<P>(adamw::PARAM) + base_;
    const P* const grad = column<const P>(adamw::GRAD) + base_;
    for (int64_t i = 0; i < listed_; ++i) {
      param_[i] = param[places_[i]];
      grad_[i] = grad[places_[i]];
    }
    stretch(param_, grad_, entry_, listed_, places_, base_);
    for (int64_t i = 0; i < listed_; ++i) param[places_[i]] = param_[i];
    listed_ = 0;
  }

  // Steps n coordinates, at most a block: those at `place` on, or at the places listed, counted from it.
  void stretch(P* param, const P* grad, int64_t entry, int64_t n, const uint32_t* places, int64_t place) {
    if (const uint8_t* cohort = column<const uint8_t>(adamw::COHORT)) {
      for (int64_t i = 0; i < n; ++i) {
        const float* row = cohorts_ + cohort[entry + i] * adamw::COHORTS;
        step_size_[i] = row[adamw::STEP_SIZE];
        root_[i] = row[adamw::ROOT];
      }
    }
    if constexpr (ROUNDING == adamw::STOCHASTIC) {
      const uint64_t stream = static_cast<uint64_t>(slots_[adamw::STREAM]);
      const uint64_t from = static_cast<uint64_t>(slots_[adamw::OFFSET] + place);
      if (places == nullptr)
        for (uint64_t i = 0; i < static_cast<uint64_t>(n); ++i) noise_[i] = splitmix64(stream, from + i) >> 48;
      else
        for (int64_t i = 0; i < n; ++i) noise_[i] = splitmix64(stream, from + places[i]) >> 48;
    }
    constexpr bool HAS_EXTRA = ROUNDING == adamw::KAHAN || ROUNDING == adamw::MASTER;
    const bool scaled = factors_.scale != 1 && factors_.scale != -1;
    (scaled ? advance<P, S, ROUNDING, TRACKED, true> : advance<P, S, ROUNDING, TRACKED, false>)(
        n, factors_, param, grad, column<S>(adamw::EXP_AVG) + entry, column<S>(adamw::EXP_AVG_SQ) + entry,
        HAS_EXTRA ? column<uint16_t>(adamw::EXTRA) + entry : nullptr, noise_, step_size_, root_, old_, same_);
    if constexpr (TRACKED) note(param, entry, n);
  }

  // Visible changes of 64 entries from i on, as bits.
  uint64_t changes(const P* param, int64_t i, int64_t n) const {
    if constexpr (sizeof(P) == 4) {
      return up_to(same_ + i, 0) & lowest(n - i);
    } else {
      if (i + 64 <= n) return visibly_changed(old_ + i, param + i);
      alignas(64) uint16_t rest[64];
      for (int64_t j = 0; j < 64; ++j) rest[j] = i + j < n ? param[i + j] : 0;
      return visibly_changed(old_ + i, rest) & lowest(n - i);
    }
  }

  // Counts the visible changes of n entries, and marks them.
  void note(const P* param, int64_t entry, int64_t n) {
    uint64_t* const changed = column<uint64_t>(adamw::CHANGED);
    const int shift = static_cast<int>(entry % 64);
    uint64_t carry = 0;
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t word = changes(param, i, n);
      changes_ += __builtin_popcountll(word);
      if (changed == nullptr) continue;
      mark(changed + entry / 64 + i / 64, word << shift | carry, i == 0 || i + 64 > n + shift);
      carry = shift != 0 ? word >> (64 - shift) : 0;
    }
    if (carry != 0) mark(changed + entry / 64 + (n + 63) / 64, carry, true);
  }

  // Words at the ends may be shared with entries of other threads.
  static void mark(uint64_t* changed, uint64_t bits, bool shared) {
    if (bits == 0) return;
    if (shared)
      __atomic_fetch_or(changed, bits, __ATOMIC_RELAXED);
    else
      *changed |= bits;
  }

  const int64_t* slots_;
  int64_t base_;  // from where places are counted
  Factors factors_;
  const float* cohorts_;
  int64_t listed_ = 0, entry_ = 0, changes_ = 0;
  alignas(64) uint32_t places_[BLOCK + LIST_SLACK];
  alignas(64) P param_[BLOCK + PICK_SLACK];
  alignas(64) P grad_[BLOCK + PICK_SLACK];
  alignas(64) float step_size_[BLOCK];
  alignas(64) float root_[BLOCK];
  alignas(64) uint16_t noise_[BLOCK];
  alignas(64) uint16_t old_[BLOCK];
  alignas(64) uint32_t same_[sizeof(P) == 4 ? BLOCK : 1];
};

template <typename P, typename S, int ROUNDING>
static int64_t step_as(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  if (job.changes != nullptr || slots[adamw::CHANGED] != 0)
    return Walk<P, S, ROUNDING, true>(job, slots, first * BLOCK).run(first, blocks);
  return Walk<P, S, ROUNDING, false>(job, slots, first * BLOCK).run(first, blocks);
}

template <typename S>
static int64_t step_state(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  if (job.param_dtype == FP32) return step_as<float, S, adamw::NEAREST>(job, slots, first, blocks);
  switch (job.rounding) {
    case adamw::STOCHASTIC:
      return step_as<uint16_t, S, adamw::STOCHASTIC>(job, slots, first, blocks);
    case adamw::KAHAN:
      return step_as<uint16_t, S, adamw::KAHAN>(job, slots, first, blocks);
    case adamw::MASTER:
      return step_as<uint16_t, S, adamw::MASTER>(job, slots, first, blocks);
    default:
      return step_as<uint16_t, S, adamw::NEAREST>(job, slots, first, blocks);
  }
}

static int64_t step(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  return job.state_dtype == FP32 ? step_state<float>(job, slots, first, blocks)
                                 : step_state<uint16_t>(job, slots, first, blocks);
}

extern const AdamwKernels adamw_kernels = {step};
